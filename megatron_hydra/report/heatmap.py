"""The head map: a picture of every head's score with the head plan drawn on it."""

from __future__ import annotations

import os
import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.report.chart_style import FA_COLOUR, INK, SCORE_SCALE, chart_style, save_png
from megatron_hydra.selection.combination import Array
from megatron_hydra.selection.scores import HeadScores

_CELL = 0.9  # Side of a cell; a head takes a width of 1.
_GROUP_GAP = 0.25  # Space between two query groups, in heads.
_MAX_CELLS_WITH_NUMBERS = 96
_CELL_INCHES = (0.45, 0.34)  # Width, height: room for a number.
_SMALL_CELL_INCHES = (0.3, 0.22)
_TITLE_CHARACTERS = 11  # an inch


def draw_head_map(scores: HeadScores, plan: HeadPlan, ax: Axes) -> None:
    """Draw the scores as shaded cells, layers down and heads across, FA heads outlined.

    Gaps part the query groups. Small maps show each score in its cell.

    Args:
        scores: Score of each head.
        plan: For the same teacher; its FA heads are outlined.
        ax: Axes to draw on; its figure gets a colour bar.
    """
    cells = draw_cells(scores.scores, scores.num_query_groups, ax)
    ax.set_xlabel(f"head, in {scores.num_query_groups} query groups")
    ax.set_ylabel("layer")
    if not _is_large(scores):
        _write_numbers(scores.scores, cells.get_clim()[1], ax)
    outline_fa_heads(plan, ax, line_width=1.5 if _is_large(scores) else 2.0)
    ax.legend(
        handles=[fa_outline_key(plan)],
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        handletextpad=0.2,
        borderpad=0.0,
    )
    add_score_bar(cells, ax, is_tall=_is_large(scores))


def save_head_map(
    path: str | os.PathLike[str],
    scores: HeadScores,
    plan: HeadPlan,
    title: str,
    overwrite: bool = False,
) -> None:
    """Write the head map as a PNG whose size follows the number of heads and layers.

    Args:
        path: The picture.
        scores: As :func:`draw_head_map`.
        plan: As :func:`draw_head_map`.
        title: Stands over the map, on several lines if it is long.
        overwrite: Replace an existing picture.

    Raises:
        UserError: If ``path`` exists and ``overwrite`` is False, or cannot be written.
    """
    with chart_style():
        figure = head_map_figure(scores, plan)
        title = textwrap.fill(title, round(_TITLE_CHARACTERS * figure.get_figwidth()))
        figure.axes[0].set_title(title, loc="left", fontsize=11, pad=22)
        save_png(path, figure, overwrite)


def head_map_figure(scores: HeadScores, plan: HeadPlan) -> Figure:
    """A figure of the map's own size with :func:`draw_head_map`."""
    width, height = _SMALL_CELL_INCHES if _is_large(scores) else _CELL_INCHES
    size = (2.0 + width * scores.num_heads, 1.0 + height * scores.num_layers)
    figure = Figure(figsize=size, layout="constrained")
    draw_head_map(scores, plan, figure.add_subplot())
    return figure


def draw_cells(
    values: Array, num_query_groups: int, ax: Axes, highest: float | None = None
) -> PatchCollection:
    """Draw ``values`` [layers, heads] as shaded cells that the axes' ticks number.

    Args:
        values: 0 or more; 0 takes the lightest shade.
        num_query_groups: Gaps stand between groups.
        ax: Axes to draw on.
        highest: Value of the darkest shade; default: the highest that is drawn.
    """
    num_layers, num_heads = values.shape
    centres = _head_centres(num_heads, num_query_groups)
    cells = PatchCollection(
        [_cell(x, layer) for layer in range(num_layers) for x in centres],
        cmap=SCORE_SCALE,
        linewidth=0,
    )
    cells.set_array(values.ravel())
    highest = float(values.max()) if highest is None else highest
    cells.set_clim(0.0, highest or 1.0)
    ax.add_collection(cells)
    ax.set_xlim(centres[0] - 0.6, centres[-1] + 0.6)
    ax.set_ylim(num_layers - 0.4, -0.6)
    ax.grid(False)
    ax.tick_params(length=0, labelsize=8)
    ax.spines[:].set_visible(False)
    ax.set_xticks(centres, [str(head) for head in range(num_heads)])
    ax.set_yticks(range(num_layers), [str(layer) for layer in range(num_layers)])
    return cells


def outline_fa_heads(plan: HeadPlan, ax: Axes, line_width: float) -> None:
    """Draw a frame around the FA heads on axes that :func:`draw_cells` has filled."""
    centres = _head_centres(plan.num_heads, plan.num_query_groups)
    for index, layer in enumerate(plan.layers):
        for head in layer.fa_heads:
            ax.add_patch(
                _cell(centres[head], index, fill=False, edgecolor=FA_COLOUR, linewidth=line_width)
            )


def fa_outline_key(plan: HeadPlan) -> Line2D:
    """The legend's entry for :func:`outline_fa_heads`."""
    total = plan.num_layers * plan.num_heads
    return Line2D(
        [],
        [],
        linestyle="none",
        marker="s",
        markersize=8,
        markerfacecolor="none",
        markeredgecolor=FA_COLOUR,
        markeredgewidth=2.0,
        label=f"keeps full attention ({plan.num_fa_heads} of {total} heads)",
    )


def add_score_bar(cells: ScalarMappable, axes: Any, is_tall: bool) -> Colorbar:
    """A colour bar beside ``axes``, one or several that share the scale."""
    figure = axes.figure if isinstance(axes, Axes) else axes[0].figure
    bar = figure.colorbar(
        cells, ax=axes, pad=0.02, fraction=0.05, aspect=24 if is_tall else 14, shrink=0.8
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8)
    bar.ax.grid(False)
    bar.set_label("score")
    return bar


def scorer_names(scores: HeadScores) -> str:
    """The scorers that the scores stand on, in words."""
    *names, last = (scorer.replace("_", " ") for scorer in scores.combination.scorers)
    return f"{', '.join(names)} and {last}" if names else last


def _is_large(scores: HeadScores) -> bool:
    """Whether the cells have no room for numbers."""
    return scores.num_layers * scores.num_heads > _MAX_CELLS_WITH_NUMBERS


def _head_centres(num_heads: int, num_query_groups: int) -> list[float]:
    heads_per_group = num_heads // num_query_groups
    gap = _GROUP_GAP if heads_per_group > 1 else 0.0
    return [head + gap * (head // heads_per_group) for head in range(num_heads)]


def _cell(centre: float, layer: int, **style: Any) -> Rectangle:
    return Rectangle((centre - _CELL / 2, layer - _CELL / 2), _CELL, _CELL, **style)


def _write_numbers(values: Array, highest: float, ax: Axes) -> None:
    for layer, row in enumerate(values):
        for x, score in zip(ax.get_xticks(), row):
            colour = "white" if score > 0.45 * highest else INK
            ax.text(x, layer, f"{score:.2f}", ha="center", va="center", fontsize=7.5, color=colour)
