"""Which kernels run on this machine: `auto` looks, a choice that does not fit is an error."""

from __future__ import annotations

import os
from typing import Literal

import torch

from megatron_hydra.errors import UserError


def choose_la_kernel(la_kernel: str) -> Literal["reference", "fla"]:
    """Resolve `HydraConfig.la_kernel`.

    Raises:
        UserError: For `fla` without a GPU, or `reference` where there is one.
    """
    on_gpu = torch.cuda.is_available()
    if la_kernel == "auto":
        return "fla" if on_gpu else "reference"
    if la_kernel == "fla" and not on_gpu:
        raise UserError("la_kernel is 'fla', whose Triton kernels need a GPU; use 'auto' here")
    if la_kernel == "reference" and on_gpu:
        raise UserError(
            "la_kernel is 'reference', which is for machines without a GPU; use 'auto' here"
        )
    return la_kernel  # type: ignore[return-value]


def choose_fused_kernels(fused_kernels: str) -> Literal["reference", "triton"]:
    """Resolve `HydraConfig.fused_kernels`.

    Raises:
        UserError: For `triton` without a GPU; Triton's own interpreter counts as one.
    """
    on_gpu = torch.cuda.is_available()
    if fused_kernels == "auto":
        return "triton" if on_gpu else "reference"
    if fused_kernels == "triton" and not (on_gpu or os.environ.get("TRITON_INTERPRET") == "1"):
        raise UserError("fused_kernels is 'triton', which needs a GPU; use 'auto' here")
    return fused_kernels  # type: ignore[return-value]
