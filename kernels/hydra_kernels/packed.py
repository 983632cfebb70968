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


def state_of_each_document(first: Tensor | None, num_documents: int) -> Tensor | None:
    """Each row's first document's state `[rows, ...]` with zeros for its others, as fla wants it.

    Returns:
        `[rows * num_documents, ...]`, or None for None.
    """
    if first is None or num_documents == 1:
        return first
    others = first.new_zeros(len(first), num_documents - 1, *first.shape[1:])
    return torch.cat((first.unsqueeze(1), others), dim=1).flatten(0, 1)
