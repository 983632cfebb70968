"""Score against rank: which heads stand out, which are noise, and where the budget cuts.

Legend: h = heads of the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import NDArray

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.report.chart_style import FA_COLOUR, INK, LA_COLOUR, MUTED
from megatron_hydra.selection.combination import Array
from megatron_hydra.selection.explanation import Explanation
from megatron_hydra.selection.policy import read_explanation
from megatron_hydra.selection.scores import HeadScores
from megatron_hydra.selection.uncertainty import (
    above_noise_floor,
    bootstrap_scores,
    carries_uncertainty,
    score_intervals,
)

_RANK_TICKS = (1, 5, 10, 20, 50, 100, 200, 400, 800, 1600, 3200)
_SAME_SCORE = 1e-6
_DASHES = (0, (4, 3))
# Why a head that stands behind the budget by its score is FA.
_REASONS = {"constraint": "by a constraint", "random": "by lot, behind the budget"}


class Ranking(NamedTuple):
    """The heads from the highest score to the lowest, ordered as the policy orders them.

    Attributes:
        heads: Layer and head, [h, 2] whole numbers.
        scores: [h].
        intervals: 95% interval of each score, [h, 2]; None where each sub-probe has one pair.
        is_above: Whether a head is above the noise floor, bool [h].
        is_fa: Whether the plan keeps its full attention, bool [h].
        reasons: By the plan's file why it has heads that stand behind the budget by their score:
            reason -> bool [h]; the reason is empty if the plan's file tells none.
    """

    heads: NDArray[np.intp]
    scores: Array
    intervals: Array | None
    is_above: NDArray[np.bool_]
    is_fa: NDArray[np.bool_]
    reasons: Mapping[str, NDArray[np.bool_]]

    @property
    def num_fa_heads(self) -> int:
        """The budget."""
        return int(self.is_fa.sum())

    @property
    def threshold(self) -> float:
        """The lowest score within the budget if scores alone choose; infinite without budget."""
        return float(self.scores[self.num_fa_heads - 1]) if self.num_fa_heads else math.inf


def rank_heads(scores: HeadScores, plan: HeadPlan) -> Ranking:
    """Order the heads by score, then by the size of their effect, then by layer and head.

    Raises:
        UserError: If ``plan`` was made of other scores.
    """
    explanation = read_explanation(plan)
    if explanation is not None:
        _check_scores(scores, explanation)
    order = scores.ranked_heads
    intervals = None
    if carries_uncertainty(scores):
        limits = score_intervals(bootstrap_scores(scores))
        intervals = np.stack([limit.ravel()[order] for limit in limits], axis=-1)
    heads = np.stack(np.unravel_index(order, scores.scores.shape), axis=-1)
    kinds = np.array([layer.kinds for layer in plan.layers]).ravel()[order]
    return Ranking(
        heads=heads,
        scores=scores.scores.ravel()[order],
        intervals=intervals,
        is_above=above_noise_floor(scores).ravel()[order],
        is_fa=kinds == "fa",
        reasons=_reasons(plan, explanation, heads),
    )


def draw_ranking(ranking: Ranking, ax: Axes) -> None:
    """Draw score against rank with the budget and the score at which it cuts.

    Both scales are square roots: few heads matter, and the cut is among the many others.
    """
    ranks = np.arange(1, len(ranking.scores) + 1)
    if ranking.intervals is not None:
        colours = [FA_COLOUR if is_fa else LA_COLOUR for is_fa in ranking.is_fa]
        lower, upper = ranking.intervals.T
        ax.vlines(ranks, lower, upper, colors=colours, linewidth=0.9, alpha=0.45, zorder=2)
    for label, chosen, style in _point_kinds(ranking):
        if chosen.any():
            ax.plot(
                ranks[chosen], ranking.scores[chosen], linestyle="none", zorder=3,
                markeredgewidth=0.9, clip_on=False, label=f"{label} ({chosen.sum()})", **style,
            )  # fmt: skip
    _set_root_scales(ranking, ax)
    if ranking.num_fa_heads:
        _draw_budget(ranking, ax)
    ax.set_xlabel("rank of the head by its score (square-root scale)")
    ax.set_ylabel("score (square-root scale)")
    ax.legend(
        loc="lower left", bbox_to_anchor=(0.0, 1.06), ncols=2, handletextpad=0.4, borderpad=0.2
    )


def rank_figure(scores: HeadScores, plan: HeadPlan) -> Figure:
    """A figure with :func:`draw_ranking`."""
    figure = Figure(figsize=(7.4, 3.8), layout="constrained")
    draw_ranking(rank_heads(scores, plan), figure.add_subplot())
    return figure


def _point_kinds(ranking: Ranking) -> list[tuple[str, NDArray[np.bool_], dict[str, Any]]]:
    """Label, heads and marker of each kind of head; a head may be of several."""
    kinds: list[tuple[str, NDArray[np.bool_], dict[str, Any]]] = []
    for name, chosen, colour in (
        ("full attention", ranking.is_fa, FA_COLOUR),
        ("other heads", ~ranking.is_fa, LA_COLOUR),
    ):
        filled = {"marker": "o", "markersize": 4.2, "color": colour}
        if ranking.intervals is None:
            kinds.append((name, chosen, filled))
            continue
        hollow = {**filled, "markersize": 3.6, "markerfacecolor": "white"}
        kinds.append((f"{name}, above noise floor", chosen & ranking.is_above, filled))
        kinds.append((f"{name}, below noise floor", chosen & ~ranking.is_above, hollow))
    for reason, chosen in ranking.reasons.items():
        words = _REASONS.get(reason, "for another reason than score")
        ring = {"markersize": 6.5, "markerfacecolor": "none", "markeredgecolor": INK}
        kinds.append((f"full attention {words}", chosen, {"marker": "D", **ring}))
    return kinds


def _check_scores(scores: HeadScores, explanation: Explanation) -> None:
    """Refuse a plan that was made of other scores: its reasons would not be theirs."""
    planned = np.array(explanation.scores)
    if planned.shape != scores.scores.shape or not np.allclose(
        planned, scores.scores, rtol=0.0, atol=_SAME_SCORE
    ):
        raise UserError(
            "the plan was made of other head scores than these: its file tells a score of each "
            "head, and they differ (another scores file, or another combination of it)"
        )


def _reasons(
    plan: HeadPlan, explanation: Explanation | None, heads: NDArray[np.intp]
) -> dict[str, NDArray[np.bool_]]:
    """See :class:`Ranking`; ``heads`` are ranked."""
    told = {} if explanation is None else {(h.layer, h.head): h.reason for h in explanation.heads}
    reasons: dict[str, NDArray[np.bool_]] = {}
    for index in range(plan.num_fa_heads, len(heads)):
        layer, head = heads[index]
        if plan.layers[layer].kinds[head] == "fa":
            reason = told.get((layer, head), "")
            reasons.setdefault(reason, np.zeros(len(heads), dtype=bool))[index] = True
    return reasons


def _set_root_scales(ranking: Ranking, ax: Axes) -> None:
    def root(values: Array) -> Array:
        return np.sqrt(np.maximum(values, 0.0))

    tops = ranking.scores if ranking.intervals is None else ranking.intervals[:, 1]
    num_heads = len(ranking.scores)
    ax.set_xscale("function", functions=(root, np.square))
    ax.set_yscale("function", functions=(root, np.square))
    ax.set_xlim(0.4, 1.02 * num_heads)
    ax.set_ylim(0.0, 1.05 * float(tops.max()) or 1.0)
    ticks = [tick for tick in _RANK_TICKS if tick < 0.85 * num_heads]
    ax.xaxis.set_major_locator(FixedLocator([*ticks, num_heads]))
    ax.xaxis.set_minor_locator(NullLocator())


def _draw_budget(ranking: Ranking, ax: Axes) -> None:
    line: dict[str, Any] = {"color": MUTED, "linewidth": 1.0}
    ax.axvline(ranking.num_fa_heads + 0.5, **line)
    ax.axhline(ranking.threshold, linestyle=_DASHES, label="lowest score within the budget", **line)
    place: dict[str, Any] = {"textcoords": "offset points", "va": "bottom", "color": MUTED}
    ax.annotate(
        f"budget: {ranking.num_fa_heads} heads", (ranking.num_fa_heads + 0.5, 1.0),
        xycoords=("data", "axes fraction"), xytext=(0, 3), ha="center", **place,
    )  # fmt: skip
    ax.annotate(
        f"cut at score {ranking.threshold:.3g}", (1.0, ranking.threshold),
        xycoords=("axes fraction", "data"), xytext=(0, 2), ha="right", **place,
    )  # fmt: skip
