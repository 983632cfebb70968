"""The preparation in PyTorch, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor


def la_preparation(
    x: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    conv_weight: Tensor | None,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    a_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor | None,
    num_heads: int,
    norm_eps: float,
) -> tuple[Tensor | None, ...]:
    """In float32 at least, rounded at the end. Args and returns: as `api.la_preparation`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    mixed = x.to(dtype)
    if conv_weight is not None:
        state = None if initial_state is None else initial_state.to(dtype)
        mixed = F.silu(_convolve(mixed, conv_weight.to(dtype), state, cu_seqlens))
    q, k, v = mixed.unflatten(-1, (3, num_heads, -1)).unbind(2)
    if q_norm_weight is not None:
        q, k = (
            F.rms_norm(t, t.shape[-1:], weight.to(dtype), norm_eps)
            for t, weight in ((q, q_norm_weight), (k, k_norm_weight))
        )
    if cos is not None:
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    g = None if a is None else -a_log.to(dtype).exp() * F.softplus(a.to(dtype) + dt_bias.to(dtype))
    beta = None if b is None else b.to(dtype).sigmoid()
    q, k, v = (t.to(x.dtype) for t in (q, k, v))
    return q, k, v, g, beta


def _convolve(
    x: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """y[t] = sum over i of weight[:, i] x[t - (k - 1) + i], within t's document.

    Shifted multiply-adds rather than `F.conv1d`: no transposes of [b, t, c], a third less time
    forward and backward on a CPU at k = 4.
    """
    num_tokens, num_taps = x.shape[1], weight.shape[1]
    if initial_state is None:
        padded = F.pad(x, (0, 0, num_taps - 1, 0))
    else:
        padded = torch.cat((initial_state, x), dim=1)
    reach = None if cu_seqlens is None else _reach(cu_seqlens, num_tokens, num_taps)
    y = None
    for i, tap in enumerate(weight.unbind(1)):
        seen = padded[:, i : i + num_tokens]
        if reach is not None:
            seen = seen.masked_fill((reach < num_taps - 1 - i)[:, None], 0.0)
        y = seen * tap if y is None else torch.addcmul(y, seen, tap)
    return y


def _reach(cu_seqlens: Tensor, num_tokens: int, num_taps: int) -> Tensor:
    """[t]: how many tokens back each token may see; in the first document as far as taps reach."""
    token = torch.arange(num_tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, token.to(cu_seqlens.dtype), right=True) - 1
    reach = token - cu_seqlens[document]
    return reach.masked_fill(document == 0, num_taps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE of [b, t, n, d] by angles [r, t, d / 2]."""
    repeats = x.shape[0] // cos.shape[0]
    cos, sin = (t.repeat_interleave(repeats, 0)[:, :, None].to(x.dtype) for t in (cos, sin))
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
