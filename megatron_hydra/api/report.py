"""`report`: one HTML page from the files that the other steps wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_hydra.files import check_outputs, command_line
from megatron_hydra.report import write_report
from megatron_hydra.report.training_runs import CONFIG_FILES
from megatron_hydra.teachers.config_json import config_hash

_READ_OF_RUN = (*CONFIG_FILES, "tensorboard", "hybrid")


def report(
    out: Path,
    *,
    scores: Path,
    plan: Path,
    evaluation: Path,
    runs: Mapping[str, Path],
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
        evaluation: What :func:`~megatron_hydra.api.evaluate.evaluate` wrote.
        runs: Run folders by the names that the page gives them, in order.
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
    return write_report(
        out,
        scores=scores,
        plan=plan,
        evaluation=evaluation,
        runs=runs,
        pareto=pareto,
        generation=generation,
        command=command_line(),
        teacher_config_hash=config_hash(teacher) if teacher else "",
        teacher_name=teacher.resolve().name if teacher else "",
        overwrite=overwrite,
    )
