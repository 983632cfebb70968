"""What transformers takes from the package flash-attn, so that `flash_attention_2` runs without it.

On a GPU it is FlashAttention-2's own kernel, as PyTorch has it; on a CPU plain softmax in float64.
A causal mask is aligned to the last query and the last key, as in flash-attn 2.1 and later.

Legend: b rows, t queries, s keys of a row, n query heads, g heads of keys and values, d channels.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import modeling_flash_attention_utils as users
from transformers import modeling_utils

Window = tuple[int, int]
NO_WINDOW: Window = (-1, -1)
_CHECKS = ("is_flash_attn_2_available", "_flash_attn_2_can_dispatch", "_flash_attn_can_dispatch")
"""Where transformers asks for it, in the release of training and the newest."""
_LOADED = ("_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn")
_LOADED += ("_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn", "_loaded_implementation")
"""Where they keep what they once took."""


def install(patch: pytest.MonkeyPatch) -> list[str]:
    """Let transformers find it as flash-attn, on a CPU too, until the patch is undone.

    Returns:
        A list that fills with the names of the functions that are called.
    """
    calls: list[str] = []

    def counted(function: Any) -> Any:
        def call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            assert q.dtype == k.dtype == v.dtype
            calls.append(function.__name__)
            found: Tensor = function(q, k, v, **options)
            return found

        # Transformers gives a function what its parameters name.
        call.__wrapped__ = function  # type: ignore[attr-defined]
        return call

    package, padding = (ModuleType(name) for name in ("flash_attn", "flash_attn.bert_padding"))
    members: dict[str, Any] = {f.__name__: counted(f) for f in _FUNCTIONS}
    # For paged caches, which no hybrid has.
    members |= {"flash_attn_with_kvcache": None, "bert_padding": padding}
    vars(package).update(members)
    vars(padding).update(pad_input=pad_input, unpad_input=unpad_input)
    for module in (package, padding):
        module.__spec__ = ModuleSpec(module.__name__, None)
        patch.setitem(sys.modules, module.__name__, module)
    for owner in (users, modeling_utils, modeling_utils.PreTrainedModel):
        for name in _CHECKS:
            if hasattr(owner, name):
                patch.setattr(owner, name, lambda *args, **options: True)
    for name in _LOADED:
        if hasattr(users, name):
            patch.setattr(users, name, None)
    return calls


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = NO_WINDOW,
) -> Tensor:
    """Attention of rows of one length.

    Args:
        q: `[b, t, n, d]`.
        k: `[b, s, g, d]`; query heads are shared out among g in their order.
        v: As `k`.
        dropout_p: None is known but 0.
        softmax_scale: None for `d ** -0.5`.
        causal: A query sees the keys up to its own, the last query all.
        window_size: Keys before and after its own that a query sees; -1 for all.

    Returns:
        `[b, t, n, d]`.
    """
    assert dropout_p == 0.0
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if q.is_cuda:
        return _kernel(q, k, v, None, None, q.shape[1], k.shape[1], scale, causal, window_size)
    rows = [_attend(*row, scale, causal, window_size) for row in zip(q, k, v, strict=True)]
    return torch.stack(rows)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = NO_WINDOW,
) -> Tensor:
    """Attention of rows of several lengths behind one another.

    Args:
        q: `[all rows' t, n, d]`.
        k: `[all rows' s, g, d]`.
        v: As `k`.
        cu_seqlens_q: `[b + 1]` int32, where each row's queries start, and their end.
        cu_seqlens_k: The same of keys.
        max_seqlen_q: The largest t.
        max_seqlen_k: The largest s.
        dropout_p: As of :func:`flash_attn_func`, the others too.
        softmax_scale: See there.
        causal: See there.
        window_size: See there.

    Returns:
        As `q`; 0 where a query sees no key.
    """
    assert dropout_p == 0.0 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    borders, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    assert longest == tuple(int(each.diff().max()) for each in borders)
    if q.is_cuda:
        return _kernel(q, k, v, *borders, *longest, scale, causal, window_size)
    queries, keys = (each.diff().tolist() for each in borders)
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    return torch.cat([_attend(*part, scale, causal, window_size) for part in parts])


_FUNCTIONS = (flash_attn_func, flash_attn_varlen_func)


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    window_size: Window,
) -> Tensor:
    """PyTorch's FlashAttention-2, for channels divisible by 8, in half precision."""
    left, right = window_size
    output: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal, False,
        scale=scale, window_size_left=left, window_size_right=right,
    )[0]  # fmt: skip
    return output


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window_size: Window
) -> Tensor:
    """Of one row, `[t, n, d]` with `[s, g, d]` to `[t, n, d]`."""
    (t, n, _), (s, g, _) = q.shape, k.shape
    left, right = window_size[0], 0 if causal else window_size[1]
    # Of a key behind a query's own, [t, s].
    distance = torch.arange(s) - (torch.arange(t) + s - t)[:, None]
    is_seen = torch.ones(t, s, dtype=torch.bool)
    if left >= 0:
        is_seen &= distance >= -left
    if right >= 0:
        is_seen &= distance <= right
    query, key, value = (x.double().transpose(0, 1) for x in (q, k, v))
    key, value = (x.repeat_interleave(n // g, dim=0) for x in (key, value))
    scores = (query @ key.mT * scale).masked_fill(~is_seen, -torch.inf)
    output = scores.softmax(-1).nan_to_num(0.0) @ value
    return output.transpose(0, 1).to(q.dtype)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The real tokens of all rows behind one another.

    Args:
        hidden_states: `[b, t, ...]`.
        attention_mask: `[b, t]`, 1 for real tokens.

    Returns:
        `[real tokens, ...]`; their places `[real tokens]` in `[b t]`; where each row starts, and
        the end, `[b + 1]` int32; the most tokens of a row; each row's, `[b]` int32.
    """
    lengths = attention_mask.sum(1, dtype=torch.int32)
    places = attention_mask.flatten().nonzero()[:, 0]
    starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return hidden_states.flatten(0, 1)[places], places, starts, int(lengths.max()), lengths


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The way back, from `[real tokens, ...]` to `[batch, seqlen, ...]`; padding is 0."""
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_copy(0, indices.long(), hidden_states).unflatten(0, (batch, seqlen))
