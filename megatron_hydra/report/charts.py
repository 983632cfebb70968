"""The report's charts of training runs and of memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from megatron_hydra.report.chart_style import INK, MUTED, PALETTE, plain_text
from megatron_hydra.report.training_runs import Curve, RecordedRun
from megatron_hydra.report.units import format_bytes, format_length, format_plain

_MAX_POINTS = 600
_MAX_DOTS = 40


def draw_losses(run: RecordedRun) -> Figure:
    """The run's losses by step; the layers of an alignment loss thin, below the sum.

    Those on held-out samples are dashed: of several losses in the colour of the loss.
    """
    figure, ax = _panel("loss")
    layers, parts, held_out = run.layer_alignment, run.loss_parts, run.validation_parts
    for (title, curve), colour in zip(parts.items(), PALETTE, strict=False):
        _plot_noisy(ax, curve, INK if layers else colour, "all layers" if layers else title)
    colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.92, len(layers)))
    for index, (curve, colour) in enumerate(zip(layers, colours, strict=True)):
        label = f"layer {index}" if index in (0, len(layers) - 1) else None
        _plot(ax, curve, colour, linewidth=0.9, alpha=0.9, label=label)
    _plot_held_out(ax, dict(zip(parts, PALETTE, strict=False)), held_out)
    for step in run.skipped_steps:
        ax.axvline(step, color=MUTED, linewidth=0.7, linestyle=(0, (2, 2)), zorder=0)
    values = np.concatenate(
        [curve.values for curve in (*layers, *parts.values(), *held_out.values())]
    )
    values = values[np.isfinite(values)]
    if values.min() > 0 and values.max() > 10 * values.min():
        _set_log_scale(ax, values.max() / values.min())
    ax.set_ylabel("mean squared error" if list(parts) == ["alignment"] else "nats per token")
    num_entries = len(ax.get_legend_handles_labels()[0])
    ax.legend(
        loc="lower right", bbox_to_anchor=(1.03, 1.01), ncols=2 if num_entries == 4 else 3,
        handlelength=1.6 if held_out else 1.0, handletextpad=0.4, columnspacing=1.0,
        borderaxespad=0.0,
    )  # fmt: skip
    return figure


def draw_curve(
    curve: Curve, title: str, unit: str, from_zero: bool = False, of_teacher: float | None = None
) -> Figure:
    """One scalar of a run by step; what its teacher has, where that is given, as a dashed line."""
    figure, ax = _panel(title)
    _plot_noisy(ax, curve, PALETTE[0], None)
    ax.set_ylabel(unit)
    if of_teacher is not None:
        ax.axhline(of_teacher, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label="teacher")
        ax.legend(
            loc="lower right", bbox_to_anchor=(1.03, 1.01), borderaxespad=0.0, handlelength=1.6,
            handletextpad=0.4,
        )  # fmt: skip
    if from_zero:
        ax.set_ylim(0, 1.08 * max(float(np.nanmax(curve.values)), of_teacher or 0.0) or 1.0)
    return figure


def draw_cache(
    lines: Sequence[tuple[str, float, float]],
    ends: tuple[int, int],
    dtype: str,
    training_length: int | None = None,
) -> Figure:
    """Memory of one sequence by its length.

    Args:
        lines: Name, bytes per token, constant bytes.
        ends: Of the axis, in tokens.
        dtype: Number format of the cache, named at the axis.
        training_length: Where the teacher was trained, in tokens; marked, where it is known.
    """
    figure = Figure(figsize=(6.2, 3.0))
    ax = figure.add_subplot()
    lengths = np.geomspace(*ends, 200)
    # Broken lines above a solid one: lines that lie on each other stay visible.
    dashes = ("-", (0, (5, 2)), (0, (1, 1.5)), "-.", (0, (3, 1, 1, 1)), (0, (8, 2)))
    for index, (name, per_token, constant) in enumerate(lines):
        again, place = divmod(index, len(PALETTE))  # past the last colour: other dashes
        ax.plot(
            lengths, per_token * lengths + constant, color=PALETTE[place], linewidth=1.8,
            linestyle=dashes[(place + again) % len(dashes)], label=plain_text(name),
        )  # fmt: skip
    if training_length is not None:
        ax.axvline(training_length, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        ax.annotate(
            "training length", (training_length, 1), xycoords=("data", "axes fraction"),
            xytext=(4, -2), textcoords="offset points", va="top", color="#52606d", fontsize=8.5,
        )  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: format_length(value))
    ax.yaxis.set_major_formatter(lambda value, _: format_bytes(value))
    ax.set_xlabel("sequence length (tokens)")
    ax.set_ylabel(f"cache ({dtype}) and state of one sequence")
    ax.legend(loc="lower right")
    return figure


def draw_gpu_hours(
    lines: Mapping[str, Sequence[float | None]], contexts: Sequence[int], title: str
) -> Figure:
    """Predicted GPU-hours of a training by the length of its sequences, log-log.

    Args:
        lines: By name, GPU-hours at each context; None leaves a gap.
        contexts: In tokens.
        title: Above it.
    """
    figure = Figure(figsize=(6.2, 3.4))
    ax = figure.add_subplot()
    # Broken lines above a solid one, as in :func:`draw_cache`.
    dashes = ("-", (0, (5, 2)), (0, (1, 1.5)))
    for (name, hours), colour, dash in zip(lines.items(), PALETTE, dashes, strict=False):
        values = [math.nan if each is None else each for each in hours]
        ax.plot(contexts, values, marker="o", markersize=3.5, color=colour, linestyle=dash,
                linewidth=1.8, label=plain_text(name))  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(contexts)
    ax.xaxis.set_major_formatter(lambda value, _: format_length(value))
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(lambda value, _: format_plain(value))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("context, tokens")
    ax.set_ylabel("GPU-hours, predicted")
    ax.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
    ax.legend(loc="upper left")
    return figure


def _plot_held_out(ax: Axes, colours: dict[str, str], curves: dict[str, Curve]) -> None:
    """Losses on held-out samples: each point as it was measured, one entry in the legend."""
    if not curves:
        return
    num_points = max(len(curve.steps) for curve in curves.values())
    style: dict[str, Any] = {
        "linestyle": (0, (3, 1.5)), "linewidth": 1.2, "markersize": 4, "markeredgecolor": "white",
        "markeredgewidth": 0.6, "marker": "o" if num_points <= _MAX_DOTS else None,
    }  # fmt: skip
    own = len(colours) > 1  # else the curve would be as its training's
    for title, curve in curves.items():
        there = np.isfinite(curve.values)
        colour = colours[title] if own else PALETTE[1]
        ax.plot(*_thin(curve.steps[there], curve.values[there]), color=colour, **style)
    ax.plot([], [], color=MUTED if own else PALETTE[1], label="validation", **style)


def _panel(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.7, 2.7))
    ax = figure.add_subplot()
    ax.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: format_plain(value))
    return figure, ax


def _set_log_scale(ax: Axes, ratio: float) -> None:
    """A logarithmic loss, with 2 and 5 numbered too where it spans few powers of ten."""
    ax.set_yscale("log")
    ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    ax.yaxis.set_major_formatter(lambda value, _: format_plain(value))
    ax.yaxis.set_minor_formatter(
        NullFormatter() if ratio > 1e3 else lambda value, _: format_plain(value)
    )


def _plot_noisy(ax: Axes, curve: Curve, colour: str, label: str | None) -> None:
    """Every step thin and pale, the running mean on top."""
    ax.plot(*_thin(curve.steps, curve.values), color=colour, linewidth=0.7, alpha=0.3)
    _plot(ax, curve, colour, linewidth=1.6, label=label)


def _plot(ax: Axes, curve: Curve, colour: object, **style: Any) -> None:
    """The running mean; a single point, of which no line can be drawn, as a dot."""
    steps, mean = _smooth(curve)
    ax.plot(steps, mean, color=colour, marker="o" if len(steps) == 1 else None, **style)


def smoothing_window(num_points: int) -> int:
    """Points in the running mean: a fiftieth of the run, odd; gaps count as points."""
    return num_points // 50 // 2 * 2 + 1


def _smooth(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    window = smoothing_window(len(curve.values))
    half = window // 2
    is_there = np.isfinite(curve.values)
    sums = np.convolve(np.where(is_there, curve.values, 0.0), np.ones(window), mode="valid")
    counts = np.convolve(is_there.astype(float), np.ones(window), mode="valid")
    mean = np.where(counts > 0.5, sums / np.maximum(counts, 1.0), np.nan)
    return _thin(curve.steps[half : len(curve.steps) - half], mean)


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most ``_MAX_POINTS`` of the points, the last one kept: a page must stay small."""
    stride = -(-len(steps) // _MAX_POINTS)
    keep = slice((len(steps) - 1) % stride, None, stride)
    return steps[keep], values[keep]
