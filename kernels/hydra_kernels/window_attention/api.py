"""Causal attention over the last so many tokens, by PyTorch's attention over blocks of them.

Queries are cut into blocks as long as the window, each of which sees its own block of keys and the
one before it: time and memory grow with tokens times window, not with tokens squared.

Legend: b rows, t tokens of a row, n heads, d channels, w the window in tokens, B blocks of c
queries, m keys that a block sees.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_kernels.packed import check_cu_seqlens

_SINK_CHANNELS = 8  # one would do; kernels want rows of a multiple of 16 bytes


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sink: Tensor | None = None,
    scale: float | None = None,
    before: tuple[Tensor, Tensor] | None = None,
    num_before: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Softmax over the last w tokens and a sink, which takes weight and gives nothing for it.

        o_i = sum_j exp(s_ij) v_j / (exp(sink) + sum_j exp(s_ij)),    s_ij = scale q_i . k_j,

    over i - w < j <= i (the sink as in gpt-oss, arXiv 2508.10925, section 2.2). Differentiable in
    all tensors of floating point; runs on any device.

    Args:
        q, k, v: [b, t, n, d].
        window: w, a token itself counted in; 1 or more.
        sink: [n], a logit per head, or None for an ordinary softmax.
        scale: factor on the products; d ** -0.5 when None.
        before: key and value [b, w - 1, n, d] of the tokens that come before the row's first.
        num_before: [b] integer, how many of these there are, the last ones; needed with `before`.
        cu_seqlens: [documents + 1] integer, where documents begin in a row that packs several
            (b = 1): 0, ascending, t. No token sees another document's; `before` is the first's.

    Returns:
        [b, t, n, d] in v's dtype.

    Raises:
        ValueError: if a shape does not fit or the window is below 1.
    """
    b, t, n, d = q.shape
    _check(q, k, v, window, sink, before, num_before, cu_seqlens)
    num_kept = 0
    if before is not None:
        num_kept = window - 1
        k, v = torch.cat((before[0], k), dim=1), torch.cat((before[1], v), dim=1)
    if t <= window:
        queries, keys, values = (x.unsqueeze(1) for x in (q, k, v))
        starts = torch.zeros(1, dtype=torch.long, device=q.device)
        first_key = -num_kept
    else:
        # A block's keys are its own and the w before them: pad so that both begin at a block.
        ends = -t % window
        queries = F.pad(q, (0, 0, 0, 0, 0, ends)).unflatten(1, (-1, window))
        padded = (F.pad(x, (0, 0, 0, 0, window - num_kept, ends)) for x in (k, v))
        blocks = (x.unflatten(1, (-1, window)) for x in padded)
        keys, values = (torch.cat((x[:, :-1], x[:, 1:]), dim=2) for x in blocks)
        starts = torch.arange(queries.shape[1], device=q.device) * window
        first_key = -window
    mask = _mask(starts, queries.shape[2], keys.shape[2], first_key, window)  # [1, B, c, m]
    if before is not None or t > window:
        least = torch.zeros(b, device=q.device) if num_before is None else -num_before.to(q.device)
        place = starts[:, None] + first_key + torch.arange(keys.shape[2], device=q.device)
        mask = mask & (place >= least.view(b, 1, 1)).unsqueeze(2)
    if cu_seqlens is not None:
        mask = mask & _same_document(cu_seqlens, starts, queries.shape[2], keys.shape[2], first_key)
    scale = d**-0.5 if scale is None else scale
    if sink is not None:
        queries, keys, values, mask = _with_sink(queries, keys, values, mask, sink, scale)
    # [b, B, c, n, d] -> [b B, n, c, d]
    queries, keys, values = (x.flatten(0, 1).transpose(1, 2) for x in (queries, keys, values))
    mask = mask.expand(b, -1, -1, -1).flatten(0, 1).unsqueeze(1)
    output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    return output[..., :d].transpose(1, 2).unflatten(0, (b, -1)).flatten(1, 2)[:, :t]


def _mask(starts: Tensor, num_queries: int, num_keys: int, first_key: int, window: int) -> Tensor:
    """[1, B, c, m]: whether a key lies in a query's window, alike in all blocks."""
    query = torch.arange(num_queries, device=starts.device)[:, None]
    key = torch.arange(num_keys, device=starts.device) + first_key
    return ((key <= query) & (query - key < window)).expand(1, len(starts), -1, -1)


def _same_document(
    cu_seqlens: Tensor, starts: Tensor, num_queries: int, num_keys: int, first_key: int
) -> Tensor:
    """[1, B, c, m]: whether key and query are of one document, the first's before the row too."""

    def documents(first: int, count: int) -> Tensor:
        places = starts[:, None] + first + torch.arange(count, device=starts.device)
        return torch.searchsorted(cu_seqlens[1:-1].long(), places, right=True)

    of_keys = documents(first_key, num_keys)[:, None]
    return (documents(0, num_queries)[:, :, None] == of_keys).unsqueeze(0)


def _with_sink(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, sink: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One more key of value zero that every query meets with the logit `sink`.

    It lies in channels of its own: there queries are 1, this key sink / scale, all others 0.
    """
    one = torch.ones_like(queries[..., :1])
    queries = F.pad(torch.cat((queries, one), dim=-1), (0, _SINK_CHANNELS - 1))
    keys, values = (F.pad(x, (0, _SINK_CHANNELS, 0, 0, 0, 1)) for x in (keys, values))
    logit = torch.zeros_like(keys)
    channel = keys.shape[-1] - _SINK_CHANNELS
    place = F.one_hot(torch.tensor(channel, device=sink.device), keys.shape[-1])
    rows = (sink / scale)[:, None] * place  # [n, d + channels]
    logit[:, :, -1] = rows.to(keys.dtype)
    return queries, keys + logit, values, F.pad(mask, (0, 1), value=True)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    sink: Tensor | None,
    before: tuple[Tensor, Tensor] | None,
    num_before: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    b, _, n, d = q.shape
    check_cu_seqlens(cu_seqlens, b)
    if window < 1:
        raise ValueError(f"window must be 1 or more, got {window}")
    shapes = {"k": (k, q.shape), "v": (v, q.shape)}
    if sink is not None:
        shapes["sink"] = (sink, (n,))
    if (before is None) != (num_before is None):
        raise ValueError("before and num_before go together")
    if before is not None:
        for name, x in zip(("key before", "value before"), before, strict=True):
            shapes[name] = (x, (b, window - 1, n, d))
        shapes["num_before"] = (num_before, (b,))
    for name, (x, shape) in shapes.items():
        if tuple(x.shape) != tuple(shape):
            raise ValueError(
                f"{name} must be {tuple(shape)} to go with q {tuple(q.shape)} and window {window}, "
                f"got {tuple(x.shape)}"
            )
