"""Evaluation results: accuracies with intervals, needle grid, perplexity, cache; and their file.

Free of PyTorch at import, so that the report starts quickly.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_hydra.errors import UserError
from megatron_hydra.files import read_json, write_json

if TYPE_CHECKING:
    from megatron_hydra.evaluation.ruler import TaskSample

SCHEMA_VERSION = 1
_FILE_KIND = "evaluation"
_Z = 1.96  # covers 95%

Cell = tuple[str, int]
"""A task and a length in tokens."""
FAHeads = tuple[tuple[int, ...], ...]
"""The FA heads of each layer, ascending: what decides which plan a hybrid has."""
Key = TypeVar("Key")


@dataclass(frozen=True)
class Accuracy:
    """Right answers out of samples."""

    num_right: int
    num_samples: int

    @property
    def value(self) -> float:
        """Share of right answers, in [0, 1]."""
        return self.num_right / self.num_samples

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% score interval (J. Am. Stat. Assoc. 22, 1927)."""
        n, p = self.num_samples, self.value
        centre = (p + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
        half = _Z / (1 + _Z * _Z / n) * math.sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; share and interval follow from the counts and spare readers the formula."""
        return {**asdict(self), "accuracy": self.value, "interval": list(self.interval)}


def count_right(
    samples: Sequence[TaskSample], right: Sequence[bool], key: Callable[[TaskSample], Key]
) -> dict[Key, Accuracy]:
    """Count right answers of the samples that have the same key, in the samples' order."""
    found: dict[Key, list[bool]] = {}
    for sample, is_right in zip(samples, right, strict=True):
        found.setdefault(key(sample), []).append(is_right)
    return {group: Accuracy(sum(answers), len(answers)) for group, answers in found.items()}


@dataclass(frozen=True)
class NeedleGrid:
    """Accuracy by length in tokens and depth of the needle, ``accuracy[length][depth]``."""

    task: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    accuracy: tuple[tuple[float, ...], ...]

    @classmethod
    def count(cls, task: str, samples: Sequence[TaskSample], right: Sequence[bool]) -> NeedleGrid:
        """Count the samples of ``task``; each length has every depth."""
        counts = count_right(samples, right, lambda s: (s.task, s.length, s.depth))
        lengths = sorted({length for name, length, _ in counts if name == task})
        depths = sorted({depth for name, _, depth in counts if name == task})
        rows = (tuple(counts[task, length, d].value for d in depths) for length in lengths)
        return cls(task, tuple(lengths), tuple(depths), tuple(rows))


@dataclass(frozen=True)
class ModelResult:
    """One evaluated model.

    Attributes:
        name: The name that it goes by in tables.
        path: Its folder.
        plan: Its FA heads; None for a teacher.
        plan_name: How its plan was chosen; empty for a teacher.
        num_heads: Query heads of all layers.
        cache_bytes_per_token: See :mod:`megatron_hydra.selection.cost`.
        state_bytes: Likewise.
        accuracy: Of the needle tasks.
        grid: Needle grid of one of them.
        perplexity: Length in tokens -> perplexity.
    """

    name: str
    path: str
    plan: FAHeads | None
    plan_name: str
    num_heads: int
    cache_bytes_per_token: int
    state_bytes: int
    accuracy: Mapping[Cell, Accuracy]
    grid: NeedleGrid
    perplexity: Mapping[int, float]

    @property
    def kind(self) -> str:
        """``teacher`` or ``hybrid``."""
        return "teacher" if self.plan is None else "hybrid"

    @property
    def num_fa_heads(self) -> int:
        """Heads with full attention, of all layers."""
        return self.num_heads if self.plan is None else sum(map(len, self.plan))

    def to_dict(self) -> dict[str, Any]:
        """The model's entry in an evaluation file."""
        return {
            "name": self.name,
            "path": self.path,
            "kind": self.kind,
            "plan_name": self.plan_name,
            "plan": self.plan,
            "fa_heads": self.num_fa_heads,
            "total_heads": self.num_heads,
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "state_bytes": self.state_bytes,
            "perplexity": {str(length): value for length, value in self.perplexity.items()},
            "tasks": [
                {"task": task, "length": length, **accuracy.to_dict()}
                for (task, length), accuracy in self.accuracy.items()
            ],
            "grid": asdict(self.grid),
        }


@dataclass(frozen=True)
class Evaluation:
    """All evaluated models, measured on the same samples and text."""

    models: tuple[ModelResult, ...]
    training_length: int
    provenance: Mapping[str, Any]

    @property
    def teacher(self) -> ModelResult:
        """The model of kind teacher; :func:`read_evaluation` sees to it that there is one."""
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

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the evaluation as JSON.

        Raises:
            UserError: If ``path`` exists and ``overwrite`` is False, or cannot be written.
        """
        data = {
            "schema_version": SCHEMA_VERSION,
            "kind": _FILE_KIND,
            "models": [model.to_dict() for model in self.models],
            "training_length": self.training_length,
            "provenance": dict(self.provenance),
        }
        write_json(path, data, overwrite)


def format_table(models: Sequence[ModelResult]) -> str:
    """A text table: accuracy in percent with its 95% interval, perplexity, cache; a model a row."""
    rows = [
        ["model", "FA heads", *(f"{task} {length}" for task, length in models[0].accuracy)]
        + [*(f"ppl {length}" for length in models[0].perplexity), "cache B/token", "state B"]
    ]
    for model in models:
        rows.append(
            [model.name, f"{model.num_fa_heads}/{model.num_heads}"]
            + [_percent(model.accuracy[cell]) for cell in models[0].accuracy]
            + [f"{model.perplexity[length]:.2f}" for length in models[0].perplexity]
            + [f"{model.cache_bytes_per_token:,}", f"{model.state_bytes:,}"]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    )


def _percent(accuracy: Accuracy) -> str:
    low, high = accuracy.interval
    return f"{100 * accuracy.value:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def read_evaluation(path: str | os.PathLike[str]) -> Evaluation:
    """Read and check what :meth:`Evaluation.save` wrote.

    Raises:
        UserError: If a key is missing, a figure is out of range or contradicts another, names
            repeat, there is not one teacher, or the models were not measured on the same cells;
            names file and model.
    """
    data = read_json(path, _FILE_KIND, SCHEMA_VERSION)
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
    return Evaluation(models, length, _get(data, "provenance", dict, where))


def _read_model(entry: Any, where: str) -> ModelResult:
    name = _get(entry, "name", str, where)
    where = f"{where} ({name!r})"
    num_heads = _whole(entry, "total_heads", where, low=1)
    perplexity = _get(entry, "perplexity", dict, where)
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
        perplexity={
            _length(key, where): _number(perplexity, key, f"{where}, perplexity", low=1)
            for key in perplexity
        },
    )
    for key, value in (("kind", model.kind), ("fa_heads", model.num_fa_heads)):
        if _get(entry, key, object, where) != value:
            raise UserError(f"{where} has {key} {entry[key]!r}, but by its plan it is {value!r}")
    return model


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
    missing("perplexity at length", tuple(first.perplexity), tuple(other.perplexity))
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
