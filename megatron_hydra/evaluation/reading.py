"""Reading an evaluation's file: every figure checked, and one number format for its caches.

Free of PyTorch at import, so that the report starts quickly.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_hydra.errors import UserError
from megatron_hydra.evaluation.results import (
    FILE_KIND,
    SCHEMA_VERSION,
    Accuracy,
    Cell,
    Evaluation,
    FAHeads,
    ModelResult,
    NeedleGrid,
    perplexity_of,
)
from megatron_hydra.files import read_json
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.cost import (
    SERVE_DTYPES,
    ModelShape,
    cache_bytes_per_token,
    state_bytes,
)


def read_evaluation(path: str | os.PathLike[str]) -> Evaluation:
    """Read and check what :meth:`Evaluation.save` wrote.

    Raises:
        UserError: If a key is missing, a figure is out of range or contradicts another, names
            repeat, there is not one teacher, or the models were not measured on the same cells;
            names file and model.
    """
    data = read_json(path, FILE_KIND, SCHEMA_VERSION)
    where = os.fspath(path)
    entries = _get(data, "models", list, where)
    models = tuple(_read_model(entry, f"{where}: model {i}") for i, entry in enumerate(entries))
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise UserError(f"{where}: model names repeat: {', '.join(names)}")
    num_teachers = sum(model.kind == "teacher" for model in models)
    if num_teachers != 1:
        raise UserError(f"{where} has {num_teachers} models of kind 'teacher'; one is needed")
    for model in models[1:]:
        _check_same_cells(models[0], model, where)
    length = _whole(data, "training_length", where, low=1)
    dtype = data.get("serve_dtype")
    if dtype not in (None, *SERVE_DTYPES):
        raise UserError(f"{where} has serve_dtype {dtype!r}; allowed: {', '.join(SERVE_DTYPES)}")
    return Evaluation(models, length, _get(data, "provenance", dict, where), dtype)


def in_one_format(evaluation: Evaluation, shape: ModelShape) -> Evaluation:
    """The evaluation with the caches of all its models in one number format, if that can be.

    Earlier releases counted each model in the format that its weights had, and named none. Where
    that gave a file's figures, they are counted anew in bf16, the default of ``evaluate``.

    Args:
        evaluation: As :func:`read_evaluation` returns it.
        shape: Of the teacher.

    Returns:
        Its ``serve_dtype`` is None if a model's figures are not those of the shape.
    """
    if evaluation.serve_dtype is not None:
        return evaluation
    models = [_in_bf16(model, shape) for model in evaluation.models]
    counted = tuple(model for model in models if model is not None)
    if len(counted) < len(models):
        return evaluation
    return replace(evaluation, models=counted, serve_dtype="bf16")


def _in_bf16(model: ModelResult, shape: ModelShape) -> ModelResult | None:
    plan = None
    if model.plan is not None:
        if len(model.plan) != shape.num_layers:
            return None
        sizes = shape.num_layers, shape.num_heads, shape.num_query_groups
        plan = HeadPlan.from_fa_heads(dict(enumerate(model.plan)), *sizes)
    found = {
        dtype: (cache_bytes_per_token(shape, dtype).of(plan), state_bytes(shape, dtype).of(plan))
        for dtype in SERVE_DTYPES
    }
    if (model.cache_bytes_per_token, model.state_bytes) not in found.values():
        return None
    cache, state = map(int, found["bf16"])
    return replace(model, cache_bytes_per_token=cache, state_bytes=state)


def _read_model(entry: Any, where: str) -> ModelResult:
    name = _get(entry, "name", str, where)
    where = f"{where} ({name!r})"
    num_heads = _whole(entry, "total_heads", where, low=1)
    model = ModelResult(
        name=name,
        path=_get(entry, "path", str, where),
        plan=_read_plan(entry, num_heads, where),
        plan_name=_get(entry, "plan_name", str, where),
        num_heads=num_heads,
        cache_bytes_per_token=_whole(entry, "cache_bytes_per_token", where),
        state_bytes=_whole(entry, "state_bytes", where),
        accuracy=_read_tasks(_get(entry, "tasks", list, where), where),
        grid=_read_grid(_get(entry, "grid", dict, where), f"{where}, grid"),
        loss_nats=_read_losses(entry, where),
    )
    for key, value in (("kind", model.kind), ("fa_heads", model.num_fa_heads)):
        if _get(entry, key, object, where) != value:
            raise UserError(f"{where} has {key} {entry[key]!r}, but by its plan it is {value!r}")
    return model


def _read_losses(entry: Mapping[str, Any], where: str) -> dict[int, float]:
    """Losses in nats; earlier releases wrote the perplexity alone, which is null beyond numbers."""
    perplexity = _get(entry, "perplexity", dict, where)
    if "loss_nats" not in entry:
        values = {
            key: _number(perplexity, key, f"{where}, perplexity", low=1) for key in perplexity
        }
        return {_length(key, where): math.log(value) for key, value in values.items()}
    losses = _get(entry, "loss_nats", dict, where)
    found = {_length(key, where): _number(losses, key, f"{where}, loss_nats") for key in losses}
    for length, loss in found.items():
        told, value = perplexity_of(loss), perplexity.get(str(length), "missing")
        if told is not None:  # as computed on another machine, to the last bits
            value = _number(perplexity, str(length), f"{where}, perplexity", low=1)
            told = value if math.isclose(value, told, rel_tol=1e-9) else told
        if value != told or len(perplexity) != len(found):
            raise UserError(
                f"{where} has perplexity {value!r} at {length}; by its loss_nats it is {told!r}"
            )
    return found


def _read_plan(entry: Any, num_heads: int, where: str) -> FAHeads | None:
    layers = _get(entry, "plan", object, where)
    if layers is None:
        return None
    rows = layers if isinstance(layers, list) else []
    heads = range(num_heads // max(1, len(rows)))
    plan = tuple(tuple(h for h in heads if h in row) for row in rows if isinstance(row, list))
    if len(heads) * len(rows) != num_heads or [list(row) for row in plan] != rows:
        raise UserError(
            f"{where} has plan {layers!r}; it must list each layer's FA heads, ascending, "
            f"in a model of {num_heads} heads (null for a teacher)"
        )
    return plan


def _read_tasks(entries: Sequence[Any], where: str) -> dict[Cell, Accuracy]:
    accuracy: dict[Cell, Accuracy] = {}
    for entry in entries:
        task = _get(entry, "task", str, f"{where}, tasks")
        cell = (task, _whole(entry, "length", f"{where}, task {task}", low=1))
        here = f"{where}, task {task} at {cell[1]} tokens"
        if cell in accuracy:
            raise UserError(f"{here} stands there twice")
        num_samples = _whole(entry, "num_samples", here, low=1)
        counted = Accuracy(_whole(entry, "num_right", here, high=num_samples), num_samples)
        for key, value in counted.to_dict().items():
            if _get(entry, key, object, here) != value:
                raise UserError(f"{here} has {key} {entry[key]!r}; its counts give {value}")
        accuracy[cell] = counted
    if not accuracy:
        raise UserError(f"{where} has no tasks")
    return accuracy


def _read_grid(data: Mapping[str, Any], where: str) -> NeedleGrid:
    lengths = _numbers(data, "lengths", where)
    depths = _numbers(data, "depths", where, high=1)
    table = dict(enumerate(_get(data, "accuracy", list, where)))
    rows = tuple(_numbers(table, row, f"{where}, accuracy", high=1) for row in table)
    if not lengths or not depths or [len(row) for row in rows] != [len(depths)] * len(lengths):
        raise UserError(
            f"{where}: accuracy must have a row for each of its {len(lengths)} lengths with a "
            f"figure for each of its {len(depths)} depths"
        )
    return NeedleGrid(_get(data, "task", str, where), tuple(map(int, lengths)), depths, rows)


def _check_same_cells(first: ModelResult, other: ModelResult, where: str) -> None:
    def missing(what: str, left: Sequence[Any], right: Sequence[Any]) -> None:
        for a, b, owner, lacks in (
            (left, right, first.name, other.name),
            (right, left, other.name, first.name),
        ):
            gone = [item for item in a if item not in b]
            if gone:
                raise UserError(
                    f"{where}: model {lacks!r} has no {what} {gone[0]}, which {owner!r} has"
                )

    missing("result for task and length", tuple(first.accuracy), tuple(other.accuracy))
    missing("perplexity at length", tuple(first.loss_nats), tuple(other.loss_nats))
    missing("grid task", (first.grid.task,), (other.grid.task,))
    missing("grid length", first.grid.lengths, other.grid.lengths)
    missing("grid depth", first.grid.depths, other.grid.depths)


def _get(data: Any, key: str | int, kind: type, where: str) -> Any:
    if not isinstance(data, dict) or key not in data:
        raise UserError(f"{where} has no {key!r}")
    if not isinstance(data[key], kind):
        raise UserError(f"{where} has {key} {data[key]!r}; it must be a {kind.__name__}")
    return data[key]


def _number(
    data: Any, key: str | int, where: str, low: float = 0.0, high: float = math.inf
) -> float:
    value: float = _get(data, key, object, where)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        raise UserError(
            f"{where} has {key} {value!r}; it must be a finite number from {low:g} to {high:g}"
        )
    return value


def _whole(data: Any, key: str, where: str, low: float = 0.0, high: float = math.inf) -> int:
    value = _number(data, key, where, low, high)
    if not isinstance(value, int):
        raise UserError(f"{where} has {key} {value!r}; it must be a whole number")
    return value


def _numbers(data: Any, key: str | int, where: str, high: float = math.inf) -> tuple[float, ...]:
    items = dict(enumerate(_get(data, key, list, where)))
    return tuple(_number(items, i, f"{where}, {key}", high=high) for i in items)


def _length(key: str, where: str) -> int:
    if not key.isdigit():
        raise UserError(f"{where} has perplexity at {key!r}; its keys must be lengths in tokens")
    return int(key)
