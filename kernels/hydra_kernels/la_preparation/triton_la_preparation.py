"""The preparation as two Triton kernels: the autograd function, and how they are launched.

Nothing is kept for the backward pass but the inputs: it convolves and normalises anew, since
reading x again costs less than writing and reading what lies between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from hydra_kernels.device import check_device
from hydra_kernels.gradients import gradient_memory
from hydra_kernels.la_preparation.api import check_head_dim
from hydra_kernels.la_preparation.triton_backward import backward_kernel
from hydra_kernels.la_preparation.triton_forward import forward_kernel
from hydra_kernels.la_preparation.triton_vectors import HEADS_PER_TILE, MAX_LAG, reach_kernel

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_NUM_WARPS = 4
# Elements of half a tile, for 4 x 32 threads. Backward, each element has 16 float32 values in
# registers: half as many elements let twice as many threads run.
_HALF_TILE_FORWARD, _HALF_TILE_BACKWARD = 512, 256
_MAX_STRIPS = 8
# Tokens of a strip. Longer ones read less twice (3 tokens per strip) and, backward, write fewer
# sums; shorter ones make enough programs for all multiprocessors of a GPU.
_SHORTEST, _LONGEST_FORWARD, _LONGEST_BACKWARD = 16, 64, 128
_ENOUGH_PROGRAMS = 700
_SUMS = 5  # a channel's: four taps and the norm's weight


def check(x: Tensor, num_heads: int, conv_weight: Tensor | None) -> None:
    """Raise ValueError for what the kernels do not take."""
    check_device(x, "triton")
    if x.dtype not in _DTYPES:
        raise ValueError(f"impl='triton' takes bfloat16, float16 or float32, got {x.dtype}")
    check_head_dim(x.shape[-1] // (3 * num_heads))
    if conv_weight is not None and conv_weight.shape[1] > MAX_LAG.value + 1:
        raise ValueError(
            f"impl='triton' takes up to {MAX_LAG.value + 1} taps, got {conv_weight.shape[1]}"
        )


class LAPreparation(torch.autograd.Function):
    """Arguments and results as `reference.la_preparation`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        conv_weight: Tensor | None,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        a_log: Tensor | None,
        dt_bias: Tensor | None,
        state: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        cu_seqlens: Tensor | None,
        num_heads: int,
        eps: float,
        empty_gradients: Callable[[], list[Tensor]] | None,
    ) -> tuple[Tensor | None, ...]:
        rows, num_tokens, channels = x.shape
        x, a, b = (_last_contiguous(t) for t in (x, a, b))
        small = (conv_weight, q_weight, k_weight, a_log, dt_bias, state, cos, sin)
        conv_weight, q_weight, k_weight, a_log, dt_bias, state, cos, sin = (
            None if t is None else t.contiguous() for t in small
        )
        if state is not None and state.shape[1] == 0:
            state = None
        reach = None if conv_weight is None else _reach(cu_seqlens, num_tokens)
        head_dim = channels // (3 * num_heads)
        vectors = torch.empty(
            3, rows, num_heads, num_tokens, head_dim, dtype=x.dtype, device=x.device
        )
        gates = (rows, num_heads, num_tokens)
        g = None if a is None else torch.empty(gates, dtype=torch.float32, device=x.device)
        beta = None if b is None else torch.empty(gates, dtype=torch.float32, device=x.device)
        inputs = (
            x, a, b, conv_weight, q_weight, k_weight, cos, sin, a_log, dt_bias, state, reach,
        )  # fmt: skip
        grid, strip, sizes = _launch(
            x, num_heads, conv_weight, _HALF_TILE_FORWARD, _LONGEST_FORWARD
        )
        forward_kernel[grid](
            *inputs, vectors, g, beta,
            *_strides(x), *_strides(a), *_strides(b),
            num_tokens, num_heads, rows // (1 if cos is None else cos.shape[0]), strip, eps,
            **sizes,
        )  # fmt: skip
        ctx.save_for_backward(*inputs)
        ctx.num_heads, ctx.eps, ctx.given_state = num_heads, eps, small[5] is not None
        ctx.empty_gradients = empty_gradients
        return tuple(_by_token(t) for t in (*vectors.unbind(), g, beta))

    @staticmethod
    def backward(
        ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, dg: Tensor | None, dbeta: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        inputs, num_heads = ctx.saved_tensors, ctx.num_heads
        x, a, b, conv_weight, q_weight, _, cos, _, _, _, state, _ = inputs
        rows, num_tokens, channels = x.shape
        grid, strip, sizes = _launch(
            x, num_heads, conv_weight, _HALF_TILE_BACKWARD, _LONGEST_BACKWARD
        )
        dx, da, db = gradient_memory((x, a, b), ctx.empty_gradients, _empty_like)
        dstate = (
            None if state is None else torch.empty(state.shape, dtype=state.dtype, device=x.device)
        )
        float32: dict[str, Any] = dict(dtype=torch.float32, device=x.device)
        partial = gate_partial = None
        if conv_weight is not None or q_weight is not None:
            partial = torch.empty(grid[1] * rows, _SUMS, channels, **float32)
        if a is not None:
            gate_partial = torch.empty(grid[1] * rows, 2, num_heads, **float32)
        upstream = (dq, dk, dv, None if a is None else dg, None if b is None else dbeta)
        backward_kernel[grid](
            *inputs, *(_by_head(t) for t in upstream),
            dx, da, db, dstate, partial, gate_partial,
            *_strides(x), *_strides(a), *_strides(b),
            *_strides(dx), *_strides(da), *_strides(db),
            num_tokens, num_heads, rows // (1 if cos is None else cos.shape[0]), strip, ctx.eps,
            **sizes,
        )  # fmt: skip
        if ctx.given_state and state is None:
            dstate = x.new_empty(rows, 0, channels)
        parameters = _parameter_gradients(inputs, partial, gate_partial, num_heads)
        return (dx, da, db, *parameters, dstate, *[None] * 6)


def _parameter_gradients(
    inputs: tuple[Tensor | None, ...],
    partial: Tensor | None,
    gate_partial: Tensor | None,
    num_heads: int,
) -> list[Tensor | None]:
    """Sum what the programs left, in an order that never changes.

    Returns:
        Gradients of conv_weight, q_weight, k_weight, a_log and dt_bias.
    """
    _, _, _, conv_weight, q_weight, k_weight, _, _, a_log, dt_bias, _, _ = inputs
    gradients: list[Tensor | None] = [None] * 5
    if partial is not None:
        sums = partial.sum(0)
        if conv_weight is not None:
            # By lag there, oldest tap first here.
            gradients[0] = sums[: conv_weight.shape[1]].flip(0).t().to(conv_weight.dtype)
        if q_weight is not None and k_weight is not None:
            by_head = sums[-1].view(3, num_heads, -1)
            gradients[1] = by_head[0].sum(0).to(q_weight.dtype)
            gradients[2] = by_head[1].sum(0).to(k_weight.dtype)
    if gate_partial is not None and a_log is not None and dt_bias is not None:
        sums = gate_partial.sum(0)
        gradients[3:] = [sums[0].to(a_log.dtype), sums[1].to(dt_bias.dtype)]
    return gradients


def _launch(
    x: Tensor, num_heads: int, conv_weight: Tensor | None, half_tile: int, longest: int
) -> tuple[tuple[int, int, int], int, dict[str, int]]:
    """Grid, tokens of a strip, and the sizes that a kernel is compiled for."""
    rows, num_tokens, channels = x.shape
    head_dim = channels // (3 * num_heads)
    half_block = triton.next_power_of_2(head_dim // 2)
    strips = max(1, min(_MAX_STRIPS, half_tile // (half_block * HEADS_PER_TILE.value)))
    tiles = triton.cdiv(2 * num_heads, HEADS_PER_TILE.value)
    tiles += triton.cdiv(num_heads, HEADS_PER_TILE.value) + 1
    strip = longest
    while strip > _SHORTEST:
        if rows * tiles * triton.cdiv(num_tokens, strips * strip) >= _ENOUGH_PROGRAMS:
            break
        strip //= 2
    sizes = dict(
        DIM=head_dim,
        HALF_BLOCK=half_block,
        STRIPS=strips,
        GATE_HEADS=max(16, triton.next_power_of_2(num_heads)),
        TAPS=0 if conv_weight is None else conv_weight.shape[1],
        num_warps=_NUM_WARPS,
    )
    return (tiles, triton.cdiv(num_tokens, strips * strip), rows), strip, sizes


def _reach(cu_seqlens: Tensor | None, num_tokens: int) -> Tensor | None:
    """`reach_kernel`'s result, None for whole sequences."""
    if cu_seqlens is None:
        return None
    reach = torch.empty(num_tokens, dtype=torch.int32, device=cu_seqlens.device)
    documents = len(cu_seqlens) - 1
    steps = 8 * triton.cdiv(documents.bit_length(), 8)  # few kernels for any number of documents
    reach_kernel[(triton.cdiv(num_tokens, 256),)](
        cu_seqlens.contiguous(), reach, num_tokens, documents, STEPS=steps, BLOCK=256
    )
    return reach


def _by_token(x: Tensor | None) -> Tensor | None:
    """A view `[rows, tokens, heads, ...]` of what lies `[rows, heads, tokens, ...]`."""
    return None if x is None else x.transpose(1, 2)


def _by_head(x: Tensor | None) -> Tensor | None:
    """The reverse; a copy only of what does not lie so."""
    return None if x is None else x.transpose(1, 2).contiguous()


def _last_contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, int]:
    """Of rows and tokens."""
    return (0, 0) if x is None else x.stride()[:2]


def _empty_like(x: Tensor) -> Tensor:
    """A dense tensor of x's shape that lies sequence first if x does."""
    rows, num_tokens, width = x.shape
    like: dict[str, Any] = dict(dtype=x.dtype, device=x.device)
    if x.stride(0) < x.stride(1):
        return torch.empty(num_tokens, rows, width, **like).transpose(0, 1)
    return torch.empty(rows, num_tokens, width, **like)
