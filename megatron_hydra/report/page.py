"""The report's page: its inputs held against each other, its headline, its parts put together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from megatron_hydra.errors import UserError
from megatron_hydra.evaluation.reading import in_one_format, read_evaluation
from megatron_hydra.evaluation.results import Evaluation, ModelResult
from megatron_hydra.files import check_output, write_beside
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.report import sections
from megatron_hydra.report.chart_style import chart_style, to_svg
from megatron_hydra.report.heatmap import head_map_figure, scorer_names
from megatron_hydra.report.selection_section import selection_section
from megatron_hydra.report.training_runs import TrainingRun, read_run
from megatron_hydra.selection.cost import num_stored_groups
from megatron_hydra.selection.pareto import ParetoTable
from megatron_hydra.selection.policy import scores_as_planned
from megatron_hydra.selection.scores import HeadScores

_TEMPLATE = Path(__file__).with_name("page.html")


def write_report(
    out: str | os.PathLike[str],
    *,
    scores: str | os.PathLike[str],
    plan: str | os.PathLike[str],
    evaluation: str | os.PathLike[str],
    runs: Mapping[str, str | os.PathLike[str]],
    pareto: str | os.PathLike[str] | None = None,
    command: str = "",
    teacher_config_hash: str = "",
    overwrite: bool = False,
) -> Path:
    """Read the outputs of a transfer and write one self-contained HTML page.

    Args:
        out: The page.
        scores: What ``megatron-hydra score`` wrote.
        plan: What ``megatron-hydra plan`` wrote.
        evaluation: What ``megatron-hydra evaluate`` wrote.
        runs: Run folders by the names that the page gives them, in order.
        pareto: What ``megatron-hydra pareto`` wrote; None leaves it out.
        command: The command that makes the page, for its provenance.
        teacher_config_hash: Hash of the teacher that plan and scores must be of; empty: unchecked.
        overwrite: Replace an existing page.

    Raises:
        UserError: If an input is missing or odd, or they do not belong together.
    """
    target = check_output(out, overwrite, "file")
    if not runs:
        raise UserError("no training run given: pass --run NAME=FOLDER for each stage")
    page = render_report(
        HeadScores.load(scores),
        HeadPlan.load(plan),
        read_evaluation(evaluation),
        [read_run(name, folder) for name, folder in runs.items()],
        pareto=None if pareto is None else ParetoTable.load(pareto),
        command=command,
        teacher_config_hash=teacher_config_hash,
    )
    with write_beside(target, overwrite) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


def render_report(
    scores: HeadScores,
    plan: HeadPlan,
    evaluation: Evaluation,
    runs: Sequence[TrainingRun],
    *,
    pareto: ParetoTable | None = None,
    command: str = "",
    teacher_config_hash: str = "",
) -> str:
    """The page as HTML; see :func:`write_report`.

    Raises:
        UserError: If the inputs do not belong together.
    """
    _check_together(scores, plan, evaluation, runs, teacher_config_hash)
    scores = scores_as_planned(scores, plan)
    evaluation = in_one_format(evaluation, scores.shape)
    sources = {
        "scores": scores.provenance,
        # The section on head selection shows the explanation.
        "plan": {k: v for k, v in plan.provenance.items() if k != "explanation"},
        "evaluation": evaluation.provenance,
    }
    with chart_style():
        parts = [
            sections.section("Heads", _heads(scores, plan)),
            sections.section("Head selection", selection_section(scores, plan, pareto)),
            sections.section("Evaluation", sections.evaluation_table(evaluation)),
            sections.section("Needle grid", sections.needle_grids(evaluation)),
            sections.section("Memory", sections.cache_section(evaluation)),
            sections.section("Training", sections.training_section(runs)),
            sections.section("Provenance", sections.provenance_section(sources, runs, command)),
        ]
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=sections.escape(_title(plan)),
        summary=sections.escape(_summary(plan, evaluation)),
        tiles=sections.tiles(evaluation),
        sections="".join(parts),
    )


def _check_together(
    scores: HeadScores,
    plan: HeadPlan,
    evaluation: Evaluation,
    runs: Sequence[TrainingRun],
    teacher_config_hash: str,
) -> None:
    for config_hash in (scores.teacher_config_hash, teacher_config_hash):
        plan.check_teacher(
            scores.num_layers, scores.num_heads, scores.num_query_groups, config_hash
        )
    for run in runs:
        if run.plan.layers != plan.layers:
            raise UserError(f"run {run.name}: {run.folder} trained a hybrid of another plan")
    num_heads = plan.num_layers * plan.num_heads
    for model in evaluation.models:
        if model.num_heads != num_heads:
            raise UserError(
                f"model {model.name!r} of the evaluation has {model.num_heads} heads, "
                f"but the plan has {num_heads}: was it made for another teacher?"
            )
    if not _hybrids_of(plan, evaluation):
        raise UserError(
            f"the evaluation has no hybrid with exactly the plan's {plan.num_fa_heads} FA heads: "
            "it is not an evaluation of this plan"
        )


def _hybrids_of(plan: HeadPlan, evaluation: Evaluation) -> list[ModelResult]:
    """Hybrids of this very plan: a control has as many FA heads, but others."""
    fa_heads = tuple(layer.fa_heads for layer in plan.layers)
    return [model for model in evaluation.models if model.plan == fa_heads]


def _title(plan: HeadPlan) -> str:
    return f"{plan.num_fa_heads} of {plan.num_layers * plan.num_heads} heads on full attention"


def _summary(plan: HeadPlan, evaluation: Evaluation) -> str:
    task, length = evaluation.headline_cell
    teacher = evaluation.teacher
    # Of groups, not bytes: the same in every number format.
    cache = num_stored_groups(plan) / (plan.num_layers * plan.num_query_groups)

    def accuracy(model: ModelResult) -> float:
        return model.accuracy[task, length].value

    best = max(_hybrids_of(plan, evaluation), key=accuracy)
    share = plan.num_fa_heads / (plan.num_layers * plan.num_heads)
    return (
        f"With {share:.0%} of the heads on full attention and the rest on linear attention, "
        f"“{best.name}” stores {cache:.0%} of the teacher's cache a token and answers "
        f"{accuracy(best):.1%} of {sections.task_name(task).lower()} samples at {length:,} tokens; "
        f"the teacher answers {accuracy(teacher):.1%}."
    )


def _heads(scores: HeadScores, plan: HeadPlan) -> str:
    svg = to_svg(head_map_figure(scores, plan), "heads", "score of each head, with the plan")
    scorer = sections.escape(scorer_names(scores))
    caption = f"Score of each head by {scorer}; layers and heads count from 0."
    return sections.figure(svg, caption) + sections.plan_table(plan)
