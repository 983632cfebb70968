"""Layouts that a model may be trained at, and the batches that all of them train on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_hydra.model.config import recompute_fields
from megatron_hydra.model.sequence import packed_sequence


@dataclass(frozen=True)
class Layout:
    """How one model and one batch are spread over ranks; data parallel is what is left."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int | None = None
    """Model chunks a pipeline rank; None for one."""
    first_stage_layers: int | None = None
    """Layers of the first pipeline stage, where the stages are uneven."""
    sequence_parallel: bool = False
    placement: str = "balanced"
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    """Gradients are summed as they come, in buckets so small that there are several."""
    num_micro_batches: int = 1
    recompute: str | None = None
    """`full`, `selective` or None, as Megatron's `recompute_granularity`."""
    packed: bool = False
    """Each row of the batch is packed into one sequence of documents."""

    @property
    def name(self) -> str:
        """Short, such as `tp2 cp2 sp by_type`; `dp` where the batch alone is split."""
        sizes = ("tp", "cp", "pp", "vpp")
        words = [f"{size}{getattr(self, size)}" for size in sizes if (getattr(self, size) or 1) > 1]
        if self.first_stage_layers is not None:
            words.append(f"first{self.first_stage_layers}")
        if self.sequence_parallel:
            words.append("sp")
        if self.tp > 1:
            words.append(self.placement)
        if self.distributed_optimizer:
            words.append("distopt")
        if self.overlap_grad_reduce:
            words.append("overlap")
        if self.num_micro_batches > 1:
            words.append(f"micro{self.num_micro_batches}")
        if self.recompute:
            words.append(f"recompute={self.recompute}")
        if self.packed:
            words.append("packed")
        return " ".join(words if self.model_ranks > 1 else ["dp", *words])

    @property
    def model_ranks(self) -> int:
        """Ranks that share one replica of the model and one of its batches."""
        return self.tp * self.cp * self.pp

    def config_fields(self) -> dict[str, Any]:
        """The fields of HydraConfig that this layout decides."""
        return dict(
            tensor_model_parallel_size=self.tp,
            context_parallel_size=self.cp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vpp,
            num_layers_in_first_pipeline_stage=self.first_stage_layers,
            sequence_parallel=self.sequence_parallel,
            placement=self.placement,
            # Losses are sums over tokens, so that no split of the batch shows.
            calculate_per_token_loss=True,
            **recompute_fields(self.recompute),
        )


@dataclass(frozen=True)
class Document:
    """Tokens, labels (int64) and loss mask (float32), each `[length]`."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Batch:
    """Rows of documents; a row is a micro-batch's unit, packed or a document of its own."""

    rows: tuple[tuple[Document, ...], ...]

    @property
    def documents(self) -> tuple[Document, ...]:
        """All documents in order."""
        return tuple(itertools.chain.from_iterable(self.rows))

    def alone(self) -> Batch:
        """The same documents, each a row of its own."""
        return Batch(tuple((document,) for document in self.documents))


def random_batch(row_lengths: Sequence[Sequence[int]], vocab_size: int) -> Batch:
    """Random documents.

    A tenth of the tokens is masked out of the loss, so that equal parts of a batch hold different
    numbers of tokens: a mean of means is not the mean.

    Args:
        row_lengths: The documents' lengths, row by row, in tokens.
        vocab_size: Token ids are below.
    """
    generator = torch.Generator().manual_seed(0)

    def document(length: int) -> Document:
        tokens = torch.randint(vocab_size, (length + 1,), generator=generator)
        mask = torch.rand(length, generator=generator) > 0.1
        mask[0] = True
        return Document(tokens[:-1], tokens[1:], mask.float())

    return Batch(tuple(tuple(document(length) for length in row) for row in row_lengths))


@dataclass(frozen=True)
class MicroBatch:
    """What one context-parallel rank sees of some rows; all tensors `[rows, local tokens]`.

    `document` and `place` say which document (index in the whole batch; -1 is padding) and which
    token of it stands where.
    """

    tokens: Tensor
    positions: Tensor
    labels: Tensor
    loss_mask: Tensor
    document: Tensor
    place: Tensor
    packed_seq_params: PackedSeqParams | None


def micro_batches(
    batch: Batch, layout: Layout, dp_rank: int, dp_size: int, cp_rank: int
) -> list[MicroBatch]:
    """One rank's micro-batches, in order.

    Unpacked rows are split over context-parallel ranks in Megatron's zig-zag order; of packed
    rows each document is zig-zagged on its own, padded to a multiple of twice the ranks, as
    Transformer Engine does it.
    """
    assert len(batch.rows) % (dp_size * layout.num_micro_batches) == 0, (layout, len(batch.rows))
    per_rank = len(batch.rows) // dp_size
    rows_each = per_rank // layout.num_micro_batches
    offsets = [0, *itertools.accumulate(len(row) for row in batch.rows)]
    length = row_length(batch, layout)
    result = []
    for start in range(dp_rank * per_rank, (dp_rank + 1) * per_rank, rows_each):
        rows = [
            _lay_out_row(batch.rows[row], offsets[row], layout, length, cp_rank)
            for row in range(start, start + rows_each)
        ]
        tensors = (torch.stack(parts) for parts in zip(*(row[0] for row in rows), strict=True))
        assert rows_each == 1 or not layout.packed
        result.append(MicroBatch(*tensors, rows[0][1]))
    return result


def row_length(batch: Batch, layout: Layout) -> int | None:
    """Tokens of a row over all context-parallel ranks; None where rows differ (one rank only)."""
    lengths = [sum(_padded_lengths(row, layout, None)) for row in batch.rows]
    unit = layout.tp * (2 * layout.cp if layout.cp > 1 else 1)
    if layout.packed:
        return -(-max(lengths) // unit) * unit
    if len(set(lengths)) > 1:
        assert layout.model_ranks == 1
        return None
    return lengths[0]


def local_index(padded_lengths: Sequence[int], cp_size: int, cp_rank: int) -> Tensor:
    """Which tokens of a row a context-parallel rank holds: of each document chunks r and 2n-1-r."""
    parts, start = [], 0
    for length in padded_lengths:
        chunks = torch.arange(start, start + length).view(2 * cp_size, -1)
        parts += [chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]]
        start += length
    return torch.cat(parts)


def _padded_lengths(row: Sequence[Document], layout: Layout, total: int | None) -> list[int]:
    unit = 2 * layout.cp if layout.cp > 1 and layout.packed else 1
    lengths = [-(-len(document) // unit) * unit for document in row]
    if total is not None:
        lengths[-1] += total - sum(lengths)
    return lengths


def _lay_out_row(
    row: Sequence[Document], first_document: int, layout: Layout, total: int | None, cp_rank: int
) -> tuple[tuple[Tensor, ...], PackedSeqParams | None]:
    padded = _padded_lengths(row, layout, total)
    columns: list[list[Tensor]] = [[], [], [], [], [], []]
    for index, (document, length) in enumerate(zip(row, padded, strict=True)):
        own = torch.arange(length) < len(document)
        place = torch.arange(length)
        values = (
            _pad(document.tokens, length),
            place,
            _pad(document.labels, length),
            _pad(document.loss_mask, length),
            torch.where(own, first_document + index, -1),
            place,
        )
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    whole = [torch.cat(column) for column in columns]
    if layout.cp > 1:
        index_here = local_index(padded, layout.cp, cp_rank)
        whole = [column[index_here] for column in whole]
    params = _packed_params([len(d) for d in row], padded) if layout.packed else None
    return tuple(whole), params


def _pad(values: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - len(values)))


def _packed_params(lengths: list[int], padded: list[int]) -> PackedSeqParams:
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def cumulative(values: list[int]) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(values)], device=device)

    padding = None if lengths == padded else cumulative(padded)
    return packed_sequence(cumulative(lengths), padding)
