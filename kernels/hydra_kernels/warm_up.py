"""What a layer's LA heads run, run once beforehand: compiled, it waits in the compilers' caches."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from hydra_kernels.gated_delta_rule import compilation
from hydra_kernels.gated_delta_rule.compilation import Mode, compile_once
from hydra_kernels.head_fusion import head_fusion
from hydra_kernels.la_preparation import la_preparation

NUM_HEADS = 16
_NUM_TAPS = 4
_MOST_TOKENS = 2**15


@cache
def warm_up(mode: Mode, device: torch.device) -> Path:
    """Compile the gated delta rule, LA preparation and head fusion of a mode, on a GPU.

    Returns:
        The file that says that the gated delta rule is compiled; missing if it cannot be written.
    """
    done = compile_once(mode, device)
    run_layer_operators(mode, device)
    return done


@cache
def load(mode: Mode, num_rows: int, num_tokens: int, device: torch.device) -> None:
    """Load what a layer calls into this process, compiled or else compiled now; once for a shape.

    Args:
        mode: The heads'.
        num_rows: Sequences times heads.
        num_tokens: Of a sequence; what more than 32,768 need besides is loaded when it is met.
        device: A GPU.
    """
    warm_up(mode, device)
    compilation.load(mode, num_rows, min(num_tokens, _MOST_TOKENS), device)


def run_layer_operators(mode: Mode, device: torch.device, num_tokens: int = 1024) -> None:
    """Our own kernels around the gated delta rule, forward and backward, whole rows and packed."""
    for is_packed in (False, True):
        _prepare(mode, num_tokens, is_packed, device)
    heads = [
        torch.zeros(
            1, 1, NUM_HEADS, mode.head_dim, dtype=mode.dtype, device=device
        ).requires_grad_()
        for _ in range(4)
    ]
    scale = torch.ones(2 * NUM_HEADS, device=device, requires_grad=True)
    order = torch.arange(2 * NUM_HEADS, device=device)
    head_fusion(*heads, scale, order, eps=1e-6, impl="triton").float().sum().backward()


def _prepare(mode: Mode, num_tokens: int, is_packed: bool, device: torch.device) -> None:
    head_dim = mode.head_dim
    channels = 3 * NUM_HEADS * head_dim

    def zeros(*shape: int, of: torch.dtype = mode.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=of, device=device, requires_grad=True)

    angles = torch.zeros(1, num_tokens, head_dim // 2, device=device)
    decay = {}
    if not mode.of_channels:  # which is PyTorch's
        decay = {
            "a": zeros(1, num_tokens, NUM_HEADS),
            "a_log": zeros(NUM_HEADS, of=torch.float32),
            "dt_bias": zeros(NUM_HEADS, of=torch.float32),
        }
    outputs = la_preparation(
        zeros(1, num_tokens, channels),
        num_heads=NUM_HEADS,
        **decay,
        b=zeros(1, num_tokens, NUM_HEADS),
        conv_weight=zeros(channels, _NUM_TAPS),
        initial_state=zeros(1, _NUM_TAPS - 1, channels) if mode.with_state else None,
        q_norm_weight=zeros(head_dim),
        k_norm_weight=zeros(head_dim),
        cos=angles.cos(),
        sin=angles.sin(),
        cu_seqlens=torch.tensor([0, num_tokens], device=device) if is_packed else None,
        impl="triton",
    )
    torch.stack([x.float().sum() for x in outputs if x is not None]).sum().backward()
