"""The head fusion in Triton: one kernel forward, one backward, each a single pass over memory.

Legend: s tokens of a sequence, b batch, n = n_fa + n_la heads, d channels of a head.

A program handles a few tokens of one head of one sequence. So a head's kind, its scale and its
place in the output are scalars of the program, rows are runs of d channels whatever the strides
(256 bytes at d = 128 in bf16: 16 threads with 16 bytes each, whose sums stay within a warp), and
no index is computed by channel. Neighbouring programs have neighbouring heads of the same tokens,
so that together they walk through memory in order.

Saved beside the inputs: r = 1 / sqrt(mean(x^2) + eps), [n, b, s] float32. With y = scale g(z) x r,
w = g(z) dy and c = sum over channels of w x r,

    dx = scale r (w - x r c / d),    dz = scale g'(z) x r dy,    dscale = sum over tokens of c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from hydra_kernels.gradients import gradient_memory

if TYPE_CHECKING:
    from torch import Tensor

# Elements of a program's tile: 16 per thread, so that two or three operands in float32 leave room
# for enough programs on a multiprocessor to keep its share of the memory busy.
_TILE = 2048
_NUM_WARPS = 4
# Sizes that vary with batch, plan and length: no kernel is compiled anew for any of them.
_UNSPECIALIZED = ["num_tokens", "num_fa", "num_heads"]


@triton.jit
def _gate(z, ACTIVATION: tl.constexpr):
    """The gate and its derivative at z; what is not used is not computed."""
    sigmoid = 1.0 / (1.0 + tl.exp(-z))
    if ACTIVATION == "silu":
        gate = z * sigmoid
        slope = sigmoid * (1.0 + z * (1.0 - sigmoid))
    else:
        gate = 2.0 * sigmoid
        slope = gate * (1.0 - sigmoid)
    return gate, slope


@triton.jit
def _tile(first_token, num_tokens, D: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens [BLOCK], channels [1, PAD], and which are there: of tokens, and of both."""
    # 64 bits: half a million tokens of an in-projection's rows pass 2^31 elements.
    tokens = first_token + tl.arange(0, BLOCK).to(tl.int64)
    channels = tl.arange(0, PAD)[None, :]
    live = tokens < num_tokens
    mask = live[:, None]
    if D != PAD:
        mask = mask & (channels < D)
    return tokens, channels, live, mask


@triton.jit
def _position_and_scale(position, head_scale):
    """A head's place in the output (position points to it), and its scale."""
    place = tl.load(position)
    scale = 1.0
    if head_scale is not None:
        scale = tl.load(head_scale + place).to(tl.float32)
    return place, scale


@triton.jit
def _forward_head(
    x, x_stride, z, z_start, z_stride, out, out_stride, rms_inverse, rms_start,
    position, head_scale, first_token, num_tokens, eps,
    D: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One head's rows.

    Strides count from token to token. x points to the head's token 0; z and rms_inverse, which
    may be None, to their tensor, in which the head's token 0 is at the start named beside; out to
    token 0 of the sequence's first head.
    """
    tokens, channels, live, mask = _tile(first_token, num_tokens, D, PAD, BLOCK)
    rows = tokens[:, None]
    # All wide reads first: whatever follows waits for one of them, or for a number of the head's.
    y = tl.load(x + rows * x_stride + channels, mask=mask, other=0.0).to(tl.float32)
    gate = 1.0
    if z is not None:
        z += z_start + rows * z_stride + channels
        gate, _ = _gate(tl.load(z, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    place, scale = _position_and_scale(position, head_scale)
    if eps is not None:
        r = tl.rsqrt(tl.sum(y * y, axis=1) / D + eps)
        tl.store(rms_inverse + rms_start + tokens, r, mask=live)
        y = y * (r * scale)[:, None]
    else:
        y = y * scale
    out += place * D + rows * out_stride + channels
    tl.store(out, (y * gate).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _forward_kernel(
    fa, la, fa_gate, la_gate, head_scale, positions, out, rms_inverse,
    fa_s, fa_b, fa_n, la_s, la_b, la_n,
    fa_gate_s, fa_gate_b, fa_gate_n, la_gate_s, la_gate_b, la_gate_n,
    num_tokens, num_fa, num_heads, eps,
    D: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
    LA_ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Grid [token blocks * heads, b]; heads run fastest."""
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    first_token = (tl.program_id(0) // num_heads).to(tl.int64) * BLOCK
    batch, num_batch = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    out += batch * num_heads * D
    out_stride = num_batch * num_heads * D
    rms_start = (head * num_batch + batch) * num_tokens
    position = positions + head
    if head < num_fa:
        _forward_head(
            fa + batch * fa_b + head * fa_n, fa_s,
            fa_gate, batch * fa_gate_b + head * fa_gate_n, fa_gate_s,
            out, out_stride, rms_inverse, rms_start,
            position, head_scale, first_token, num_tokens, eps, D, PAD, BLOCK, "sigmoid2",
        )  # fmt: skip
    else:
        head -= num_fa
        _forward_head(
            la + batch * la_b + head * la_n, la_s,
            la_gate, batch * la_gate_b + head * la_gate_n, la_gate_s,
            out, out_stride, rms_inverse, rms_start,
            position, head_scale, first_token, num_tokens, eps, D, PAD, BLOCK, LA_ACTIVATION,
        )  # fmt: skip


@triton.jit
def _backward_head(
    dy, dy_stride, x, x_stride, z, z_start, z_stride, dx, dx_stride, dz, dz_start, dz_stride,
    rms_inverse, rms_start, scale_parts, part, part_stride,
    position, head_scale, first_token, num_tokens,
    D: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One head's rows, pointers as in `_forward_head`, and their share of the scale's gradient."""
    tokens, channels, live, mask = _tile(first_token, num_tokens, D, PAD, BLOCK)
    rows = tokens[:, None]
    normed = tl.load(x + rows * x_stride + channels, mask=mask, other=0.0).to(tl.float32)
    if z is not None:
        z += z_start + rows * z_stride + channels
        gate, slope = _gate(tl.load(z, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    place, scale = _position_and_scale(position, head_scale)
    dy += place * D + rows * dy_stride + channels
    w = tl.load(dy, mask=mask, other=0.0).to(tl.float32)
    if rms_inverse is not None:
        r = tl.load(rms_inverse + rms_start + tokens, mask=live, other=0.0)
        normed = normed * r[:, None]
    if z is not None:
        dz += dz_start + rows * dz_stride + channels
        tl.store(dz, (scale * slope * normed * w).to(dz.dtype.element_ty), mask=mask)
        w = w * gate
    c = tl.sum(w * normed, axis=1)
    if rms_inverse is not None:
        grad = (w - normed * (c / D)[:, None]) * (r * scale)[:, None]
    else:
        grad = w * scale
    dx += rows * dx_stride + channels
    tl.store(dx, grad.to(dx.dtype.element_ty), mask=mask)
    if head_scale is not None:
        tl.store(scale_parts + place * part_stride + part, tl.sum(c, axis=0))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _backward_kernel(
    dy, fa, la, fa_gate, la_gate, head_scale, positions, rms_inverse,
    dfa, dla, dfa_gate, dla_gate, scale_parts,
    dy_s, dy_b, fa_s, fa_b, fa_n, la_s, la_b, la_n,
    fa_gate_s, fa_gate_b, fa_gate_n, la_gate_s, la_gate_b, la_gate_n,
    dfa_s, dfa_b, dfa_n, dla_s, dla_b, dla_n,
    dfa_gate_s, dfa_gate_b, dfa_gate_n, dla_gate_s, dla_gate_b, dla_gate_n,
    num_tokens, num_fa, num_heads,
    D: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
    LA_ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Grid as `_forward_kernel`."""
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    block = (tl.program_id(0) // num_heads).to(tl.int64)
    first_token, num_blocks = block * BLOCK, tl.num_programs(0) // num_heads
    batch, num_batch = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    dy += batch * dy_b
    rms_start = (head * num_batch + batch) * num_tokens
    part, part_stride = batch * num_blocks + block, num_batch * num_blocks
    position = positions + head
    if head < num_fa:
        _backward_head(
            dy, dy_s, fa + batch * fa_b + head * fa_n, fa_s,
            fa_gate, batch * fa_gate_b + head * fa_gate_n, fa_gate_s,
            dfa + batch * dfa_b + head * dfa_n, dfa_s,
            dfa_gate, batch * dfa_gate_b + head * dfa_gate_n, dfa_gate_s,
            rms_inverse, rms_start, scale_parts, part, part_stride,
            position, head_scale, first_token, num_tokens, D, PAD, BLOCK, "sigmoid2",
        )  # fmt: skip
    else:
        head -= num_fa
        _backward_head(
            dy, dy_s, la + batch * la_b + head * la_n, la_s,
            la_gate, batch * la_gate_b + head * la_gate_n, la_gate_s,
            dla + batch * dla_b + head * dla_n, dla_s,
            dla_gate, batch * dla_gate_b + head * dla_gate_n, dla_gate_s,
            rms_inverse, rms_start, scale_parts, part, part_stride,
            position, head_scale, first_token, num_tokens, D, PAD, BLOCK, LA_ACTIVATION,
        )  # fmt: skip


class _HeadFusion(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        fa: Tensor,
        la: Tensor,
        fa_gate: Tensor | None,
        la_gate: Tensor | None,
        head_scale: Tensor | None,
        positions: Tensor,
        eps: float | None,
        la_activation: str,
        empty_gradients: Callable[[], list[Tensor]] | None,
    ) -> Tensor:
        s, b, n_fa, d = fa.shape
        n = n_fa + la.shape[2]
        out = torch.empty(s, b, n * d, dtype=fa.dtype, device=fa.device)
        rms_inverse = None
        if eps is not None:
            rms_inverse = torch.empty(n, b, s, dtype=torch.float32, device=fa.device)
        inputs = (fa, la, fa_gate, la_gate)
        grid, sizes = _launch(fa, n)
        _forward_kernel[grid](
            *inputs, head_scale, positions, out, rms_inverse,
            *(stride for x in inputs for stride in _strides(x)),
            s, n_fa, n, eps, **sizes,
            LA_ACTIVATION=la_activation,
        )  # fmt: skip
        ctx.save_for_backward(*inputs, head_scale, positions, rms_inverse)
        ctx.la_activation, ctx.empty_gradients = la_activation, empty_gradients
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, head_scale, positions, rms_inverse = ctx.saved_tensors
        fa, la, fa_gate, la_gate = inputs
        s, b, n_fa, d = fa.shape
        n = n_fa + la.shape[2]
        if dy.stride(2) != 1:  # such as the expanded gradient of a sum
            dy = dy.contiguous()
        grid, sizes = _launch(fa, n)
        # Strides as fa's and la's: what made them takes its gradient without a copy.
        dfa, dla = torch.empty_like(fa), torch.empty_like(la)
        dfa_gate, dla_gate = gradient_memory(
            (fa_gate, la_gate),
            ctx.empty_gradients,
            lambda z: torch.empty(z.shape, dtype=z.dtype, device=z.device),
        )
        scale_parts = None
        if head_scale is not None:
            num_parts = grid[0] // n * b
            scale_parts = torch.empty(n, num_parts, dtype=torch.float32, device=fa.device)
        _backward_kernel[grid](
            dy, *inputs, head_scale, positions, rms_inverse,
            dfa, dla, dfa_gate, dla_gate, scale_parts,
            *_strides(dy)[:2],
            *(
                stride
                for x in (*inputs, dfa, dla, dfa_gate, dla_gate)
                for stride in _strides(x)
            ),
            s, n_fa, n, **sizes,
            LA_ACTIVATION=ctx.la_activation,
        )  # fmt: skip
        dscale = None if scale_parts is None else scale_parts.sum(1).to(head_scale.dtype)
        return dfa, dla, dfa_gate, dla_gate, dscale, None, None, None, None


def head_fusion(
    fa: Tensor,
    la: Tensor,
    fa_gate: Tensor | None,
    la_gate: Tensor | None,
    head_scale: Tensor | None,
    positions: Tensor,
    eps: float | None,
    la_activation: str,
    empty_gradients: Callable[[], list[Tensor]] | None = None,
) -> Tensor:
    """As `api.head_fusion`, whose checks have passed."""
    return _HeadFusion.apply(
        fa, la, fa_gate, la_gate, head_scale, positions, eps, la_activation, empty_gradients
    )


def _launch(fa: Tensor, num_heads: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and the sizes that a kernel is compiled for."""
    s, b, _, d = fa.shape
    pad = triton.next_power_of_2(d)
    block = max(1, _TILE // pad)
    sizes = dict(D=d, PAD=pad, BLOCK=block, num_warps=_NUM_WARPS)
    return (triton.cdiv(s, block) * num_heads, b), sizes


def _strides(x: Tensor | None) -> list[int]:
    """Strides of s, b and n; 0 where there is nothing to step to.

    PyTorch leaves the stride of a dimension of size 1 open; one that is not divisible by 16 would
    cost the kernel its wide loads, and a compilation.
    """
    if x is None:
        return [0, 0, 0]
    return [x.stride(i) if x.shape[i] > 1 else 0 for i in range(min(3, x.dim()))]
