"""The head fusion's public function: checks its input, calls the implementation named."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

import torch

from hydra_kernels.device import check_device
from hydra_kernels.head_fusion import reference

if TYPE_CHECKING:
    from torch import Tensor

Impl = Literal["reference", "triton"]
Activation = Literal["sigmoid2", "silu"]


def head_fusion(
    fa: Tensor,
    la: Tensor,
    fa_gate: Tensor | None,
    la_gate: Tensor | None,
    head_scale: Tensor | None,
    positions: Tensor,
    *,
    eps: float | None,
    la_activation: Activation = "silu",
    empty_gradients: Callable[[], list[Tensor]] | None = None,
    impl: Impl,
) -> Tensor:
    """Norm, gate and scale each head, and lay FA and LA heads out in one order.

        out[positions[i]] = scale_i * gate(z_i) * x_i / sqrt(mean(x_i^2) + eps)

    for head i of [FA heads..., LA heads...] (arXiv 2606.20097, Eq 13-14; the gate after the norm
    as in Gated DeltaNet, arXiv 2412.06464). Computed in float32, rounded once. Differentiable in
    every floating-point tensor; the gradients of fa and la lie in memory as fa and la do.

    Args:
        fa: [s, b, n_fa, d]; n_fa may be 0.
        la: [s, b, n_la, d] in fa's dtype; n_la may be 0, n = n_fa + n_la may not.
        fa_gate: z of the FA heads, shape and dtype as fa; its gate is 2 sigmoid(z), 1 at zero.
            None for no gate.
        la_gate: z of the LA heads, shape and dtype as la; None for no gate.
        head_scale: [n], float32 recommended, in the order of the output; None for 1.
        positions: [n] integer, the place of each head in the output, FA heads first: each of
            0 to n - 1 once. Its values are the caller's: reading them would stop a GPU.
        eps: added to the mean square; None for no norm.
        la_activation: the LA heads' gate: "silu" is z sigmoid(z), "sigmoid2" as the FA heads'.
        empty_gradients: called once in each backward pass, makes the tensors that the gradients of
            fa_gate and la_gate (of those given) are written to, so that a caller who joins them
            with others need not copy them; shaped and typed as these, stride 1 in d.
            "reference" does not call it.
        impl: "reference" is PyTorch on any device. "triton" is one kernel forward, one and a small
            sum backward; it saves its inputs and one float32 number per head and token, takes any
            strides as long as d's is 1, and needs CUDA or Triton's interpreter. Neither stands in
            for the other.

    Returns:
        [s, b, n * d], contiguous, in fa's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown activation or impl; for
            "triton" CPU tensors outside the interpreter, float64, a stride of d other than 1.
    """
    _check(fa, la, fa_gate, la_gate, head_scale, positions)
    if la_activation not in get_args(Activation):
        raise ValueError(
            f"la_activation must be one of {get_args(Activation)}, got {la_activation!r}"
        )
    if eps is not None and not eps > 0:
        raise ValueError(f"eps must be above 0, or None for no norm, got {eps}")
    if impl == "reference":
        return reference.head_fusion(
            fa, la, fa_gate, la_gate, head_scale, positions, eps, la_activation
        )
    if impl == "triton":
        _check_for_triton(fa, la, fa_gate, la_gate)
        from hydra_kernels.head_fusion import triton_head_fusion

        return triton_head_fusion.head_fusion(
            fa, la, fa_gate, la_gate, head_scale, positions, eps, la_activation, empty_gradients
        )
    raise ValueError(f"impl must be one of {get_args(Impl)}, got {impl!r}")


def _check(
    fa: Tensor,
    la: Tensor,
    fa_gate: Tensor | None,
    la_gate: Tensor | None,
    head_scale: Tensor | None,
    positions: Tensor,
) -> None:
    """Raise ValueError where a shape, dtype or device does not follow from fa's and la's."""
    fits = fa.dim() == la.dim() == 4
    if not fits or fa.shape[:2] != la.shape[:2] or fa.shape[3] != la.shape[3]:
        raise ValueError(
            "fa and la must be [s, b, n_fa, d] and [s, b, n_la, d], "
            f"got {tuple(fa.shape)} and {tuple(la.shape)}"
        )
    s, b, n_fa, d = fa.shape
    num_heads = n_fa + la.shape[2]
    if 0 in (s, b, num_heads, d):
        raise ValueError(
            "fa and la must have a token, a head and a channel at least, "
            f"got {tuple(fa.shape)} and {tuple(la.shape)}"
        )
    for name, gate, like in (("fa_gate", fa_gate, fa), ("la_gate", la_gate, la)):
        if gate is not None and gate.shape != like.shape:
            raise ValueError(f"{name} must be {tuple(like.shape)}, got {tuple(gate.shape)}")
    for name, x in (("la", la), ("fa_gate", fa_gate), ("la_gate", la_gate)):
        if x is not None and (x.dtype, x.device) != (fa.dtype, fa.device):
            raise ValueError(
                f"{name} must be {fa.dtype} on {fa.device} as fa is, got {x.dtype} on {x.device}"
            )
    if head_scale is not None and head_scale.shape != (num_heads,):
        raise ValueError(f"head_scale must be [{num_heads}], got {tuple(head_scale.shape)}")
    if positions.shape != (num_heads,) or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"positions must be [{num_heads}] int32 or int64, "
            f"got {tuple(positions.shape)} {positions.dtype}"
        )


def _check_for_triton(*tensors: Tensor | None) -> None:
    """Raise ValueError for a tensor that the kernels do not take."""
    for x in tensors:
        if x is None:
            continue
        check_device(x, "triton")
        if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(
                f"impl='triton' takes bfloat16, float16 and float32, got {x.dtype}; "
                "for others name impl='reference'"
            )
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise ValueError(f"impl='triton' needs stride 1 in d, got strides {x.stride()}")
