"""Rows that pack several documents: what the operators share about `cu_seqlens`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def check_cu_seqlens(cu_seqlens: Tensor | None, num_rows: int) -> None:
    """Raise ValueError unless `cu_seqlens` is [documents + 1] and goes with one row.

    Its values, 0, ascending, t, are the caller's: reading them would stop a GPU.
    """
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or num_rows != 1):
        raise ValueError(
            "cu_seqlens must be [documents + 1] and go with one row, "
            f"got {tuple(cu_seqlens.shape)} and {num_rows} rows"
        )


def state_of_each_document(first: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """The first document's state [1, ...] with zeros for the others, as fla wants it."""
    if first is None or cu_seqlens is None:
        return first
    return torch.cat((first, first.new_zeros(len(cu_seqlens) - 2, *first.shape[1:])))
