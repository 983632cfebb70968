"""Which samples a step reads: their places in the run's order, and the documents behind them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.datasets.blended_dataset import BlendedDataset

from megatron_hydra.training.config import DataSection

_MAX_RANGES = 16
"""Ranges of numbers that a sentence holds."""


def micro_batch_samples(
    data: DataSection, step: int, data_parallel_size: int, data_parallel_rank: int, micro_batch: int
) -> list[int]:
    """The places of one micro-batch's samples in the run's order, as Megatron's sampler deals them.

    Args:
        data: Batch sizes.
        step: Counts from 0 over the whole run, whatever happened to the steps before.
        data_parallel_size: Replicas of the model.
        data_parallel_rank: The replica that reads the micro-batch.
        micro_batch: Counts from 0 within the step.
    """
    start = step * data.global_batch_size
    start += (micro_batch * data_parallel_size + data_parallel_rank) * data.micro_batch_size
    return list(range(start, start + data.micro_batch_size))


def documents(dataset: Any, position: int) -> tuple[str, list[int]]:
    """The dataset's prefix and its documents that a sample is cut from.

    Args:
        dataset: Megatron's GPTDataset, or a BlendedDataset of some.
        position: The sample's place in the run's order.
    """
    if isinstance(dataset, BlendedDataset):
        member = int(dataset.dataset_index[position])
        dataset, position = dataset.datasets[member], dataset.dataset_sample_index[position]
    sample = dataset.shuffle_index[position]
    first, last = (int(dataset.sample_index[place][0]) for place in (sample, sample + 1))
    return dataset.dataset_path, [int(d) for d in dataset.document_index[first : last + 1]]


@dataclass(frozen=True)
class Samples:
    """Some of a run's samples, and the documents that they are cut from.

    Attributes:
        numbers: Their places in the run's order, ascending.
        documents: Numbers of documents, ascending, by the dataset's prefix.
    """

    numbers: list[int]
    documents: dict[str, list[int]]

    @classmethod
    def at(cls, dataset: Any, positions: Iterable[int]) -> Samples:
        """Those at places in the run's order; `dataset` as for :func:`documents`."""
        numbers = sorted(positions)
        by_path: dict[str, set[int]] = {}
        for number in numbers:
            path, found = documents(dataset, number)
            by_path.setdefault(path, set()).update(found)
        return cls(numbers, {path: sorted(by_path[path]) for path in sorted(by_path)})

    @property
    def words(self) -> str:
        """`samples 4 to 7 (documents 1, 9 of PREFIX)`; very many numbers are cut short."""
        paths = (
            f"{_ranges('document', found)} of {path}" for path, found in self.documents.items()
        )
        return f"{_ranges('sample', self.numbers)} ({'; '.join(paths)})"


def _ranges(noun: str, numbers: Sequence[int]) -> str:
    """`sample 3`, `samples 3, 5 to 9`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    words = [" to ".join(str(end) for end in run) for run in runs]
    if len(words) > _MAX_RANGES:
        words = [*words[:_MAX_RANGES], f"... {len(numbers)} in all"]
    return f"{noun}{'s' if len(numbers) > 1 else ''} {', '.join(words)}"
