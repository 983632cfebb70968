"""Figures of one evaluated model: accuracies with intervals, needle grid, perplexity, cache."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_hydra.evaluation.ruler import TaskSample

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Accuracy:
    """Right answers out of samples."""

    num_right: int
    num_samples: int

    @property
    def value(self) -> float:
        """Share of right answers, in [0, 1]."""
        return self.num_right / self.num_samples

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's score interval (J. Am. Stat. Assoc. 22, 1927); z = 1.96 covers 95%."""
        n, p = self.num_samples, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class RetrievalResult:
    """Right and wrong answers, counted by task, length and depth."""

    counts: Mapping[tuple[str, int, float], Accuracy]

    @classmethod
    def count(cls, samples: Sequence[TaskSample], right: Sequence[bool]) -> RetrievalResult:
        """Count by cell, in the samples' order."""
        cells: dict[tuple[str, int, float], list[bool]] = {}
        for sample, is_right in zip(samples, right, strict=True):
            cells.setdefault((sample.task, sample.length, sample.depth), []).append(is_right)
        return cls({cell: Accuracy(sum(found), len(found)) for cell, found in cells.items()})

    def tasks(self) -> dict[tuple[str, int], Accuracy]:
        """By task and length, over all depths."""
        cells = dict.fromkeys((task, length) for task, length, _ in self.counts)
        return {
            cell: _total(a for key, a in self.counts.items() if key[:2] == cell) for cell in cells
        }

    def grid(self, task: str) -> dict[str, Any]:
        """A task's needle grid as JSON values: lengths, depths and ``accuracy[length][depth]``."""
        lengths = sorted({length for name, length, _ in self.counts if name == task})
        depths = sorted({depth for name, _, depth in self.counts if name == task})
        accuracy = [
            [self.counts[task, length, depth].value for depth in depths] for length in lengths
        ]
        return {"task": task, "lengths": lengths, "depths": depths, "accuracy": accuracy}


@dataclass(frozen=True)
class ModelResult:
    """One evaluated model.

    Attributes:
        name: The name that it goes by in tables.
        path: Its folder.
        kind: ``teacher`` or ``hybrid``.
        plan_name: How its plan was chosen; empty for a teacher.
        num_fa_heads: Heads with full attention.
        num_heads: Query heads of all layers.
        cache_bytes_per_token: See :mod:`megatron_hydra.evaluation.cache`.
        state_bytes: Likewise.
        retrieval: Of the needle tasks.
        grid_task: The task of the needle grid.
        perplexity: Length in tokens -> perplexity.
    """

    name: str
    path: str
    kind: str
    plan_name: str
    num_fa_heads: int
    num_heads: int
    cache_bytes_per_token: int
    state_bytes: int
    retrieval: RetrievalResult
    grid_task: str
    perplexity: Mapping[int, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The model's entry in an evaluation file."""
        return {
            "name": self.name,
            "path": self.path,
            "kind": self.kind,
            "plan_name": self.plan_name,
            "fa_heads": self.num_fa_heads,
            "total_heads": self.num_heads,
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "state_bytes": self.state_bytes,
            "perplexity": {str(length): value for length, value in self.perplexity.items()},
            "tasks": [
                {
                    "task": task,
                    "length": length,
                    "accuracy": accuracy.value,
                    "num_samples": accuracy.num_samples,
                    "interval": list(accuracy.interval()),
                }
                for (task, length), accuracy in self.retrieval.tasks().items()
            ],
            "grid": self.retrieval.grid(self.grid_task),
        }


def evaluation_file(
    models: Iterable[ModelResult], training_length: int, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """The evaluation as JSON values."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "evaluation",
        "models": [model.to_dict() for model in models],
        "training_length": training_length,
        "provenance": dict(provenance),
    }


def format_table(models: Sequence[ModelResult]) -> str:
    """A text table: accuracy in percent with its 95% interval, perplexity, cache; a model a row."""
    cells = list(models[0].retrieval.tasks())
    lengths = list(models[0].perplexity)
    rows = [
        ["model", "FA heads", *(f"{task} {length}" for task, length in cells)]
        + [*(f"ppl {length}" for length in lengths), "cache B/token", "state B"]
    ]
    for model in models:
        accuracies = model.retrieval.tasks()
        rows.append(
            [model.name, f"{model.num_fa_heads}/{model.num_heads}"]
            + [_percent(accuracies[cell]) for cell in cells]
            + [f"{model.perplexity[length]:.2f}" for length in lengths]
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
    low, high = accuracy.interval()
    return f"{100 * accuracy.value:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def _total(parts: Iterable[Accuracy]) -> Accuracy:
    counted = list(parts)
    return Accuracy(sum(a.num_right for a in counted), sum(a.num_samples for a in counted))
