"""What the report's sections on evaluation, memory, training and provenance show, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import yaml

from megatron_hydra.evaluation.generation import DEPTHS, Generation
from megatron_hydra.evaluation.results import Evaluation
from megatron_hydra.report.chart_style import Picture, to_picture
from megatron_hydra.report.charts import draw_cache, draw_curve, draw_losses, smoothing_window
from megatron_hydra.report.measured import Measured, MeasuredModel
from megatron_hydra.report.training_runs import RecordedRun


def evaluation_section(evaluation: Evaluation | None) -> dict[str, Any]:
    """Models by tasks and lengths with the best of each column, perplexity, and needle grids.

    None: no section.
    """
    if evaluation is None:
        return {"evaluation": None}
    models = evaluation.models
    accuracies = {cell: [model.accuracy[cell] for model in models] for cell in evaluation.cells}
    lengths = models[0].grid.lengths
    # Where the first length past the training length stands, if one stands before it.
    trained = evaluation.training_length
    past = (i for i in range(1, len(lengths)) if lengths[i - 1] <= trained < lengths[i])
    return {
        "evaluation": evaluation,
        "tasks": [(task, list(cells)) for task, cells in groupby(accuracies, itemgetter(0))],
        "cells": {
            cell: {
                "best": max(accuracy.value for accuracy in found),
                "num_samples": sorted({accuracy.num_samples for accuracy in found}),
            }
            for cell, found in accuracies.items()
        },
        "losses": {
            length: min(model.loss_nats[length] for model in models)
            for length in sorted(models[0].loss_nats)
        },
        "first_past": next(past, None),
    }


def generation_section(generation: Generation | None) -> dict[str, Any]:
    """What models answered by generating text, with the best of each column; None: no section."""
    best, least, tasks = [], [], []
    if generation is not None:
        first = generation.models[0].tasks
        tasks = [(task, list(cells)) for task, cells in groupby(first, lambda cell: cell.task)]
        columns = zip(*(model.tasks for model in generation.models), strict=True)
        best = [max(task.accuracy for task in column) for column in columns]
        buckets = zip(*(model.loss_by_position for model in generation.models), strict=True)
        least = [min(bucket.loss_nats for bucket in column) for column in buckets]
    found = {"generation": generation, "generation_best": best, "least_by_position": least}
    return {**found, "generation_tasks": tasks, "depths": DEPTHS}


def memory_section(measured: Measured) -> dict[str, Any]:
    """Cache and state of each model; must be called in :func:`chart_style`."""
    return {
        "measured": measured,
        "crossovers": [
            (model, crossover_tokens(model, measured.teacher)) for model in measured.models
        ],
        "cache": _cache_picture(measured),
    }


def _cache_picture(measured: Measured) -> Picture | None:
    if (dtype := measured.serve_dtype) is None:
        return None
    names: dict[tuple[float, float], list[str]] = {}
    for model in measured.models:
        names.setdefault((model.cache_bytes_per_token, model.state_bytes), []).append(model.name)
    crossings = (crossover_tokens(model, measured.teacher) for model in measured.models)
    asked = measured.training_length or max(length for _, length in measured.cells)
    longest = max(64 * asked, *(4 * (length or 0) for length in crossings))
    lines = [("; ".join(equal), *need) for need, equal in names.items()]
    return to_picture(
        draw_cache(lines, (max(1, asked // 8), longest), dtype, measured.training_length),
        "cache",
        "memory by length",
        f"Cache, served in {dtype}, and state of one sequence by its length. “Smaller from” is "
        "the shortest length at which a hybrid needs less than the teacher.",
    )


def crossover_tokens(model: MeasuredModel, teacher: MeasuredModel) -> int | None:
    """Shortest length at which ``model`` needs less than the teacher; None if never."""
    saved = teacher.cache_bytes_per_token - model.cache_bytes_per_token
    if model.kind == "teacher" or saved <= 0:
        return None
    return math.floor(model.state_bytes / saved) + 1


def training_section(runs: Sequence[RecordedRun]) -> dict[str, Any]:
    """Loss, gradient norm and throughput of each run; must be called in :func:`chart_style`."""
    return {"runs": [(run, _curves(run, f"run{index}")) for index, run in enumerate(runs)]}


def _curves(run: RecordedRun, name: str) -> dict[str, Any]:
    speed = run.curves["train/tokens_per_s"]
    charts = {
        "loss": draw_losses(run),
        "norm": draw_curve(run.curves["train/grad_norm"], "gradient norm", "L2 norm", True),
        "speed": draw_curve(speed, "throughput", "tokens / s", True),
    }
    for task, curve in run.needles.items():
        charts[f"needles-{task}"] = draw_curve(
            curve, f"needles found: {task}", "share", True, run.teacher_needles.get(task)
        )
    return {
        "losses": [
            (title, _first(curve.values), _final(curve.values))
            for title, curve in run.loss_parts.items()
        ],
        "validation": [
            (title, _first(curve.values), float(curve.values[np.isfinite(curve.values)][-1]))
            for title, curve in run.validation_parts.items()
        ],
        "window": smoothing_window(len(speed.steps)),
        "charts": [
            to_picture(chart, f"{name}-{kind}", f"{kind} of {run.name}")
            for kind, chart in charts.items()
        ],
    }


def _final(values: np.ndarray) -> float:
    """Mean of the last fiftieth of a curve: one step's loss is a noisy figure."""
    there = values[np.isfinite(values)]
    return float(there[-smoothing_window(len(values)) :].mean())


def _first(values: np.ndarray) -> float:
    return float(values[np.isfinite(values)][0])


def provenance_section(
    sources: Mapping[str, Mapping[str, Any]], runs: Sequence[RecordedRun], command: str
) -> dict[str, Any]:
    """Commands, versions and seeds of every input, and each provenance record in full."""
    own = {
        name: {key: value for key, value in record.items() if key != "models"}
        for name, record in sources.items()
    }
    records = {**sources, **{run.name: run.provenance for run in runs}}
    commands = {name: _command(record) for name, record in records.items()}
    for source in sources.values():
        for name, origin in source.get("models", {}).items():
            for part in ("plan", "weights"):
                if part in origin:
                    commands[f"{name}: {part}"] = _command(origin[part])
    return {
        "commands": {**commands, "report": command},
        "seeds": {
            name: _find_seeds(record)
            for name, record in (*own.items(), *((run.name, run.config) for run in runs))
        },
        "versions": find_versions(records),
        "records": {
            name: yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True, width=100)
            for name, record in records.items()
        },
    }


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


def find_versions(records: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """Package -> version -> names of the records that it stands in."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, record in records.items():
        for package, version in (record.get("versions") or {}).items():
            found.setdefault(package, {}).setdefault(str(version), []).append(name)
    return found
