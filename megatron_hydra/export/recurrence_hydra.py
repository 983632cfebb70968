"""The gated delta rule and softmax attention, from and to what decoding keeps.

Copied into every exported folder: imports PyTorch alone, and fla where it is used.

Legend: b rows, t tokens, n heads, g query groups, m heads per group, d channels, c tokens of a
chunk, w tokens of a window.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

_CHUNK = 64
_CHUNK_OF_CHANNELS = 16  # a decay per channel is held for each pair of a chunk's tokens
_SHORTEST_BLOCK = 128
PIECES = 64
"""In which attention of one token reads a static cache."""
ROOM = 8 * PIECES
"""What a static cache's size is divisible by: matrix products need pieces of 16 bytes per row."""
_LOWEST = -1e30
_CAN_ROUND_ONCE = "dtype" in torch.ops.aten.bmm.overloads()  # PyTorch 2.8 and later, on a GPU


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """With float32 products where autocast would round them, of a function of a query first."""

    @functools.wraps(function)
    def run(query: Tensor, *args: Any) -> Any:
        kind = query.device.type
        # Of some devices, as one without storage, PyTorch must not be asked more.
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return function(query, *args)
        with torch.autocast(kind, enabled=False):
            return function(query, *args)

    return run


@without_autocast
def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence of Gated DeltaNet (arXiv 2412.06464, Eq 10) and of Kimi Delta Attention.

        S = exp(g) S;  S = S + k (beta (v - S^T k))^T;  o = S^T q / sqrt(d)

    One token is a step of the recurrence, in float32. Several are solved a chunk at a time: by fla
    on a GPU in half precision where it is installed; by PyTorch, in float32, elsewhere.

    Args:
        query: `[b, t, n, d]`.
        key: `[b, t, n, d]`, of unit length.
        value: `[b, t, n, d]`.
        log_decay: g, float32 `[b, t, n, 1]`, or `[b, t, n, d]` for a decay per channel of the keys.
        beta: Float32 `[b, t, n]`.
        state: S, float32 `[b, n, d, d]`, rows are keys.

    Returns:
        `[b, t, n, d]` in the value's dtype, and the state after the last token, float32.
    """
    if query.is_cuda and query.dtype != torch.float32 and query.shape[1] > 1:
        rule = _fla(log_decay.shape[-1] > 1)
        if rule is not None:
            return _by_fla(rule, query, key, value, log_decay, beta, state)
    # [b, t, n, ·] -> [b, n, t, ·]
    parts = (query, key, value, log_decay, beta.unsqueeze(-1))
    q, k, v, g, strength = (part.float().transpose(1, 2) for part in parts)
    q = q * q.shape[-1] ** -0.5
    if q.shape[2] == 1:
        output, state = _step(q, k, v, g, strength, state)
        return output.transpose(1, 2).to(value.dtype), state
    size = _CHUNK if g.shape[-1] == 1 else _CHUNK_OF_CHANNELS
    outputs = []
    for start in range(0, q.shape[2], size):
        chunk = (part[:, :, start : start + size] for part in (q, k, v, g, strength))
        output, state = _chunk(*chunk, state)
        outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2).to(value.dtype), state


def short_convolution(padded: Tensor, weight: Tensor) -> Tensor:
    """Causal convolution over tokens and SiLU; summed in float32, as the training kernels do.

    Args:
        padded: `[b, k - 1 + t, channels]`, the last k - 1 inputs of before first.
        weight: `[channels, k]`, the tap of the token itself last.

    Returns:
        `[b, t, channels]` in the inputs' dtype.
    """
    taps = weight.float()
    past = taps.shape[1] - 1
    num_tokens = padded.shape[1] - past
    if num_tokens == 1:
        return F.silu((padded.float() * taps.mT).sum(1, keepdim=True)).to(padded.dtype)
    total = padded[:, :num_tokens].float() * taps[:, 0]
    for i in range(1, past + 1):
        total = total.addcmul(padded[:, i : i + num_tokens].float(), taps[:, i])
    return F.silu(total).to(padded.dtype)


def _step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of `[b, n, 1, ·]`."""
    state = state * g.mT.exp()
    state = torch.addcmul(state, k.mT, beta * (v - _row_times(k, state)))
    return _row_times(q, state), state


def _row_times(row: Tensor, matrix: Tensor) -> Tensor:
    """`[..., 1, i]` by `[..., i, j]`; compiled, it becomes one with what lies around it."""
    if torch.compiler.is_compiling():
        return (row.mT * matrix).sum(-2, keepdim=True)
    return row @ matrix


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """A chunk `[b, n, c, ·]` at once.

    What its tokens write, U, solves (I + strictly_lower(beta (K K^T * D))) U = beta (V - d K S):
    D decays from token to token, d from the chunk's start (arXiv 2412.06464, section 3.3).
    """
    # In float64: differences of large sums would drown small decays.
    total = g.to(torch.float32 if g.device.type == "mps" else torch.float64).cumsum(2)
    later = torch.ones(g.shape[2], g.shape[2], dtype=torch.bool, device=g.device).triu(1)
    between = total.unsqueeze(3) - total.unsqueeze(2)  # [b, n, c, c, 1 or d], row after column
    between = between.float().masked_fill(later.unsqueeze(-1), -torch.inf).exp()
    from_start, to_end = total.float().exp(), between[:, :, -1]

    def products(x: Tensor) -> Tensor:
        if between.shape[-1] == 1:
            return x @ k.mT * between.squeeze(-1)
        return torch.einsum("bnid,bnjd,bnijd->bnij", x, k, between)

    right = beta * (v - (k * from_start) @ state)
    written = torch.linalg.solve_triangular(
        products(k * beta), right, upper=False, unitriangular=True
    )
    output = (q * from_start) @ state + products(q) @ written
    state = state * from_start[:, :, -1:].mT + (k * to_end).mT @ written
    return output, state


def _by_fla(
    rule: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Heads as rows of one head each: fla compiles its kernels for a number of heads."""
    b, t, n, d = query.shape
    if log_decay.shape[-1] == 1:
        log_decay = log_decay.squeeze(-1)

    def rows(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(b * n, t, 1, *x.shape[3:])

    output, state = rule(
        q=rows(query),
        k=rows(key),
        v=rows(value),
        g=rows(log_decay),
        beta=rows(beta),
        scale=d**-0.5,
        initial_state=state.reshape(b * n, 1, d, d),
        output_final_state=True,
    )
    output = output.reshape(b, n, t, d).transpose(1, 2)
    return output.to(value.dtype), state.reshape(b, n, d, d)


@functools.cache
def _fla(of_channels: bool) -> Any:
    """fla's chunked kernel; None where it is not installed, which is logged once."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.kda import chunk_kda
    except ImportError as error:
        logger.warning(
            "recurrent heads run on PyTorch, which is slow: fla is not installed (%s)", error
        )
        return None
    return chunk_kda if of_channels else chunk_gated_delta_rule


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    sink: Tensor | None,
    kept: tuple[Tensor, Tensor] | None,
    num_before: Tensor,
    num_real: Tensor,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Softmax over the last w tokens and a sink, which takes weight and gives nothing for it.

    Args:
        query: `[b, t, n, d]`; a row's first tokens are real, padding comes last.
        key: `[b, t, n, d]`.
        value: `[b, t, n, d]`.
        window: w, a token itself counted in.
        sink: `[n]`, a logit per head, or None.
        kept: Keys and values `[b, w, n, d]` of the tokens before: token i lies at place i mod w.
            None at the start.
        num_before: `[b]`, tokens that each row has seen before.
        num_real: `[b]`, of the row's tokens here.

    Returns:
        `[b, t, n, d]`, and the keys and values that remain.
    """
    if kept is None:
        shape = (key.shape[0], window, *key.shape[2:])
        kept = key.new_zeros(shape), value.new_zeros(shape)
    size = max(window, _SHORTEST_BLOCK)
    outputs = []
    for start in range(0, query.shape[1], size):
        block = (part[:, start : start + size] for part in (query, key, value))
        real_here = (num_real - start).clamp(0, size)
        output, kept = _window_block(*block, window, sink, kept, num_before, real_here)
        num_before = num_before + real_here
        outputs.append(output)
    return torch.cat(outputs, dim=1), kept


def _window_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    sink: Tensor | None,
    kept: tuple[Tensor, Tensor],
    num_before: Tensor,
    num_real: Tensor,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A block of c tokens; arguments as above."""
    place = torch.arange(window, device=query.device)
    here = torch.arange(query.shape[1], device=query.device)
    before, now = num_before[:, None], (num_before + num_real)[:, None]
    # Which token lies at each place: below 0 there is none yet.
    token_kept = before - 1 - (before - 1 - place) % window  # [b, w]
    token_here = before + here  # [b, c]
    keys = torch.cat((kept[0], key), dim=1)
    values = torch.cat((kept[1], value), dim=1)
    token = torch.cat((token_kept, token_here), dim=1)[:, None]  # [b, 1, w + c]
    distance = token_here[:, :, None] - token
    is_seen = (distance >= 0) & (distance < window) & (token >= 0)
    output = _softmax_attention(query, keys, values, is_seen, sink)
    # The last w tokens each to its place; where that is an earlier one, it stays.
    last = now - 1 - (now - 1 - place) % window
    source = torch.where(last >= before, window + last - before, place)
    index = source[:, :, None, None].expand(-1, -1, *keys.shape[2:])
    return output, (keys.gather(1, index), values.gather(1, index))


def _softmax_attention(
    query: Tensor, keys: Tensor, values: Tensor, is_seen: Tensor, sink: Tensor | None
) -> Tensor:
    """`is_seen` `[b, c, m]`: whether a query meets a key."""
    scores = torch.einsum("bind,bjnd->bnij", query, keys) * query.shape[-1] ** -0.5
    scores = scores.float().masked_fill(~is_seen[:, None], -torch.inf)
    if sink is not None:
        logit = sink.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, logit), dim=-1)
    weights = F.softmax(scores, dim=-1)[..., : keys.shape[1]].to(values.dtype)
    return torch.einsum("bnij,bjnd->bind", weights, values)


@without_autocast
def attention_of_a_token(query: Tensor, keys: Tensor, values: Tensor, is_seen: Tensor) -> Tensor:
    """Softmax attention of one token over a cache with room for t.

    The cache is read in pieces, each with a softmax of its own, which are then put together by
    their sums: many of a GPU's units read at once, however few the groups are (as Flash-Decoding
    does).

    Args:
        query: `[b, g, m, d]`.
        keys: `[b, g, t, d]`, t divisible by `PIECES`, for speed by `ROOM`.
        values: As `keys`.
        is_seen: `[b, t]`, which places of the cache the token sees.

    Returns:
        `[b, g, m, d]` in the query's dtype.
    """
    b, g, m, d = query.shape

    def pieces(x: Tensor) -> Tensor:
        return x.reshape(b * g * PIECES, -1, d)

    queries = pieces(query.unsqueeze(2).expand(b, g, PIECES, m, d))
    scores = _float_products(queries, pieces(keys).mT).view(b, g, PIECES, m, -1) * d**-0.5
    # A number, as a piece that is not seen at all has no largest score but this.
    scores = scores.masked_fill(~is_seen.view(b, 1, PIECES, 1, -1), _LOWEST)
    top = scores.amax(dim=-1, keepdim=True)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    mixed = _float_products(weights.to(values.dtype).flatten(0, 2), pieces(values))
    share = (top - top.amax(dim=2, keepdim=True)).exp()
    output = (mixed.view(b, g, PIECES, m, d) * share).sum(2) / (total * share).sum(2)
    return output.to(query.dtype)


def _float_products(x: Tensor, y: Tensor) -> Tensor:
    """x @ y of `[rows, ·, ·]` in float32, from what they hold: rounded once, at the end."""
    if x.is_cuda and x.dtype != torch.float32 and _CAN_ROUND_ONCE:
        return torch.bmm(x, y, out_dtype=torch.float32)
    return x.float() @ y.float()
