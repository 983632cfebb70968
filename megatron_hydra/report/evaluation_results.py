"""What the report needs of an evaluation file: read, checked, every model on the same cells."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hydra.errors import UserError
from megatron_hydra.files import read_json

Cell = tuple[str, int]
"""A task and a length in tokens."""


@dataclass(frozen=True)
class Accuracy:
    """Share of samples answered rightly, and its 95% interval, all in [0, 1]."""

    value: float
    num_samples: int
    interval: tuple[float, float]


@dataclass(frozen=True)
class NeedleGrid:
    """Accuracy by length in tokens and depth of the needle, ``accuracy[length][depth]``."""

    task: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    accuracy: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class ModelResult:
    """One evaluated model.

    Attributes:
        state_bytes: Size of the LA heads' state of one sequence, whatever its length.
    """

    name: str
    path: str
    kind: str
    plan_name: str
    num_fa_heads: int
    num_heads: int
    cache_bytes_per_token: float
    state_bytes: float
    perplexity: dict[int, float]
    accuracy: dict[Cell, Accuracy]
    grid: NeedleGrid


@dataclass(frozen=True)
class Evaluation:
    """All evaluated models; the same cells, perplexity lengths and grid axes for each."""

    models: tuple[ModelResult, ...]
    training_length: int
    provenance: Mapping[str, Any]

    @property
    def teacher(self) -> ModelResult:
        """The one model of kind teacher."""
        return next(model for model in self.models if model.kind == "teacher")

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Tasks and lengths, in the order of the file."""
        return tuple(self.models[0].accuracy)

    @property
    def headline_cell(self) -> Cell:
        """The first task, at the training length if it was measured there."""
        task = self.cells[0][0]
        lengths = [length for name, length in self.cells if name == task]
        return task, self.training_length if self.training_length in lengths else lengths[0]


def read_evaluation(path: str | os.PathLike[str]) -> Evaluation:
    """Read and check what ``megatron-hydra evaluate`` wrote.

    Raises:
        UserError: If a key is missing, a figure is out of range, names repeat, there is not one
            teacher, or the models were not measured on the same cells; names file and model.
    """
    data = read_json(path, "evaluation", 1)
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
    length = _number(data, "training_length", where, low=1)
    return Evaluation(models, int(length), _get(data, "provenance", Mapping, where))


def _read_model(entry: Any, where: str) -> ModelResult:
    if not isinstance(entry, Mapping):
        raise UserError(f"{where} must be a JSON object")
    name = _get(entry, "name", str, where)
    where = f"{where} ({name!r})"
    kind = _get(entry, "kind", str, where)
    if kind not in ("teacher", "hybrid"):
        raise UserError(f"{where} has kind {kind!r}; allowed: 'teacher', 'hybrid'")
    perplexity = _get(entry, "perplexity", Mapping, where)
    accuracy = _read_tasks(_get(entry, "tasks", list, where), where)
    return ModelResult(
        name=name,
        path=_get(entry, "path", str, where),
        kind=kind,
        plan_name=str(entry.get("plan_name") or ""),
        num_fa_heads=int(_number(entry, "fa_heads", where)),
        num_heads=int(_number(entry, "total_heads", where, low=1)),
        cache_bytes_per_token=_number(entry, "cache_bytes_per_token", where),
        state_bytes=_number(entry, "state_bytes", where),
        perplexity={
            _length(key, where): _number(perplexity, key, f"{where}, perplexity", low=1)
            for key in perplexity
        },
        accuracy=accuracy,
        grid=_read_grid(_get(entry, "grid", Mapping, where), where),
    )


def _read_tasks(entries: Sequence[Any], where: str) -> dict[Cell, Accuracy]:
    accuracy: dict[Cell, Accuracy] = {}
    for entry in entries:
        task = _get(entry, "task", str, f"{where}, tasks")
        cell = (task, int(_number(entry, "length", f"{where}, task {task}", low=1)))
        here = f"{where}, task {task} at {cell[1]} tokens"
        if cell in accuracy:
            raise UserError(f"{here} stands there twice")
        value = _number(entry, "accuracy", here, high=1)
        interval = _numbers(_get(entry, "interval", list, here), f"{here}, interval", high=1)
        if len(interval) != 2 or not interval[0] - 1e-9 <= value <= interval[1] + 1e-9:
            raise UserError(f"{here} has interval {list(interval)}, which must hold {value}")
        num_samples = int(_number(entry, "num_samples", here, low=1))
        accuracy[cell] = Accuracy(value, num_samples, (interval[0], interval[1]))
    if not accuracy:
        raise UserError(f"{where} has no tasks")
    return accuracy


def _read_grid(data: Mapping[str, Any], where: str) -> NeedleGrid:
    where = f"{where}, grid"
    lengths = tuple(map(int, _numbers(_get(data, "lengths", list, where), f"{where}, lengths")))
    depths = _numbers(_get(data, "depths", list, where), f"{where}, depths", high=1)
    rows = tuple(
        _numbers(row, f"{where}, accuracy", high=1) for row in _get(data, "accuracy", list, where)
    )
    if not lengths or not depths or [len(row) for row in rows] != [len(depths)] * len(lengths):
        raise UserError(
            f"{where}: accuracy must have a row for each of its {len(lengths)} lengths with a "
            f"figure for each of its {len(depths)} depths"
        )
    return NeedleGrid(_get(data, "task", str, where), lengths, depths, rows)


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
    missing("perplexity at length", tuple(first.perplexity), tuple(other.perplexity))
    missing("grid task", (first.grid.task,), (other.grid.task,))
    missing("grid length", first.grid.lengths, other.grid.lengths)
    missing("grid depth", first.grid.depths, other.grid.depths)


def _get(data: Any, key: str | int, kind: type, where: str) -> Any:
    if not isinstance(data, Mapping) or key not in data:
        raise UserError(f"{where} has no {key!r}")
    if not isinstance(data[key], kind):
        raise UserError(f"{where} has {key} {data[key]!r}; it must be a {kind.__name__.lower()}")
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


def _numbers(values: Any, where: str, high: float = math.inf) -> tuple[float, ...]:
    if not isinstance(values, list):
        raise UserError(f"{where}: {values!r} must be a list of numbers")
    return tuple(_number({i: v}, i, where, high=high) for i, v in enumerate(values))


def _length(key: str, where: str) -> int:
    if not key.isdigit():
        raise UserError(f"{where} has perplexity at {key!r}; its keys must be lengths in tokens")
    return int(key)
