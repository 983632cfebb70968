"""The Pareto chart: what several budgets keep of the scores against what a sequence then stores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.report.chart_style import FA_COLOUR, LA_COLOUR, MUTED
from megatron_hydra.report.units import byte_unit
from megatron_hydra.selection.cost import GIB, Costs, costs_of
from megatron_hydra.selection.explanation import kept_shares
from megatron_hydra.selection.pareto import ParetoRow, ParetoTable
from megatron_hydra.selection.policy import read_explanation
from megatron_hydra.selection.scores import HeadScores

_PALE = 0.35  # opacity of dominated rows
_LABEL_ROOM = 0.03  # from one number to the next, as a share of the teacher's cache


def pareto_figure(table: ParetoTable, scores: HeadScores, plan: HeadPlan) -> Figure:
    """A figure with :func:`draw_pareto`."""
    figure = Figure(figsize=(7.4, 3.9), layout="constrained")
    draw_pareto(table, scores, plan, figure.add_subplot())
    return figure


def draw_pareto(table: ParetoTable, scores: HeadScores, plan: HeadPlan, ax: Axes) -> None:
    """Draw the kept share of the scores against cache and state of a sequence.

    The line joins the rows that keep more than every row that stores as much or less. A second
    scale tells the share of what the teacher stores.

    Args:
        table: Its rows, with their FA heads; dominated ones are pale.
        scores: What table and plan were made from.
        plan: Marked; it need not be a row.
        ax: Axes to draw on.

    Raises:
        UserError: If the table is of another teacher than the scores.
    """
    own = plan_row(table, scores, plan)
    unit, unit_bytes = byte_unit(table.teacher.cache_gib * GIB)

    def stored(costs: Costs) -> float:
        return costs.cache_gib * GIB / unit_bytes

    front = _front(table.rows)
    ax.plot([stored(row.costs) for row in front], [100 * row.kept_share for row in front],
            color=LA_COLOUR, linewidth=1.2, zorder=1)  # fmt: skip
    best = [row for row in table.rows if not row.is_dominated]
    pale = [row for row in table.rows if row.is_dominated]
    _draw_rows(best, stored, ax, "a budget's plan, number of FA heads", LA_COLOUR)
    _draw_rows(pale, stored, ax, "dominated: another is as good and cheaper", LA_COLOUR, _PALE)
    _number_points(best, stored, ax, room=_LABEL_ROOM * stored(table.teacher))
    _draw_rows([own], stored, ax, f"this plan, {own.costs.num_fa_heads} FA heads", FA_COLOUR)
    ax.plot(stored(table.teacher), 100, "s", color=MUTED, markersize=5, label="teacher", zorder=3)
    ax.set_xlim(0, 1.05 * stored(table.teacher))
    lowest = min(share for row in (*table.rows, own) for share in _shares(row))
    ax.set_ylim(max(0, 10 * math.floor(10 * lowest - 0.5)), 103)
    length, dtype = f"{table.teacher.context_tokens:,}", table.teacher.serve_dtype
    ax.set_xlabel(f"cache and state of a sequence of {length} tokens ({unit}, cache in {dtype})")
    ax.set_ylabel("kept share of all scores (%)")
    ax.legend(loc="lower right")
    _add_share_scale(stored(table.teacher), ax)


def plan_row(table: ParetoTable, scores: HeadScores, plan: HeadPlan) -> ParetoRow:
    """``plan`` as a row of the table, for its context, device and number format.

    Raises:
        UserError: If the table is of another teacher than the scores.
    """
    told = table.teacher
    where = told.context_tokens, told.device, told.serve_dtype
    if told != costs_of(scores.shape, None, *where):
        raise UserError("the Pareto table is of another teacher than the head scores")
    explanation = read_explanation(plan)
    return ParetoRow(
        "this plan",
        float(kept_shares(scores.scores, plan)),
        None if explanation is None else explanation.kept_interval,
        costs_of(scores.shape, plan, *where),
    )


def _front(rows: Sequence[ParetoRow]) -> list[ParetoRow]:
    """The rows that keep more than every row before, from the smallest cache to the largest."""
    front: list[ParetoRow] = []
    for row in sorted(rows, key=lambda row: (row.costs.cache_gib, -row.kept_share)):
        if not front or row.kept_share > front[-1].kept_share:
            front.append(row)
    return front


def _shares(row: ParetoRow) -> tuple[float, ...]:
    """The kept share and the ends of its interval."""
    return (row.kept_share, *(row.kept_interval or ()))


def _number_points(
    rows: Sequence[ParetoRow], stored: Callable[[Costs], float], ax: Axes, room: float
) -> None:
    """Write the number of FA heads beside each point that has ``room`` for it."""
    last = -math.inf
    for x, row in sorted(((stored(row.costs), row) for row in rows), key=lambda item: item[0]):
        if x - last < room:
            continue
        last = x
        ax.annotate(
            str(row.costs.num_fa_heads), (x, 100 * row.kept_share), xytext=(5, -10),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip


def _draw_rows(
    rows: Sequence[ParetoRow],
    stored: Callable[[Costs], float],
    ax: Axes,
    label: str,
    colour: str,
    opacity: float = 1.0,
) -> None:
    if not rows:
        return
    style: dict[str, Any] = {"color": colour, "alpha": opacity}
    for row in rows:
        if row.kept_interval is not None:
            low, high = row.kept_interval
            x = stored(row.costs)
            ax.plot([x, x], [100 * low, 100 * high], linewidth=1.2, zorder=2, **style)
    ax.plot(
        [stored(row.costs) for row in rows], [100 * row.kept_share for row in rows],
        "D" if colour == FA_COLOUR else "o", markersize=6 if colour == FA_COLOUR else 5,
        markeredgewidth=0, zorder=3, label=label, **style,
    )  # fmt: skip


def _add_share_scale(teacher: float, ax: Axes) -> None:
    def share(stored: Any) -> Any:
        return 100 * stored / teacher

    def stored(share: Any) -> Any:
        return share * teacher / 100

    scale = ax.secondary_xaxis("top", functions=(share, stored))
    scale.set_xlabel("share of the teacher's (%)")
