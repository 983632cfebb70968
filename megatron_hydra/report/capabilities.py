"""Small multiples: the head map of each capability, all on one scale."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.report.chart_style import plain_text
from megatron_hydra.report.heatmap import (
    add_score_bar,
    draw_cells,
    fa_outline_key,
    outline_fa_heads,
)
from megatron_hydra.selection.scores import HeadScores

_MAX_MAPS_IN_A_ROW = 4


def capability_figure(scores: HeadScores, plan: HeadPlan) -> Figure:
    """One head map per capability on one scale, the FA heads framed."""
    maps = scores.capability_scores
    num_rows = math.ceil(len(maps) / _MAX_MAPS_IN_A_ROW)
    num_columns = math.ceil(len(maps) / num_rows)
    cell = 0.13 if scores.num_heads > 8 else 0.24  # inches
    size = (
        1.1 + num_columns * (0.45 + cell * 1.15 * scores.num_heads),
        0.7 + num_rows * (0.5 + cell * scores.num_layers),
    )
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    highest = max(float(values.max()) for values in maps.values())
    for ax, (capability, values) in zip(axes, maps.items(), strict=False):
        cells = draw_cells(values, scores.num_query_groups, ax, highest)
        outline_fa_heads(plan, ax, line_width=0.8 if cell < 0.2 else 1.4)
        ax.set_title(plain_text(capability.replace("_", " ")), loc="left", fontsize=9.5)
        _thin_ticks(ax)
    for ax in axes[len(maps) :]:
        ax.remove()
    figure.supxlabel("head", fontsize="medium")
    figure.supylabel("layer", fontsize="medium")
    figure.legend(handles=[fa_outline_key(plan)], loc="outside upper left")
    add_score_bar(cells, list(axes[: len(maps)]), is_tall=size[1] > 3)
    return figure


def _thin_ticks(ax: Axes) -> None:
    """Number every fourth head and layer where there are many."""
    for axis in (ax.xaxis, ax.yaxis):
        places = axis.get_ticklocs()
        labels = [str(index) for index in range(len(places))]
        step = 4 if len(places) > 8 else 1
        axis.set_ticks(places[::step], labels[::step])
