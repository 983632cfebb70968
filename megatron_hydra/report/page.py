"""The report's page: its inputs held against each other, and its parts put together."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

from megatron_hydra.errors import UserError
from megatron_hydra.evaluation.generation import Generation
from megatron_hydra.evaluation.reading import in_one_format
from megatron_hydra.evaluation.results import Evaluation
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.report.chart_style import Picture, chart_style, to_picture
from megatron_hydra.report.headline import headline, hybrids_of
from megatron_hydra.report.heatmap import head_map_figure, scorer_names
from megatron_hydra.report.measured import Measured
from megatron_hydra.report.rendering import render
from megatron_hydra.report.sections import (
    evaluation_section,
    generation_section,
    memory_section,
    provenance_section,
    training_section,
)
from megatron_hydra.report.selection_section import selection_section
from megatron_hydra.report.training_runs import RecordedRun
from megatron_hydra.selection.pareto import ParetoTable
from megatron_hydra.selection.policy import scores_as_planned
from megatron_hydra.selection.scores import HeadScores


def render_report(
    scores: HeadScores,
    plan: HeadPlan,
    evaluation: Evaluation | None,
    runs: Sequence[RecordedRun],
    *,
    pareto: ParetoTable | None = None,
    generation: Generation | None = None,
    command: str = "",
    teacher_config_hash: str = "",
    teacher_name: str = "",
    written: date | None = None,
) -> str:
    """The page as HTML, which needs no other file and no network.

    Args:
        scores: Of every head of the teacher.
        plan: Made from them.
        evaluation: Of the teacher and of at least one hybrid of the plan; None where `generation`
            is that.
        runs: In the order of the page.
        pareto: Of the same scores; None leaves it out.
        generation: What models answered by generating text; None leaves it out. What the page says
            of models is taken from here, else from the evaluation: log-likelihoods stay high where
            text that a model has to generate is lost.
        command: That makes the page, for its provenance.
        teacher_config_hash: Of the teacher that plan and scores must be of; empty: unchecked.
        teacher_name: What the page calls the teacher; empty: as the scores record it.
        written: The page's own date; None leaves it out.

    Raises:
        UserError: If the inputs do not belong together.
    """
    _check_together(scores, plan, runs, teacher_config_hash)
    scores = scores_as_planned(scores, plan)
    evaluation = None if evaluation is None else in_one_format(evaluation, scores.shape)
    measured = _measured(plan, generation or evaluation)
    results = {"evaluation": evaluation, "generation": generation}
    sources = {
        "scores": scores.provenance,
        # The section on head selection shows the explanation.
        "plan": {k: v for k, v in plan.provenance.items() if k != "explanation"},
        **{name: each.provenance for name, each in results.items() if each is not None},
    }
    records = provenance_section(sources, runs, command)
    versions = records["versions"]
    with chart_style():
        values = {
            "plan": plan,
            "head_map": _head_map(scores, plan),
            **headline(scores, plan, measured, versions, teacher_name, written),
            **selection_section(scores, plan, pareto),
            **evaluation_section(evaluation),
            **generation_section(generation),
            **memory_section(measured),
            **training_section(runs),
            **records,
        }
    return render("page.html", values)


def _check_together(
    scores: HeadScores,
    plan: HeadPlan,
    runs: Sequence[RecordedRun],
    teacher_config_hash: str,
) -> None:
    for config_hash in (scores.teacher_config_hash, teacher_config_hash):
        plan.check_teacher(
            scores.num_layers, scores.num_heads, scores.num_query_groups, config_hash
        )
    for run in runs:
        if run.plan.layers != plan.layers:
            raise UserError(f"run {run.name}: {run.folder} trained a hybrid of another plan")


def _measured(plan: HeadPlan, results: Evaluation | Generation | None) -> Measured:
    if results is None:
        raise UserError("no results of models given: --evaluation or --generation is needed")
    measured, num_heads = Measured.of(results), plan.num_layers * plan.num_heads
    for model in measured.models:
        if model.num_heads != num_heads:
            raise UserError(
                f"model {model.name!r} of the evaluation has {model.num_heads} heads, "
                f"but the plan has {num_heads}: was it made for another teacher?"
            )
    if not hybrids_of(plan, measured):
        raise UserError(
            f"the evaluation has no hybrid with exactly the plan's {plan.num_fa_heads} FA heads: "
            "it is not an evaluation of this plan"
        )
    return measured


def _head_map(scores: HeadScores, plan: HeadPlan) -> Picture:
    return to_picture(
        head_map_figure(scores, plan),
        "heads",
        "score of each head, with the plan",
        f"Score of each head by {scorer_names(scores)}; layers and heads count from 0.",
    )
