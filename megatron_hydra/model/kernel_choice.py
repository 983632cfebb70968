"""Which kernels run on this machine: `auto` looks, a choice that does not fit is an error."""

from __future__ import annotations

import os
from typing import Literal

import torch
from hydra_kernels.gated_delta_rule.documents import CHUNK_SIZE, most_rows
from hydra_kernels.gated_delta_rule.fla_kernels import check_head_dim
from hydra_kernels.la_preparation import api as la_preparation

from megatron_hydra.errors import UserError
from megatron_hydra.model.config import HydraConfig


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


def check_la_heads(config: HydraConfig, impl: str, layer_number: int, num_heads: int) -> None:
    """See that a layer's LA heads can run on the kernels chosen, before any of them does.

    Args:
        config: The model's configuration.
        impl: What :func:`choose_la_kernel` chose.
        layer_number: Counts from 1, as Megatron's.
        num_heads: LA heads of the layer on this rank.

    Raises:
        UserError: Names the layer, its heads, what does not fit and what to change.
    """
    if impl != "fla" or not num_heads:
        return
    length = config.seq_length // config.context_parallel_size
    is_fused, remedy = choose_fused_kernels(config.fused_kernels) == "triton", ""
    try:
        check_head_dim(config.kv_channels)
        most_rows(length, -(-length // CHUNK_SIZE), config.kv_channels)
        if is_fused:
            remedy = "; set fused_kernels to 'reference'"
            la_preparation.check_head_dim(config.kv_channels)
    except ValueError as error:
        raise UserError(
            f"layer {layer_number - 1} has {num_heads} LA heads of dimension {config.kv_channels}, "
            f"which cannot run: {error}{remedy}"
        ) from error
