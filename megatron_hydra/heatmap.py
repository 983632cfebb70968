"""The head map: a picture of every head's score with the head plan drawn on it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from megatron_hydra.files import write_beside
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.scores import HeadScores

_INK = "#1f2933"
_FA = "#d55e00"
_SCALE = LinearSegmentedColormap.from_list(
    "head_scores", ["#e9eef3", "#9cc3e4", "#2f78b7", "#0b3866"]
)
_CELL = 0.9  # Side of a cell; a head takes a width of 1.
_GROUP_GAP = 0.25  # Space between two query groups, in heads.
_MAX_CELLS_WITH_NUMBERS = 96


def draw_head_map(scores: HeadScores, plan: HeadPlan | None, ax: Axes) -> None:
    """Draw the scores as shaded cells, layers down and heads across, FA heads outlined.

    Gaps part the query groups. Scores below 0 take the lightest shade. Small maps show each
    score in its cell.

    Args:
        scores: Score of each head.
        plan: Its FA heads are outlined; None draws the scores alone.
        ax: Axes to draw on; its figure gets a colour bar.

    Raises:
        UserError: If ``plan`` was made for another teacher than ``scores``.
    """
    if plan is not None:
        plan.check_teacher(
            scores.num_layers,
            scores.num_heads,
            scores.num_query_groups,
            scores.teacher_config_hash,
        )
    highest = max(0.0, *(score for row in scores.scores for score in row))
    centres = _head_centres(scores)
    cells = PatchCollection(
        [_cell(x, layer) for layer in range(scores.num_layers) for x in centres],
        cmap=_SCALE,
        linewidth=0,
    )
    cells.set_array([score for row in scores.scores for score in row])
    cells.set_clim(0.0, highest or 1.0)
    ax.add_collection(cells)
    _label_axes(scores, centres, ax)
    if scores.num_layers * scores.num_heads <= _MAX_CELLS_WITH_NUMBERS:
        _write_numbers(scores, centres, highest, ax)
    if plan is not None:
        _outline_fa_heads(plan, centres, ax)
    bar = ax.figure.colorbar(cells, ax=ax, pad=0.02, fraction=0.05, aspect=14)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8)
    bar.set_label("score", fontsize=9)


def save_head_map(
    path: str | os.PathLike[str],
    scores: HeadScores,
    plan: HeadPlan | None,
    title: str,
    overwrite: bool = False,
) -> None:
    """Write the head map as a PNG whose size follows the number of heads and layers.

    Raises:
        UserError: If ``path`` exists and ``overwrite`` is False, or cannot be written.
    """
    width = 1.9 + 0.45 * scores.num_heads
    height = 1.5 + 0.34 * scores.num_layers
    figure = Figure(figsize=(max(5.0, width), max(2.4, height)), layout="constrained")
    ax = figure.add_subplot()
    draw_head_map(scores, plan, ax)
    ax.set_title(title, loc="left", color=_INK, fontsize=11, pad=6 if plan is None else 22)
    with write_beside(path, overwrite) as temporary:
        figure.savefig(temporary, format="png", dpi=160)


def _head_centres(scores: HeadScores) -> list[float]:
    heads_per_group = scores.num_heads // scores.num_query_groups
    gap = _GROUP_GAP if heads_per_group > 1 else 0.0
    return [head + gap * (head // heads_per_group) for head in range(scores.num_heads)]


def _cell(centre: float, layer: int, **style: Any) -> Rectangle:
    return Rectangle((centre - _CELL / 2, layer - _CELL / 2), _CELL, _CELL, **style)


def _label_axes(scores: HeadScores, centres: Sequence[float], ax: Axes) -> None:
    ax.set_xlim(centres[0] - 0.6, centres[-1] + 0.6)
    ax.set_ylim(scores.num_layers - 0.4, -0.6)
    ax.grid(False)
    ax.tick_params(length=0, labelsize=8)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_xticks(centres, [str(head) for head in range(scores.num_heads)])
    ax.set_yticks(range(scores.num_layers), [str(layer) for layer in range(scores.num_layers)])
    ax.set_xlabel(f"head, in {scores.num_query_groups} query groups", fontsize=9)
    ax.set_ylabel("layer", fontsize=9)


def _write_numbers(scores: HeadScores, centres: Sequence[float], highest: float, ax: Axes) -> None:
    for layer, row in enumerate(scores.scores):
        for x, score in zip(centres, row):
            colour = "white" if score > 0.45 * highest else _INK
            ax.text(x, layer, f"{score:.2f}", ha="center", va="center", fontsize=7.5, color=colour)


def _outline_fa_heads(plan: HeadPlan, centres: Sequence[float], ax: Axes) -> None:
    for index, layer in enumerate(plan.layers):
        for head in layer.fa_heads:
            ax.add_patch(_cell(centres[head], index, fill=False, edgecolor=_FA, linewidth=2.0))
    total = plan.num_layers * plan.num_heads
    marker = Line2D(
        [],
        [],
        linestyle="none",
        marker="s",
        markersize=8,
        markerfacecolor="none",
        markeredgecolor=_FA,
        markeredgewidth=2.0,
        label=f"keeps full attention ({plan.num_fa_heads} of {total} heads)",
    )
    ax.legend(
        handles=[marker],
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        frameon=False,
        fontsize=8.5,
        handletextpad=0.2,
        borderpad=0.0,
    )
