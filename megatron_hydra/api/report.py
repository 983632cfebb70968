"""`report`: one HTML page from the files that the other steps wrote."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

from megatron_hydra.errors import UserError
from megatron_hydra.evaluation.generation import Generation
from megatron_hydra.evaluation.reading import read_evaluation
from megatron_hydra.files import check_output, check_outputs, write_beside
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.provenance import command_line
from megatron_hydra.report import render_report
from megatron_hydra.report.training_runs import CONFIG_FILES, read_run
from megatron_hydra.selection.pareto import ParetoTable
from megatron_hydra.selection.scores import HeadScores
from megatron_hydra.teachers.config_json import config_hash

_READ_OF_RUN = (*CONFIG_FILES, "tensorboard", "hybrid")


def report(
    out: Path,
    *,
    scores: Path,
    plan: Path,
    runs: Mapping[str, Path],
    evaluation: Path | None = None,
    pareto: Path | None = None,
    generation: Path | None = None,
    teacher: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the page; it needs no other file and no network.

    Args:
        out: The page.
        scores: What :func:`~megatron_hydra.api.score.score` wrote.
        plan: What :func:`~megatron_hydra.api.plan.plan` wrote.
        runs: Run folders by the names that the page gives them, in order.
        evaluation: What :func:`~megatron_hydra.api.evaluate.evaluate` wrote; None: the page is of
            `generation` alone.
        pareto: What :func:`~megatron_hydra.api.pareto.pareto` wrote; None leaves it out.
        generation: What :func:`~megatron_hydra.api.generate.generate` wrote; None leaves it out.
        teacher: Folder of the teacher that plan and scores must be of, and which names it.
        overwrite: Replace an existing page.

    Raises:
        UserError: If an input is missing or odd, they do not belong together, or the page would
            replace one of them.
    """
    # The page may stand in a run's folder, beside what is read there.
    read = [folder / part for folder in runs.values() for part in _READ_OF_RUN]
    check_outputs([out], (scores, plan, evaluation, pareto, generation, teacher, *read))
    check_output(out, overwrite, "file")
    if not runs:
        raise UserError("no training run given: pass --run NAME=FOLDER for each stage")
    page = render_report(
        HeadScores.load(scores),
        HeadPlan.load(plan),
        None if evaluation is None else read_evaluation(evaluation),
        [read_run(name, folder) for name, folder in runs.items()],
        pareto=None if pareto is None else ParetoTable.load(pareto),
        generation=None if generation is None else Generation.load(generation),
        command=command_line(),
        teacher_config_hash=config_hash(teacher) if teacher else "",
        teacher_name=teacher.resolve().name if teacher else "",
        written=datetime.now(timezone.utc).date(),
    )
    with write_beside(out, overwrite) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out
