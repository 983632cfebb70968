"""The gated delta rule in PyTorch: the sequential recurrence and its chunked form.

Shapes: b batch, t tokens, n chunks, c tokens per chunk, d_k and d_v a head's key and value sizes.

The decay is one number per head, or one per channel of its keys, where Gated DeltaNet becomes Kimi
Delta Attention (arXiv 2510.26692).

Both compute in float32 at least (float64 when any input is float64) and are differentiable in
every tensor argument. The recurrence is the oracle; the chunked form is what runs on a CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The widest dtype among the tensors, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _start_state(initial_state: Tensor | None, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """The given state or zeros, [b, heads, d_k, d_v] in `dtype`."""
    if initial_state is not None:
        return initial_state.to(dtype)
    b, _, heads, d_k = k.shape
    return torch.zeros(b, heads, d_k, v.shape[-1], dtype=dtype, device=v.device)


def recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token after the other: Eq 10 of Gated Delta Networks (arXiv 2412.06464).

        S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = scale S_t^T q_t

    with the state transposed against the paper, [d_k, d_v], so that rows are keys. Of a decay per
    channel (Kimi Linear, arXiv 2510.26692, Eq 1) it is (I - beta_t k_t k_t^T) diag(exp(g_t)).

    Args:
        q, k: [b, t, heads, d_k]; k of unit length (else the state may grow without bound).
        v: [b, t, heads, d_v].
        g: [b, t, heads] or [b, t, heads, d_k], log of the decay, at most 0.
        beta: [b, t, heads], write strength in [0, 1].
        scale: factor on the queries.
        initial_state: [b, heads, d_k, d_v] or None for zeros.
        cu_seqlens: as `gated_delta_rule`.

    Returns:
        Output [b, t, heads, d_v] in v's dtype, and the state after the last token
        [b, heads, d_k, d_v] in the computing dtype.
    """
    dtype = _compute_dtype(q, k, v, g, beta, initial_state)
    state = _start_state(initial_state, k, v, dtype)
    g = g if g.dim() == 4 else g.unsqueeze(-1)
    # [b, t, heads, ...] -> t tensors of [b, heads, ...]
    steps = (x.to(dtype).unbind(1) for x in (q, k, v, g, beta))
    starts = set() if cu_seqlens is None else set(cu_seqlens[1:-1].tolist())
    outputs = []
    for t, (q_t, k_t, v_t, g_t, beta_t) in enumerate(zip(*steps, strict=True)):
        state = torch.zeros_like(state) if t in starts else state * g_t.exp()[..., None]
        recalled = torch.einsum("bhk,bhkv->bhv", k_t, state)
        written = (v_t - recalled) * beta_t[..., None]
        state = state + k_t[..., :, None] * written[..., None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q_t * scale, state))
    return torch.stack(outputs, dim=1).to(v.dtype), state


def _to_chunks(x: Tensor, chunk_size: int, dtype: torch.dtype) -> Tensor:
    """[b, t, heads, d] -> [b * heads, n, c, d]; the last chunk is filled up with zeros.

    A zero token neither decays (g = 0), writes (beta = 0) nor reads (q = 0), so it changes nothing.
    """
    b, t, heads, d = x.shape
    x = F.pad(x.to(dtype), (0, 0, 0, 0, 0, -t % chunk_size))
    return x.transpose(1, 2).reshape(b * heads, -1, chunk_size, d)


def _document_starts(cu_seqlens: Tensor, t: int, chunk_size: int) -> Tensor:
    """[n, c] bool: where a document other than the first begins."""
    starts = torch.zeros(t + -t % chunk_size, dtype=torch.bool, device=cu_seqlens.device)
    starts[cu_seqlens[1:-1].long()] = True
    return starts.view(-1, chunk_size)


def _decay_between_tokens(g: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Decays inside a chunk from its log decays g [..., c], of heads or of channels.

    Nothing outlives the end of its document: where `starts` [n, c] marks a document's first token,
    every decay from before that token to it or after it is 0.

    Returns:
        From the chunk's start to token i [..., c], from token j to token i >= j, 0 above the
        diagonal [..., c, c], and from token j to the chunk's end [..., c].
    """
    # Summed in float64: differences of large sums would otherwise drown the small decays.
    total = g.double().cumsum(-1)
    between = total[..., :, None] - total[..., None, :]
    gone = torch.ones(between.shape[-2:], dtype=torch.bool, device=g.device).triu(1)
    from_start = total.to(g.dtype).exp()
    if starts is not None:
        num_starts = starts.cumsum(-1)
        gone = gone | (num_starts[..., :, None] != num_starts[..., None, :])
        from_start = from_start.masked_fill(num_starts > 0, 0.0)
    # Masked before exp: above the diagonal the exponent is positive and would overflow.
    between = between.to(g.dtype).masked_fill(gone, -torch.inf).exp()
    return from_start, between, between[..., -1, :]


def _decayed_products(x: Tensor, y: Tensor, between: Tensor) -> Tensor:
    """Products of rows of x and y [..., c, d_k] that decay between them, [..., c, c].

    Of decays per channel, [..., d_k, c, c], each channel's by its own.
    """
    if between.dim() == x.dim():
        return x @ y.mT * between
    return torch.einsum("...id,...jd,...dij->...ij", x, y, between)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same function, a chunk of tokens at a time: only the state passes sequentially.

    What the tokens of a chunk write, U [c, d_v], solves a unit lower-triangular system (the WY
    form of DeltaNet, arXiv 2406.06484; with decay, Gated Delta Networks, arXiv 2412.06464, Eq 12
    and after):

        (I + strictly_lower(diag(beta) (K K^T * D))) U = diag(beta) (V - diag(d) K S)

    with D_ij the decay from token j to token i, d_i that from the chunk's start, S the state at the
    chunk's start; of decays per channel D and d stand inside the products' sums. The right-hand
    side is linear in S, so U = U_v - W S with U_v and W solved for all chunks at once, and the
    state's pass is S' = A S + B with A and B known beforehand.

    Args and returns: as `recurrent_gated_delta_rule`, and chunk_size in tokens, 1 or more. With
    decays per channel at most 16 are taken, as D is held for each channel.
    """
    b, t, heads, d_k = k.shape
    d_v, out_dtype = v.shape[-1], v.dtype
    dtype = _compute_dtype(q, k, v, g, beta, initial_state)
    state = _start_state(initial_state, k, v, dtype).flatten(0, 1)  # [b * heads, d_k, d_v]
    of_channels = g.dim() == 4
    size = min(chunk_size, t, 16 if of_channels else t)
    q, k, v = (_to_chunks(x, size, dtype) for x in (q, k, v))  # [b * heads, n, c, d]
    # [b * heads, n, c, 1], g of channels [b * heads, n, c, d_k]
    g, beta = (_to_chunks(x if x.dim() == 4 else x[..., None], size, dtype) for x in (g, beta))
    starts = None if cu_seqlens is None else _document_starts(cu_seqlens, t, size)
    if of_channels:
        # Over [b * heads, n, d_k, c]; a document's start is one for all channels.
        if starts is not None:
            starts = starts.unsqueeze(-2)
        from_start, between, to_end = _decay_between_tokens(g.mT, starts)
        from_start, to_end = from_start.mT, to_end.mT
    else:
        from_start, between, to_end = _decay_between_tokens(g[..., 0], starts)
        from_start, to_end = from_start[..., None], to_end[..., None]

    # solve_triangular reads the strictly lower part alone.
    system = _decayed_products(k * beta, k, between).to(dtype)  # autocast's products are bfloat16
    right_side = torch.cat((v, k * from_start), dim=-1) * beta
    solved = torch.linalg.solve_triangular(system, right_side, upper=False, unitriangular=True)
    u_v, w = solved.split((d_v, d_k), dim=-1)

    k_to_end = (k * to_end).mT
    whole_decay = torch.diag_embed(from_start[..., -1, :].expand(-1, -1, d_k))
    transition = whole_decay - k_to_end @ w  # A: [b * heads, n, d_k, d_k]
    addition = k_to_end @ u_v  # B: [b * heads, n, d_k, d_v]
    states = []
    for a_n, b_n in zip(transition.unbind(1), addition.unbind(1), strict=True):
        states.append(state)
        state = torch.baddbmm(b_n, a_n, state)
    at_start = torch.stack(states, dim=1)  # [b * heads, n, d_k, d_v]

    written = u_v - w @ at_start
    q = q * scale
    output = (q * from_start) @ at_start + _decayed_products(q, k, between) @ written
    output = output.reshape(b, heads, -1, d_v)[:, :, :t].transpose(1, 2)
    return output.to(out_dtype), state.unflatten(0, (b, heads))
