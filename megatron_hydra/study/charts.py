"""The picture of a question: retrieval by length, and against what a sequence stores or took."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_hydra.report.chart_style import MUTED, PALETTE, plain_text
from megatron_hydra.report.units import byte_unit, format_length
from megatron_hydra.study.config import StudyConfig

if TYPE_CHECKING:
    from megatron_hydra.study.page import ArmFigures

_MARKERS = "osD^vP"


def question_figure(study: StudyConfig, figures: Sequence[ArmFigures]) -> Figure:
    """Two panels: accuracy by length, the mean over tasks; and the mean beyond the training length.

    The second is drawn against the cache of the longest sequence, or, where arms differ in nothing
    but tokens, against these.

    Args:
        study: Its tasks and lengths.
        figures: Arms that have results.
    """
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    longest = max(study.lengths)
    costs = [cache * longest + state for cache, state in (each.cache for each in figures)]
    unit, unit_bytes = byte_unit(max(costs))
    by_tokens = len(set(costs)) == 1 and len({each.tokens for each in figures}) > 1
    for index, (each, cost) in enumerate(zip(figures, costs, strict=True)):
        # Smaller from arm to arm: arms that lie upon one another are all seen.
        below = 1 - index / len(figures)
        style = {
            "color": PALETTE[index % len(PALETTE)],
            "marker": _MARKERS[index // len(PALETTE) % len(_MARKERS)],
            "markersize": 4 + 5 * below,
        }
        by_task = [each.accuracy(task) for task in study.evaluation.tasks]
        means = [100 * mean(of[length] for of in by_task) for length in study.lengths]
        left.plot(
            study.lengths, means, label=plain_text(each.name), linewidth=1 + 3 * below, **style
        )
        x = each.tokens if by_tokens else cost / unit_bytes
        right.plot([x], [100 * each.retrieval(study.retrieval_above)], linestyle="none", **style)
    _label(left, study.data.length)
    stored = f"cache and state at {longest:,} tokens ({unit})"
    right.set_xlabel("tokens of training" if by_tokens else stored)
    right.set_title("mean beyond the training length", loc="left", fontsize=9)
    if by_tokens:
        right.xaxis.set_major_formatter(lambda value, _: format_length(value))
        right.locator_params(axis="x", nbins=4)
    figure.legend(loc="outside right center")
    return figure


def _label(ax: Axes, length: int) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: format_length(value))
    ax.axvline(length, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    ax.set_ylim(-3, 103)
    ax.set_xlabel("prompt and answer (tokens)")
    ax.set_ylabel("right (%)")
