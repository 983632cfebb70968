"""Heads as documents: every head of every row one after the other, in one row with a single head.

Kernels of the gated delta rule are compiled for a number of heads, for minutes, and a head plan has
another number in every layer. Vectors that lie head by head in memory, `[b, n, t, d]`, are without
a copy one packed row `[1, b n t, 1, d]` of b n documents, or of as many times more as a row packs;
so one compiled kernel serves every number of heads, and heads run side by side as documents do.

Legend: b sequences of the batch, n heads, t tokens of a sequence, d channels of a head. A row is
one head's tokens of one sequence, b n in all; it holds one document, or those that are packed.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

CHUNK_SIZE = 64
_MOST_ELEMENTS = 2**31 - 1  # an index of 32 bits, with which kernels count
# What is kept here is used in backward passes later, wherever it was first asked for.
_no_inference_tensors = torch.inference_mode(False)


class Documents:
    """Where the heads of some rows begin and end, as kernels want it.

    Args:
        boundaries: `[documents + 1]` int32 on the CPU, where the documents of each row begin: 0,
            ascending, t.
        num_rows: b n.
        device: Where the kernels run.
    """

    def __init__(self, boundaries: Tensor, num_rows: int, device: torch.device) -> None:
        self.boundaries, self.num_rows, self.device = boundaries, num_rows, device
        self.num_tokens = int(boundaries[-1])
        self.num_documents = len(boundaries) - 1
        self.kept: dict[str, Any] = {}  # what a kernel looks up of them once

    @cached_property
    @_no_inference_tensors
    def cu_seqlens_cpu(self) -> Tensor:
        """`[num_rows * documents + 1]` int32 on the CPU: 0, ascending, num_rows t."""
        return self.tile_boundaries(self.boundaries)

    @cached_property
    @_no_inference_tensors
    def cu_seqlens(self) -> Tensor:
        """The same on the device."""
        return self.cu_seqlens_cpu.to(self.device)

    def num_chunks(self, chunk_size: int = CHUNK_SIZE) -> int:
        """Chunks of so many tokens or fewer that the documents of a row are cut into."""
        key = f"chunks of {chunk_size}"
        if key not in self.kept:
            self.kept[key] = int((-(-self.boundaries.diff() // chunk_size)).sum())
        return self.kept[key]

    def tile(self, of_row: Tensor, step: int) -> Tensor:
        """Numbers `[...]` of one row for every row, `step` more from row to row."""
        return (of_row + torch.arange(self.num_rows, dtype=of_row.dtype)[:, None] * step).flatten()

    def tile_boundaries(self, of_row: Tensor) -> Tensor:
        """Boundaries of one row, 0 to their end, for all rows one after the other."""
        end = int(of_row[-1])
        return torch.cat((self.tile(of_row[:-1], end), of_row.new_tensor([self.num_rows * end])))


@lru_cache(maxsize=256)
@_no_inference_tensors
def whole_rows(num_rows: int, num_tokens: int, device: torch.device) -> Documents:
    """Each row one document of `num_tokens`."""
    return Documents(torch.tensor([0, num_tokens], dtype=torch.int32), num_rows, device)


_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@_no_inference_tensors
def packed_rows(cu_seqlens: Tensor, num_rows: int) -> Documents:
    """Each row packed with the documents of `cu_seqlens`, `[documents + 1]` on the device.

    The same tensor is read, which waits for the GPU, but once: layers should share it, and nobody
    change it.
    """
    if cu_seqlens not in _packed:
        _packed[cu_seqlens] = cu_seqlens.to("cpu", torch.int32, copy=True), {}
    boundaries, known = _packed[cu_seqlens]
    if num_rows not in known:
        known[num_rows] = Documents(boundaries, num_rows, cu_seqlens.device)
    return known[num_rows]


def one_row(x: Tensor) -> Tensor:
    """`[b, t, n, ...]` to `[1, b n t, 1, ...]`: no copy where it lies as `[b, n, t, ...]`."""
    return x.transpose(1, 2).flatten(0, 2).unsqueeze(0).unsqueeze(2).contiguous()


def most_rows(
    num_tokens: int, num_chunks: int, head_dim: int, most_chunks: int | None = None
) -> int:
    """The most rows of one call, so that no index of an element needs more than 32 bits.

    The largest tensors hold `head_dim` numbers for each token, and `head_dim` squared for each
    chunk: its state.

    Args:
        num_tokens: Of a row.
        num_chunks: Of a row.
        head_dim: The larger of keys' and values'.
        most_chunks: Of all rows of a call; None for any number.

    Raises:
        ValueError: If a single row is too long.
    """
    most = _MOST_ELEMENTS // max(num_tokens * head_dim, num_chunks * head_dim**2)
    if most_chunks is not None:
        most = min(most, most_chunks // num_chunks)
    if most < 1:
        limit = "" if most_chunks is None else f", and {most_chunks} chunks"
        raise ValueError(
            f"a head's {num_tokens} tokens of dimension {head_dim} in {num_chunks} chunks are more "
            f"than a kernel counts: {_MOST_ELEMENTS} numbers, of tokens or of the chunks' states"
            f"{limit}; cut the sequence by context parallelism, or pack fewer documents"
        )
    return most
