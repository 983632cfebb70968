"""All pictures of a head selection, written as PNG files into one folder."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_hydra.files import check_output
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.report.capabilities import capability_figure
from megatron_hydra.report.chart_style import chart_style, save_png
from megatron_hydra.report.heatmap import save_head_map, scorer_names
from megatron_hydra.report.pareto_chart import pareto_figure
from megatron_hydra.report.ranking import rank_figure
from megatron_hydra.selection.pareto import ParetoTable
from megatron_hydra.selection.scores import HeadScores

PICTURES = ("head_map.png", "ranking.png", "capabilities.png", "pareto.png")
"""What is written to the folder, the last one where there is a table of budgets."""


def save_selection_pictures(
    folder: str | os.PathLike[str],
    scores: HeadScores,
    plan: HeadPlan,
    overwrite: bool = False,
    pareto: ParetoTable | None = None,
) -> list[Path]:
    """Write every picture of a selection as a PNG; nothing is written if one cannot be.

    Args:
        folder: Made if it is not there.
        scores: What the plan was made from.
        plan: The plan.
        overwrite: Replace existing pictures.
        pareto: Of the same scores; None leaves its picture out.

    Returns:
        Paths of the head map, the ranking, the capabilities' maps, and the Pareto chart.

    Raises:
        UserError: If the plan is of another teacher or other scores, or a picture exists and
            ``overwrite`` is False, or cannot be written.
    """
    names = PICTURES if pareto is not None else PICTURES[:-1]
    paths = [check_output(Path(folder) / name, overwrite, "file") for name in names]
    with chart_style():
        figures = [rank_figure(scores, plan), capability_figure(scores, plan)]
        if pareto is not None:
            figures.append(pareto_figure(pareto, scores, plan))
        save_head_map(paths[0], scores, plan, f"Head scores by {scorer_names(scores)}", overwrite)
        for path, figure in zip(paths[1:], figures, strict=True):
            save_png(path, figure, overwrite)
    return paths
