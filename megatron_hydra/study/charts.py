"""The picture of a question: retrieval by length, and against what a sequence stores, or training.

Legend: a = arms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_hydra.report.chart_style import MUTED, PALETTE, plain_text
from megatron_hydra.report.units import byte_unit, format_length
from megatron_hydra.study.config import StudyConfig

if TYPE_CHECKING:
    from megatron_hydra.study.figures import ArmFigures

_MARKERS = "osD^vP"
Styles = Sequence[Mapping[str, Any]]


def question_figure(study: StudyConfig, figures: Sequence[ArmFigures]) -> Figure:
    """Two panels: accuracy by length, the mean over tasks, thin for each run; and what it costs.

    The second has the mean beyond the training length against the cache of the longest sequence,
    small for each run. Where arms differ in nothing but tokens, it has loss and divergence against
    these.

    Args:
        study: Its tasks and lengths.
        figures: [a], of arms that have results.
    """
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    by_tokens = _differ_in_tokens(study, figures)
    left, right = figure.subplots(1, 2, sharey=not by_tokens)
    styles = [_style(index, len(figures)) for index in range(len(figures))]
    for each, style in zip(figures, styles, strict=True):
        for run in each.runs if len(each.runs) > 1 else ():
            left.plot(study.lengths, _shares(study, run), color=style["color"], linewidth=0.6)
        width, name = style["markersize"] / 3, plain_text(each.name)
        left.plot(study.lengths, _shares(study, each), label=name, linewidth=width, **style)
    _label(left, study.data.length)
    (_draw_tokens if by_tokens else _draw_stored)(right, study, figures, styles)
    figure.legend(loc="outside right center")
    return figure


def _style(index: int, num_arms: int) -> Mapping[str, Any]:
    """Smaller from arm to arm: arms that lie upon one another are all seen."""
    return {
        "color": PALETTE[index % len(PALETTE)],
        "marker": _MARKERS[index // len(PALETTE) % len(_MARKERS)],
        "markersize": 4 + 5 * (1 - index / num_arms),
    }


def _shares(study: StudyConfig, figures: ArmFigures) -> list[float]:
    """Right prompts by length in %, the mean over tasks."""
    by_task = [figures.accuracy(task) for task in study.evaluation.tasks]
    return [100 * mean(of[length] for of in by_task) for length in study.lengths]


def _differ_in_tokens(study: StudyConfig, figures: Sequence[ArmFigures]) -> bool:
    """Whether arms differ in how long they train, in all stages, and in nothing else."""
    arms = [study.arms[each.name] for each in figures]
    like = [replace(arm, about="", tokens={}, replicates=1, budgets=None) for arm in arms]
    if any(0 in arm.tokens.values() for arm in arms) or any(arm != like[0] for arm in like):
        return False
    return len({each.tokens for each in figures}) > 1


def _draw_stored(
    ax: Axes, study: StudyConfig, figures: Sequence[ArmFigures], styles: Styles
) -> None:
    longest, above = max(study.lengths), study.retrieval_above

    def stored(each: ArmFigures) -> float:
        cache, state = each.cache
        return cache * longest + state

    unit, unit_bytes = byte_unit(max(map(stored, figures)))
    for each, style in zip(figures, styles, strict=True):
        small = {**style, "markersize": 2}
        for one, marked in ((each, style), *((run, small) for run in each.runs)):
            found = ([stored(one) / unit_bytes], [100 * one.retrieval(above)])
            ax.plot(*found, linestyle="none", **marked)
    ax.set_xlabel(f"cache and state at {longest:,} tokens ({unit})")
    ax.set_title("mean beyond the training length", loc="left", fontsize=9)


def _draw_tokens(
    ax: Axes, study: StudyConfig, figures: Sequence[ArmFigures], styles: Styles
) -> None:
    """Loss and divergence: a line joins what the same teacher and seed have of several arms."""
    by_pair: dict[tuple[str, int], list[tuple[ArmFigures, Mapping[str, Any]]]] = {}
    for each, style in sorted(zip(figures, styles, strict=True), key=lambda both: both[0].tokens):
        for run in each.runs:
            pair = (run.results[0].teacher, run.results[0].seed)
            by_pair.setdefault(pair, []).append((run, style))
    for found in by_pair.values():
        tokens = [run.tokens for run, _ in found]
        losses = [run.loss_nats for run, _ in found]
        divergences = [run.divergence_nats for run, _ in found]
        for values, dashes in ((losses, "-"), (divergences, "--")):
            ax.plot(tokens, values, color=MUTED, linewidth=0.8, linestyle=dashes)
            for x, y, (_, style) in zip(tokens, values, found, strict=True):
                ax.plot([x], [y], **{**style, "markersize": 5})
    ax.set_ylim(bottom=0)
    ax.set_xlabel("tokens of training (millions)")
    ax.set_title("loss (line) and KL (dashed), in nats", loc="left", fontsize=9)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}")


def _label(ax: Axes, length: int) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: format_length(value))
    ax.axvline(length, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    ax.set_ylim(-3, 103)
    ax.set_xlabel("prompt and answer (tokens)")
    ax.set_ylabel("right (%)")
