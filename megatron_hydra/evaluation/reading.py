"""Reading an evaluation's file: every figure checked, and one number format for its caches.

Free of PyTorch at import, so that the report starts quickly.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

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
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.schema import MAY_LACK, Count, Limits, load_json, named
from megatron_hydra.selection.cost import (
    SERVE_DTYPES,
    ServeDtype,
    cache_bytes_per_token,
    state_bytes,
)
from megatron_hydra.selection.shape import ModelShape

_Bytes = Annotated[int, Limits(least=0)]


@dataclass(frozen=True)
class _Task:
    task: str
    length: Count
    num_right: Annotated[int, Limits(least=0)]
    num_samples: Count
    accuracy: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class _Model:
    name: str
    path: str
    kind: str
    plan_name: str
    plan: list[list[int]] | None
    fa_heads: int
    total_heads: Count
    cache_bytes_per_token: _Bytes
    state_bytes: _Bytes
    perplexity: Mapping[int, Annotated[float, Limits(least=1)] | None]
    tasks: list[_Task]
    grid: NeedleGrid
    loss_nats: Mapping[int, Annotated[float, Limits(least=0)]] | None = field(
        default=None, metadata=MAY_LACK
    )


@dataclass(frozen=True)
class _File:
    """The keys of an evaluation's file; figures that follow from others are held to them."""

    models: list[_Model]
    training_length: Count
    provenance: Mapping[str, Any]
    serve_dtype: ServeDtype | None = field(default=None, metadata=MAY_LACK)


def read_evaluation(path: str | os.PathLike[str]) -> Evaluation:
    """Read and check what :meth:`Evaluation.save` wrote.

    Raises:
        UserError: If a key is missing, a figure is out of range or contradicts another, names
            repeat, there is not one teacher, or the models were not measured on the same cells;
            names file and model.
    """
    file = load_json(_File, path, FILE_KIND, SCHEMA_VERSION)
    with named(os.fspath(path)):
        models = tuple(map(_checked, file.models))
        names = [model.name for model in models]
        if len(set(names)) < len(names):
            raise UserError(f"model names repeat: {', '.join(names)}")
        num_teachers = sum(model.kind == "teacher" for model in models)
        if num_teachers != 1:
            raise UserError(f"it has {num_teachers} models of kind 'teacher'; one is needed")
        for model in models[1:]:
            _check_same_cells(models[0], model)
    return Evaluation(models, file.training_length, file.provenance, file.serve_dtype)


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


def _checked(entry: _Model) -> ModelResult:
    with named(f"model {entry.name!r}"):
        model = ModelResult(
            name=entry.name,
            path=entry.path,
            plan=_plan(entry),
            plan_name=entry.plan_name,
            num_heads=entry.total_heads,
            cache_bytes_per_token=entry.cache_bytes_per_token,
            state_bytes=entry.state_bytes,
            accuracy=_accuracies(entry.tasks),
            grid=_grid(entry.grid),
            loss_nats=_losses(entry),
        )
        for key, told, value in (
            ("kind", entry.kind, model.kind),
            ("fa_heads", entry.fa_heads, model.num_fa_heads),
        ):
            if told != value:
                raise UserError(f"{key} is {told!r}, but by its plan it is {value!r}")
    return model


def _losses(entry: _Model) -> dict[int, float]:
    """Losses in nats; earlier releases wrote the perplexity alone, which is null beyond numbers."""
    if entry.loss_nats is None:
        told = {length: value for length, value in entry.perplexity.items() if value is not None}
        if len(told) < len(entry.perplexity):
            raise UserError("a perplexity is null, and there are no loss_nats")
        return {length: math.log(value) for length, value in told.items()}
    if entry.perplexity.keys() != entry.loss_nats.keys():
        raise UserError("perplexity and loss_nats are of other lengths")
    for length, loss in entry.loss_nats.items():
        found, value = entry.perplexity[length], perplexity_of(loss)
        # As computed on another machine, to the last bits.
        if found != value and not (found and value and math.isclose(found, value, rel_tol=1e-9)):
            raise UserError(
                f"perplexity at {length} tokens is {found!r}; by its loss_nats it is {value!r}"
            )
    return dict(entry.loss_nats)


def _plan(entry: _Model) -> FAHeads | None:
    if entry.plan is None:
        return None
    num_layers = len(entry.plan)
    heads = range(entry.total_heads // max(1, num_layers))
    plan = tuple(tuple(head for head in heads if head in row) for row in entry.plan)
    if len(heads) * num_layers != entry.total_heads or [list(row) for row in plan] != entry.plan:
        raise UserError(
            f"plan is {entry.plan!r}; it must list each layer's FA heads, ascending, "
            f"in a model of {entry.total_heads} heads (null for a teacher)"
        )
    return plan


def _accuracies(tasks: Sequence[_Task]) -> dict[Cell, Accuracy]:
    if not tasks:
        raise UserError("tasks is empty")
    accuracy: dict[Cell, Accuracy] = {}
    for task in tasks:
        with named(f"task {task.task} at {task.length} tokens"):
            if (task.task, task.length) in accuracy:
                raise UserError("it stands there twice")
            if task.num_right > task.num_samples:
                raise UserError(f"num_right is {task.num_right} of {task.num_samples} samples")
            counted = Accuracy(task.num_right, task.num_samples)
            for key, told, value in (
                ("accuracy", task.accuracy, counted.value),
                ("interval", task.interval, counted.interval),
            ):
                if told != value:
                    raise UserError(f"{key} is {told}; its counts give {value}")
        accuracy[task.task, task.length] = counted
    return accuracy


def _grid(grid: NeedleGrid) -> NeedleGrid:
    lengths, depths = len(grid.lengths), len(grid.depths)
    if not lengths or not depths or [len(row) for row in grid.accuracy] != [depths] * lengths:
        raise UserError(
            f"grid.accuracy must have a row for each of its {lengths} lengths with a figure for "
            f"each of its {depths} depths"
        )
    return grid


def _check_same_cells(first: ModelResult, other: ModelResult) -> None:
    def missing(what: str, left: Sequence[Any], right: Sequence[Any]) -> None:
        for a, b, owner, lacks in (
            (left, right, first.name, other.name),
            (right, left, other.name, first.name),
        ):
            gone = [item for item in a if item not in b]
            if gone:
                raise UserError(f"model {lacks!r} has no {what} {gone[0]}, which {owner!r} has")

    missing("result for task and length", tuple(first.accuracy), tuple(other.accuracy))
    missing("perplexity at length", tuple(first.loss_nats), tuple(other.loss_nats))
    missing("grid task", (first.grid.task,), (other.grid.task,))
    missing("grid length", first.grid.lengths, other.grid.lengths)
    missing("grid depth", first.grid.depths, other.grid.depths)
