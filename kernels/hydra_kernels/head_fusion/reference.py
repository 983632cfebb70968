"""The head fusion in PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor


def head_fusion(
    fa: Tensor,
    la: Tensor,
    fa_gate: Tensor | None,
    la_gate: Tensor | None,
    head_scale: Tensor | None,
    positions: Tensor,
    eps: float | None,
    la_activation: str,
) -> Tensor:
    """As `api.head_fusion`; in float32, in float64 for float64 input."""
    branches = (
        _norm_and_gate(fa, fa_gate, eps, "sigmoid2"),
        _norm_and_gate(la, la_gate, eps, la_activation),
    )
    heads = torch.cat(branches, dim=2).index_select(2, positions.argsort())
    if head_scale is not None:
        heads = heads * head_scale[:, None]
    return heads.to(fa.dtype).flatten(2)


def _norm_and_gate(x: Tensor, gate: Tensor | None, eps: float | None, activation: str) -> Tensor:
    """[s, b, n, d] of one kind, in the computing dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x = x.to(dtype)
    if eps is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if gate is None:
        return x
    gate = gate.to(dtype)
    return x * (F.silu(gate) if activation == "silu" else 2.0 * gate.sigmoid())
