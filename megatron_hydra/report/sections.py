"""The sections of the report as HTML: figures, tables, provenance. All names are escaped."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import yaml

from megatron_hydra.evaluation.results import (
    Accuracy,
    Cell,
    Evaluation,
    ModelResult,
    NeedleGrid,
    format_perplexity,
)
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.report.chart_style import to_svg
from megatron_hydra.report.charts import draw_cache, draw_curve, draw_losses, smoothing_window
from megatron_hydra.report.training_runs import TrainingRun
from megatron_hydra.selection.cost import state_format

_MIXED_FORMATS = (
    "The evaluation's file is of an earlier release, which counted the cache of each model in the "
    "number format of its weights, and from the head scores these cannot be counted anew: "
    "<code>megatron-hydra evaluate</code> counts all models in one format."
)
_MAX_SKIPPED = 8
"""Skipped steps that are named one by one."""
_TASK_NAMES = {"single": "Single needle", "multi_key": "Multi-key needle"}


def escape(value: object) -> str:
    """``value`` as HTML text, quotes included."""
    return html.escape(str(value))


def task_name(task: str) -> str:
    """The task as the page writes it."""
    return _TASK_NAMES.get(task, task.replace("_", " ").capitalize())


def section(title: str, body: str) -> str:
    """A section of the page."""
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>\n"


def figure(svg: str, caption: str = "") -> str:
    """A figure with its caption, both HTML."""
    note = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure>{svg}{note}</figure>"


def tiles(evaluation: Evaluation) -> str:
    """The headline accuracy of each model, large."""
    task, length = evaluation.headline_cell
    cards = []
    for model in evaluation.models:
        low, high = model.accuracy[task, length].interval
        cards.append(
            f'<div class="tile"><div class="big">{100 * model.accuracy[task, length].value:.1f}'
            f"<small>%</small></div><div>{escape(model.name)}</div>"
            f'<div class="muted">95% interval {100 * low:.1f} to {100 * high:.1f}</div></div>'
        )
    head = f"{task_name(task)} at {length:,} tokens, accuracy"
    return f'<h3>{escape(head)}</h3><div class="tiles">{"".join(cards)}</div>'


def plan_table(plan: HeadPlan) -> str:
    """FA heads and stored query groups of each layer."""
    rows = [
        [
            str(index),
            ", ".join(map(str, layer.fa_heads)) or "none",
            f"{len(layer.fa_heads)} of {plan.num_heads}",
            f"{len(plan.fa_groups(index))} of {plan.num_query_groups}",
        ]
        for index, layer in enumerate(plan.layers)
    ]
    head = ["Layer", "FA heads", "Count", "Query groups with a cache"]
    return details("The plan as a table", table(head, rows, numeric=False))


def evaluation_table(evaluation: Evaluation) -> str:
    """Models by tasks and lengths, the best of each column marked, then perplexity."""
    models = evaluation.models
    by_task = [(task, list(cells)) for task, cells in groupby(evaluation.cells, lambda c: c[0])]
    lengths = sorted(models[0].loss_nats)
    top = ['<th rowspan="2" scope="col" class="name">Model</th>']
    top += [
        f'<th colspan="{len(cells)}" scope="colgroup">{escape(task_name(task))}, %</th>'
        for task, cells in by_task
    ]
    if lengths:
        top.append(f'<th colspan="{len(lengths)}" scope="colgroup">Perplexity</th>')
    second = [
        f"<th>{length:,}<small>{_multiple(length, evaluation.training_length)}<br>"
        f"{_samples(models, (task, length))}</small></th>"
        for task, cells in by_task
        for task, length in cells
    ]
    second += [
        f"<th>{length:,}<small>{_multiple(length, evaluation.training_length)}<br>lower is better"
        "</small></th>"
        for length in lengths
    ]
    body = "".join(_evaluation_row(model, models, lengths) for model in models)
    note = (
        "Accuracy and perplexity by length, in tokens and in training lengths; n samples each. "
        "Small figures: Wilson's 95% interval. Shaded and bold: best of the column."
    )
    return (
        f'<div class="scroll"><table class="results"><thead><tr>{"".join(top)}</tr>'
        f"<tr>{''.join(second)}</tr></thead><tbody>{body}</tbody></table></div>"
        f'<p class="muted">{note}</p>'
    )


def _evaluation_row(
    model: ModelResult, models: Sequence[ModelResult], lengths: Sequence[int]
) -> str:
    cells = [f'<th scope="row" class="name">{escape(model.name)}{_model_note(model)}</th>']
    for cell, accuracy in model.accuracy.items():
        best = max(other.accuracy[cell].value for other in models)
        cells.append(_result(f"{100 * accuracy.value:.1f}", accuracy.value == best, accuracy))
    for length in lengths:
        best = min(other.loss_nats[length] for other in models)
        loss = model.loss_nats[length]
        cells.append(_result(format_perplexity(loss), loss == best))
    return f"<tr>{''.join(cells)}</tr>"


def _result(text: str, is_best: bool, accuracy: Accuracy | None = None) -> str:
    interval = ""
    if accuracy is not None:
        low, high = accuracy.interval
        interval = f"<small>{100 * low:.1f}–{100 * high:.1f}</small>"
    mark = ' class="best"' if is_best else ""
    return f"<td{mark}>{text}{interval}</td>"


def _model_note(model: ModelResult) -> str:
    return f"<small>{model.num_fa_heads} of {model.num_heads} heads FA</small>"


def _multiple(length: int, training_length: int) -> str:
    return f"{length / training_length:g}×"


def _samples(models: Sequence[ModelResult], cell: Cell) -> str:
    counts = [model.accuracy[cell].num_samples for model in models]
    low, high = min(counts), max(counts)
    return f"n = {low}" if low == high else f"n = {low}–{high}"


def needle_grids(evaluation: Evaluation) -> str:
    """Length by depth for each model, side by side."""
    grids = "".join(
        f"<div><h3>{escape(model.name)}</h3>{_grid_table(model.grid, evaluation.training_length)}"
        "</div>"
        for model in evaluation.models
    )
    task = task_name(evaluation.models[0].grid.task)
    key = "".join(_shade(value / 4, f"{25 * value}") for value in range(5))
    return (
        f"<p>{escape(task)}: accuracy in % by length (columns, tokens) and depth of the needle "
        "(rows, share of the text before it). Right of the line: longer than in training.</p>"
        f'<table class="grid key"><tr>{key}</tr></table><div class="grids">{grids}</div>'
    )


def _grid_table(grid: NeedleGrid, training_length: int) -> str:
    def past(index: int) -> bool:
        """Whether the first length past the training length stands at ``index``."""
        return index > 0 and grid.lengths[index - 1] <= training_length < grid.lengths[index]

    head = "".join(
        f"<th{' class=past' if past(i) else ''}>{length:,}</th>"
        for i, length in enumerate(grid.lengths)
    )
    rows = ""
    for j, depth in enumerate(grid.depths):
        cells = "".join(
            _shade(row[j], f"{100 * row[j]:.0f}", past(i)) for i, row in enumerate(grid.accuracy)
        )
        rows += f'<tr><th scope="row">{round(100 * depth, 1):g}%</th>{cells}</tr>'
    return f'<table class="grid"><tr><td></td>{head}</tr>{rows}</table>'


def _shade(value: float, text: str, is_past: bool = False) -> str:
    """A cell on a ramp of one hue, which every reader sees as light to dark."""
    low, high = (242, 246, 250), (8, 72, 122)
    red, green, blue = (round(a + (b - a) * value) for a, b in zip(low, high, strict=True))
    ink = "#fff" if value > 0.5 else "#1f2933"
    mark = " class=past" if is_past else ""
    return f'<td{mark} style="background:rgb({red},{green},{blue});color:{ink}">{text}</td>'


def cache_section(evaluation: Evaluation) -> str:
    """Bytes a token, constant state, and the length from which the hybrid needs less."""
    teacher, dtype = evaluation.teacher, evaluation.serve_dtype
    if dtype is None:
        return f"<p>{_MIXED_FORMATS}</p>"
    rows: list[list[str]] = []
    names: dict[tuple[float, float], list[str]] = {}
    for model in evaluation.models:
        rows.append(
            [
                escape(model.name),
                f"{model.num_fa_heads} of {model.num_heads}",
                f"{model.cache_bytes_per_token:,.0f}",
                f"{100 * model.cache_bytes_per_token / teacher.cache_bytes_per_token:.0f}%",
                f"{model.state_bytes:,.0f}",
                _crossover(model, teacher),
            ]
        )
        names.setdefault((model.cache_bytes_per_token, model.state_bytes), []).append(model.name)
    head = [
        "Model", "FA heads", f"Cache, bytes a token ({dtype})", "of the teacher's",
        f"State, bytes a sequence ({state_format(dtype)})", "Smaller from, tokens",
    ]  # fmt: skip
    crossings = [crossover_tokens(model, teacher) for model in evaluation.models]
    finite = [length for length in crossings if length is not None]
    longest = max(evaluation.training_length * 64, 4 * max(finite, default=0))
    lines = [("; ".join(equal), *need) for need, equal in names.items()]
    chart = to_svg(
        draw_cache(lines, evaluation.training_length, longest, dtype), "cache", "memory by length"
    )
    caption = (
        f"Cache, served in {dtype}, and state of one sequence by its length. “Smaller from” is "
        "the shortest length at which a hybrid needs less than the teacher."
    )
    return f"{table(head, rows)}{figure(chart, caption)}"


def crossover_tokens(model: ModelResult, teacher: ModelResult) -> int | None:
    """Shortest length at which ``model`` needs less than the teacher; None if never."""
    saved = teacher.cache_bytes_per_token - model.cache_bytes_per_token
    if model.kind == "teacher" or saved <= 0:
        return None
    return math.floor(model.state_bytes / saved) + 1


def _crossover(model: ModelResult, teacher: ModelResult) -> str:
    if model.kind == "teacher":
        return "–"
    length = crossover_tokens(model, teacher)
    return "never" if length is None else f"{length:,}"


def training_section(runs: Sequence[TrainingRun]) -> str:
    """Loss, gradient norm and throughput of each run."""
    return "".join(_run_charts(run, f"run{index}") for index, run in enumerate(runs))


def _run_charts(run: TrainingRun, name: str) -> str:
    speed = run.curves["train/tokens_per_s"]
    figures = [
        (draw_losses(run), "loss"),
        (draw_curve(run.curves["train/grad_norm"], "gradient norm", "L2 norm", True), "norm"),
        (draw_curve(speed, "throughput", "tokens / s", True), "speed"),
    ]
    svgs = "".join(
        figure(to_svg(chart, f"{name}-{kind}", f"{kind} of {escape(run.name)}"))
        for chart, kind in figures
    )
    losses = "; ".join(
        f"{title} {_first(curve.values):.4g} → {_final(curve.values):.4g}"
        for title, curve in run.loss_parts.items()
    )
    steps = int(next(iter(run.loss_parts.values())).steps[-1])
    window = smoothing_window(len(speed.steps))
    smooth = f"; thick: running mean of {window} points" if window > 1 else ""
    facts = f"up to step {steps:,}; {losses}{smooth}{_skipped(run.skipped_steps)}"
    config = details("Resolved configuration", f"<pre>{escape(run.config_yaml)}</pre>")
    return (
        f'<h3>{escape(run.name)}</h3><p class="muted">{escape(facts)}</p>'
        f'<div class="charts">{svgs}</div>{config}'
    )


def _final(values: Any) -> float:
    """Mean of the last fiftieth of a curve: one step's loss is a noisy figure."""
    there = values[np.isfinite(values)]
    return float(there[-smoothing_window(len(values)) :].mean())


def _first(values: Any) -> float:
    return float(values[np.isfinite(values)][0])


def _skipped(steps: Sequence[int]) -> str:
    """`; 3 steps skipped for NaN or Inf (5, 8, 9), marked by broken lines`, or nothing."""
    if not steps:
        return ""
    shown = ", ".join(f"{step:,}" for step in steps[:_MAX_SKIPPED])
    more = f" and {len(steps) - _MAX_SKIPPED} more" if len(steps) > _MAX_SKIPPED else ""
    noun = "step" if len(steps) == 1 else "steps"
    return f"; {len(steps)} {noun} skipped for NaN or Inf ({shown}{more}), marked by broken lines"


def provenance_section(
    sources: Mapping[str, Mapping[str, Any]], runs: Sequence[TrainingRun], command: str
) -> str:
    """Commands, versions and seeds of every input, and each provenance record in full."""
    own = {
        name: {key: value for key, value in record.items() if key != "models"}
        for name, record in sources.items()
    }
    seeds = {name: _find_seeds(record) for name, record in own.items()}
    seeds |= {run.name: _find_seeds(run.config) for run in runs}
    sources = {**sources, **{run.name: run.provenance for run in runs}}
    commands = {name: _command(record) for name, record in sources.items()}
    for name, origin in sources.get("evaluation", {}).get("models", {}).items():
        for part in ("plan", "weights"):
            if part in origin:
                commands[f"{name}: {part}"] = _command(origin[part])
    commands["report"] = command
    known = [[escape(name), f"<code>{escape(text)}</code>"] for name, text in commands.items()]
    seed_rows = [[escape(name), escape(found or "none recorded")] for name, found in seeds.items()]
    records = "".join(
        details(f"Provenance: {name}", f"<pre>{escape(_as_yaml(record))}</pre>")
        for name, record in sources.items()
    )
    return (
        f"<h3>Commands</h3>{table(['Output', 'Command'], known, numeric=False)}"
        f'<div class="pair"><div><h3>Seeds</h3>{table(["Input", "Seeds"], seed_rows, False)}</div>'
        f"<div><h3>Versions</h3>{_versions(sources)}</div></div>{records}"
    )


def _command(record: Mapping[str, Any]) -> str:
    command = record.get("command", "not recorded")
    return command if isinstance(command, str) else " ".join(map(str, command))


def _find_seeds(record: Any, prefix: str = "") -> str:
    """Every ``…seed`` key of a nested record, as ``a.b.seed = 1``."""
    if isinstance(record, Mapping):
        items = [(str(key), value) for key, value in record.items()]
    elif isinstance(record, list):
        items = [(str(index), value) for index, value in enumerate(record)]
    else:
        return ""
    found = []
    for key, value in items:
        path = f"{prefix}.{key}" if prefix else key
        if key.endswith("seed") and not isinstance(value, (Mapping, list)):
            found.append(f"{path} = {value}")
        elif nested := _find_seeds(value, path):
            found.append(nested)
    return ", ".join(found)


def _versions(sources: Mapping[str, Mapping[str, Any]]) -> str:
    """Version of each package; where inputs were made by different ones, all of them."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, record in sources.items():
        for package, version in (record.get("versions") or {}).items():
            found.setdefault(package, {}).setdefault(str(version), []).append(name)

    def describe(by_version: Mapping[str, list[str]]) -> str:
        if len(by_version) == 1:
            return escape(next(iter(by_version)))
        return "; ".join(f"{escape(v)} ({escape(', '.join(n))})" for v, n in by_version.items())

    rows = [[escape(package), describe(by_version)] for package, by_version in found.items()]
    return table(["Package", "Version"], rows, numeric=False)


def _as_yaml(record: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True, width=100))


def details(title: str, body: str) -> str:
    """A folded part of the page."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: bool = True) -> str:
    """A plain table; ``rows`` are HTML, the first cell of each a heading."""
    kind = ' class="numbers"' if numeric else ""
    columns = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{columns}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
