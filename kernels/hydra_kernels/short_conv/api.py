"""The short convolution's public function: checks its input, calls the implementation named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch.nn.functional as F

from hydra_kernels.device import check_device
from hydra_kernels.packed import check_cu_seqlens, state_of_each_document
from hydra_kernels.short_conv import reference

if TYPE_CHECKING:
    from torch import Tensor

Impl = Literal["reference", "fla"]
Activation = Literal["silu"]


def short_conv(
    x: Tensor,
    weight: Tensor,
    *,
    initial_state: Tensor | None = None,
    activation: Activation | None = "silu",
    cu_seqlens: Tensor | None = None,
    impl: Impl,
) -> Tensor:
    """Depthwise causal convolution over time: token t sees tokens t - k + 1 to t of its channel.

    The input mixing of Gated DeltaNet (arXiv 2412.06464, section 3.4). Differentiable in every
    tensor. The state that continues a sequence is its last k - 1 inputs, which the caller has:
    `torch.cat((initial_state, x), 1)[:, -(k - 1):]`.

    Args:
        x: [b, t, c].
        weight: [c, k]; weight[:, -1] is the tap on the token itself.
        initial_state: [b, k - 1, c], the tokens before x, oldest first; None for zeros.
        activation: "silu" or None.
        cu_seqlens: [documents + 1] integer, where documents begin in a row that packs several
            (b = 1): 0, ascending, t. No token sees another document's; the initial state is the
            first document's. None for whole sequences.
        impl: "reference" is PyTorch on any device; "fla" is flash-linear-attention's Triton
            kernel, CUDA alone. Neither stands in for the other.

    Returns:
        [b, t, c] in x's dtype.

    Raises:
        ValueError: shapes that do not fit, an unknown impl or activation, CPU tensors for "fla".
        ImportError: impl="fla" without the package fla-core.
    """
    _check(x, weight, initial_state, activation, cu_seqlens)
    if impl == "reference":
        return reference.short_conv(x, weight, initial_state, activation, cu_seqlens)
    if impl == "fla":
        return _fla(x, weight, initial_state, activation, cu_seqlens)
    raise ValueError(f"impl must be one of {get_args(Impl)}, got {impl!r}")


def _fla(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """flash-linear-attention's Triton kernel."""
    check_device(x, "fla")
    from fla.modules.causal_conv1d import causal_conv1d

    if initial_state is not None:
        # fla keeps k inputs, [b, c, k], of which the oldest is never read again.
        initial_state = F.pad(initial_state.transpose(1, 2), (1, 0)).contiguous()
    if cu_seqlens is not None:
        initial_state = state_of_each_document(initial_state, len(cu_seqlens) - 1)
    y, _ = causal_conv1d(
        x, weight, initial_state=initial_state, activation=activation, cu_seqlens=cu_seqlens
    )
    return y


def _check(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise ValueError for shapes that do not fit one another or an unknown activation."""
    if activation not in (None, *get_args(Activation)):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x must be [b, t, c] with a token at least, got {tuple(x.shape)}")
    b, _, c = x.shape
    check_cu_seqlens(cu_seqlens, b)
    if weight.dim() != 2 or weight.shape[0] != c or weight.shape[1] == 0:
        raise ValueError(
            f"weight must be [{c}, k] to go with x {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    state_shape = (b, weight.shape[1] - 1, c)
    if initial_state is not None and tuple(initial_state.shape) != state_shape:
        raise ValueError(f"initial_state must be {state_shape}, got {tuple(initial_state.shape)}")
