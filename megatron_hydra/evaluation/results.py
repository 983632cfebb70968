"""Evaluation results: accuracies with intervals, needle grid, perplexity, cache; and their file.

Free of PyTorch at import, so that the report starts quickly.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from megatron_hydra.files import write_json
from megatron_hydra.schema import Limits, Share
from megatron_hydra.selection.cost import ServeDtype, state_format

if TYPE_CHECKING:
    from megatron_hydra.evaluation.ruler import TaskSample

SCHEMA_VERSION = 1
FILE_KIND = "evaluation"
_Z = 1.96  # covers 95%
_LONGEST_PERPLEXITY = 1e6
"""Above, a perplexity is written as a power of e: more digits would say no more."""

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
    lengths: tuple[Annotated[int, Limits(least=0)], ...]
    depths: tuple[Share, ...]
    accuracy: tuple[tuple[Share, ...], ...]

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
        loss_nats: Length in tokens -> mean next-token loss; its exponential is the perplexity.
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
    loss_nats: Mapping[int, float]

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
            "perplexity": {str(n): perplexity_of(loss) for n, loss in self.loss_nats.items()},
            "loss_nats": {str(length): loss for length, loss in self.loss_nats.items()},
            "tasks": [
                {"task": task, "length": length, **accuracy.to_dict()}
                for (task, length), accuracy in self.accuracy.items()
            ],
            "grid": asdict(self.grid),
        }


@dataclass(frozen=True)
class Evaluation:
    """All evaluated models, measured on the same samples and text.

    Attributes:
        models: One or more.
        training_length: In tokens.
        provenance: Commands, versions, seeds; JSON values.
        serve_dtype: Number format of the caches of all models; None in a file of an earlier
            release, which counts each model's in the format that its weights had.
    """

    models: tuple[ModelResult, ...]
    training_length: int
    provenance: Mapping[str, Any]
    serve_dtype: ServeDtype | None = "bf16"

    @property
    def teacher(self) -> ModelResult:
        """The model of kind teacher; ``read_evaluation`` sees to it that there is one."""
        return next(model for model in self.models if model.kind == "teacher")

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Tasks and lengths, in the order of the file."""
        return tuple(self.models[0].accuracy)

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the evaluation as JSON.

        Raises:
            UserError: If ``path`` exists and ``overwrite`` is False, or cannot be written.
        """
        data = {
            "schema_version": SCHEMA_VERSION,
            "kind": FILE_KIND,
            "models": [model.to_dict() for model in self.models],
            "training_length": self.training_length,
            "serve_dtype": self.serve_dtype,
            "provenance": dict(self.provenance),
        }
        write_json(path, data, overwrite)


def perplexity_of(loss_nats: float) -> float | None:
    """The perplexity; None if it is beyond a floating-point number, from about 709.8 nats."""
    try:
        return math.exp(loss_nats)
    except OverflowError:
        return None


def format_perplexity(loss_nats: float) -> str:
    """The perplexity as a reader sees it: ``17.62``, or ``e^812.3`` where digits say nothing."""
    value = perplexity_of(loss_nats)
    if value is None or value > _LONGEST_PERPLEXITY:
        return f"e^{loss_nats:,.1f}"
    return f"{value:,.2f}"


def format_table(models: Sequence[ModelResult], serve_dtype: ServeDtype) -> str:
    """A text table, one model per row: accuracy in percent with 95% interval, perplexity, cache."""
    rows = [
        ["model", "FA heads", *(f"{task} {length}" for task, length in models[0].accuracy)]
        + [f"ppl {length}" for length in models[0].loss_nats]
        + [f"cache B/token ({serve_dtype})", f"state B ({state_format(serve_dtype)})"]
    ]
    for model in models:
        rows.append(
            [model.name, f"{model.num_fa_heads}/{model.num_heads}"]
            + [percent_text(model.accuracy[cell]) for cell in models[0].accuracy]
            + [format_perplexity(model.loss_nats[length]) for length in models[0].loss_nats]
            + [f"{model.cache_bytes_per_token:,}", f"{model.state_bytes:,}"]
        )
    return "\n".join(align(rows))


def align(rows: Sequence[Sequence[str]], num_left: int = 1) -> list[str]:
    """Lines of a text table: the first columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def percent_text(accuracy: Accuracy) -> str:
    """Percent with the 95% interval: `80 [71, 87]`."""
    low, high = accuracy.interval
    return f"{100 * accuracy.value:.0f} [{100 * low:.0f}, {100 * high:.0f}]"
