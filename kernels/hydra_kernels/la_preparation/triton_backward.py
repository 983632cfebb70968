"""The backward kernel: one pass from the gradients of q, k, v, g and beta to those of the input.

With c the vector after convolution and SiLU, w the norm's weights, p = c w, G the upstream
gradient rotated back, r the inverse RMS of c and s = r / max(|r p|, 1e-12), so that the forward's
result is s p rotated:

    dp = s (G - s^2 (G . p) p),    dw = dp c,    dc = dp w

The RMS has no gradient: the L2 norm that follows takes every scale out again. Where that norm is
below 1e-12, and so held constant, the second term of dp vanishes; the RMS then has one, about
c^2 / eps of the first term, with c so small that no number format shows it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hydra_kernels.la_preparation.triton_gates import backward_gates
from hydra_kernels.la_preparation.triton_vectors import (
    HEADS_PER_TILE,
    MAX_LAG,
    MOST,
    add,
    convolve,
    dot,
    inverse_norm,
    inverse_rms,
    load_pair,
    load_past,
    load_taps,
    scaled,
    sigmoid,
    store_pair,
    times,
    within_document,
)

# Tokens whose loads are in flight together: as many as registers allow.
UNROLL = tl.constexpr(2)


@triton.jit(
    do_not_specialize=[
        "a_row", "a_token", "b_row", "b_token", "da_row", "da_token", "db_row", "db_token",
        "num_tokens", "num_heads", "rows_per_angle",
    ],
    do_not_specialize_on_alignment=["a", "b", "da", "db"],
)  # fmt: skip
def backward_kernel(
    x, a, b, conv_weight, q_weight, k_weight, cos, sin, a_log, dt_bias, state, reach,
    dq, dk, dv, dg, dbeta,
    dx, da, db, dstate, partial, gate_partial,
    x_row, x_token, a_row, a_token, b_row, b_token,
    dx_row, dx_token, da_row, da_token, db_row, db_token,
    num_tokens, num_heads, rows_per_angle, strip, eps,
    DIM: tl.constexpr, HALF_BLOCK: tl.constexpr, STRIPS: tl.constexpr,
    GATE_HEADS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """One program, on the forward kernel's grid; it also leaves its sums for the parameters.

    `partial` [rows and blocks, 5, 3 n d] takes each channel's sums for the four taps, by lag, and
    for the norm's weight; `gate_partial` [rows and blocks, 2, n] those for A_log and dt_bias.
    """
    tile, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    qk_tiles = tl.cdiv(2 * num_heads, HEADS_PER_TILE)
    v_tiles = tl.cdiv(num_heads, HEADS_PER_TILE)
    if tile < qk_tiles:
        _backward_tile(
            x, conv_weight, q_weight, k_weight, cos, sin, state, reach, dq, dk, dx, dstate, partial,
            x_row, x_token, dx_row, dx_token, num_tokens, num_heads, rows_per_angle, strip, eps,
            tile * HEADS_PER_TILE, 2 * num_heads, block, row,
            True, DIM, HALF_BLOCK, STRIPS, TAPS,
        )  # fmt: skip
    elif tile < qk_tiles + v_tiles:
        _backward_tile(
            x, conv_weight, None, None, None, None, state, reach, dv, dv, dx, dstate, partial,
            x_row, x_token, dx_row, dx_token, num_tokens, num_heads, rows_per_angle, strip, eps,
            2 * num_heads + (tile - qk_tiles) * HEADS_PER_TILE, 3 * num_heads, block, row,
            False, DIM, HALF_BLOCK, STRIPS, TAPS,
        )  # fmt: skip
    else:
        sums = None
        if a is not None:
            sums = gate_partial + (row * tl.num_programs(1) + block) * 2 * num_heads
        backward_gates(
            a, b, a_log, dt_bias, dg, dbeta, da, db, sums,
            a_row, a_token, b_row, b_token, da_row, da_token, db_row, db_token,
            row, block * STRIPS * strip, num_tokens, num_heads, STRIPS * strip, GATE_HEADS,
        )  # fmt: skip


@triton.jit
def _backward_tile(
    x, conv_weight, q_weight, k_weight, cos, sin, state, reach, dq, dk, dx, dstate, partial,
    x_row, x_token, dx_row, dx_token, num_tokens, num_heads, rows_per_angle, strip, eps,
    first_head, end_head, block, row,
    NORMALISE: tl.constexpr, DIM: tl.constexpr, HALF_BLOCK: tl.constexpr, STRIPS: tl.constexpr,
    TAPS: tl.constexpr,
):  # fmt: skip
    """dx of HEADS_PER_TILE heads' q and k (NORMALISE) or v.

    Step i of a strip makes dz, the gradient of token i before SiLU. Through the taps it reaches
    dx of tokens i - 3 to i, whose sums wait in `future`; that of i - 3 is then complete. So a
    strip takes three steps more than it has tokens, which count for dx and not for the taps, and
    leaves what its first three steps complete to the strip before.
    """
    HALF: tl.constexpr = DIM // 2
    line = tl.arange(0, STRIPS * HEADS_PER_TILE)
    head = first_head + line % HEADS_PER_TILE
    start = (block * STRIPS + line // HEADS_PER_TILE) * strip
    column = tl.arange(0, HALF_BLOCK)[None, :]
    mask = (head < end_head)[:, None] & (column < HALF)
    kind = (head >= num_heads).to(tl.int32) + (head >= 2 * num_heads).to(tl.int32)  # q, k or v
    is_key = (kind == 1)[:, None]

    batch = row.to(tl.int64)
    channel = (head * DIM)[:, None] + column
    num_channels = 3 * num_heads * DIM
    x_token, dx_token = tl.cast(x_token, tl.int64), tl.cast(dx_token, tl.int64)
    x_rows = x + batch * x_row + (start.to(tl.int64) * x_token)[:, None] + channel
    dx_rows = dx + batch * dx_row + (start.to(tl.int64) * dx_token)[:, None] + channel
    y_start = (batch * num_heads + (head - kind * num_heads)) * num_tokens + start
    dy_rows = tl.where(is_key, dk, dq) + (y_start * DIM)[:, None] + column
    angle_offset = 0
    if cos is not None:
        angle_start = (batch // rows_per_angle) * num_tokens + start
        angle_offset = (angle_start * HALF)[:, None] + column
    weight = None
    if q_weight is not None:
        weight = load_pair(tl.where(is_key, k_weight, q_weight) + column, mask, HALF)
    tile_zeros = tl.zeros([STRIPS * HEADS_PER_TILE, HALF_BLOCK], tl.float32)
    zeros = (tile_zeros, tile_zeros)
    past, future, d_taps, d_weight = 0, 0, 0, zeros
    state_rows, dstate_rows = None, None
    if conv_weight is not None:
        tap = load_taps(conv_weight, channel, mask, TAPS, HALF)
        if state is not None:
            state_offset = batch * (TAPS - 1) * num_channels + channel
            state_rows, dstate_rows = state + state_offset, dstate + state_offset
        past = load_past(
            x_rows, x_token, state_rows, num_channels, start, num_tokens, mask, TAPS, HALF
        )
        future = (zeros, zeros, zeros)
        d_taps = (zeros, zeros, zeros, zeros)

    for i in range(0, strip, UNROLL):
        inside_0 = mask & (start + i < num_tokens)[:, None]
        inside_1 = mask & (start + i + 1 < num_tokens)[:, None]
        inside = (inside_0, inside_1)
        xs = (
            load_pair(x_rows + i * x_token, inside_0, HALF),
            load_pair(x_rows + (i + 1) * x_token, inside_1, HALF),
        )
        dys = (
            load_pair(dy_rows + i * DIM, inside_0, HALF),
            load_pair(dy_rows + (i + 1) * DIM, inside_1, HALF),
        )
        for u in tl.static_range(UNROLL):
            angles = angle_offset + (i + u) * HALF
            if conv_weight is None:
                dz, own = _through_norms(
                    xs[u], dys[u], weight, cos, sin, angles, inside[u], eps, NORMALISE, DIM
                )
                store_pair(dx_rows + (i + u) * dx_token, dz, inside[u], HALF)
            else:
                past = within_document(past, reach, start + i + u, num_tokens)
                dz, own = _through_silu_and_norms(
                    convolve(tap, xs[u], past),
                    dys[u], weight, cos, sin, angles, inside[u], eps, NORMALISE, DIM,
                )  # fmt: skip
                d_taps = (
                    add(d_taps[0], times(dz, xs[u])),
                    add(d_taps[1], times(dz, past[0])),
                    add(d_taps[2], times(dz, past[1])),
                    add(d_taps[3], times(dz, past[2])),
                )
                past = (xs[u], past[0], past[1])
                future = _complete_token(
                    future, dz, tap, reach, dx_rows, dx_token, dstate_rows, num_channels,
                    start, i + u, num_tokens, mask, TAPS, HALF,
                )  # fmt: skip
            d_weight = add(d_weight, own)

    if conv_weight is not None:
        for beyond in range(0, MAX_LAG):
            i = strip + beyond
            inside_i = mask & (start + i < num_tokens)[:, None]
            x_i = load_pair(x_rows + i * x_token, inside_i, HALF)
            dy_i = load_pair(dy_rows + i * DIM, inside_i, HALF)
            past = within_document(past, reach, start + i, num_tokens)
            dz, _ = _through_silu_and_norms(
                convolve(tap, x_i, past),
                dy_i, weight, cos, sin, angle_offset + i * HALF, inside_i, eps, NORMALISE, DIM,
            )  # fmt: skip
            past = (x_i, past[0], past[1])
            future = _complete_token(
                future, dz, tap, reach, dx_rows, dx_token, dstate_rows, num_channels,
                start, i, num_tokens, mask, TAPS, HALF,
            )  # fmt: skip

    # This block's sums: over its strips.
    head = first_head + tl.arange(0, HEADS_PER_TILE)
    mask = (head < end_head)[:, None] & (column < HALF)
    sums = partial
    if conv_weight is not None or q_weight is not None:
        sums = partial + (batch * tl.num_programs(1) + block) * 5 * num_channels
        sums = sums + (head * DIM)[:, None] + column
    if conv_weight is not None:
        for lag in tl.static_range(TAPS):
            _store_sums(sums + lag * num_channels, d_taps[lag], mask, HALF, STRIPS)
    if q_weight is not None:
        _store_sums(sums + 4 * num_channels, d_weight, mask, HALF, STRIPS)


@triton.jit
def _through_norms(
    c, dy, weight, cos, sin, angles, mask, eps, NORMALISE: tl.constexpr, DIM: tl.constexpr
):
    """dc, and the token's part of dw (anything where there is no norm)."""
    dc, dw = dy, dy
    if NORMALISE:
        if cos is not None:
            cosine = tl.load(cos + angles, mask=mask, other=0.0)
            sine = tl.load(sin + angles, mask=mask, other=0.0)
            dy = (dy[0] * cosine + dy[1] * sine, dy[1] * cosine - dy[0] * sine)
        p, rms = c, 1.0
        if weight is not None:
            p, rms = times(c, weight), inverse_rms(c, eps, DIM)
        along = dot(dy, p)
        inverse = inverse_norm(rms * rms * dot(p, p))
        scale = rms * inverse
        removed = tl.where(inverse >= MOST, 0.0, scale * scale * along)
        dp = scaled(add(dy, scaled(p, -removed)), scale)
        dc, dw = dp, dp
        if weight is not None:
            dc = times(dp, weight)
            dw = times(dp, c)
    return dc, dw


@triton.jit
def _through_silu_and_norms(
    z, dy, weight, cos, sin, angles, mask, eps, NORMALISE: tl.constexpr, DIM: tl.constexpr
):
    """dz, and the token's part of dw."""
    gate = (sigmoid(z[0]), sigmoid(z[1]))
    c = times(z, gate)
    dc, dw = _through_norms(c, dy, weight, cos, sin, angles, mask, eps, NORMALISE, DIM)
    slope = (gate[0] + c[0] * (1.0 - gate[0]), gate[1] + c[1] * (1.0 - gate[1]))
    return times(dc, slope), dw


@triton.jit
def _complete_token(
    future, dz, taps, reach, dx_rows, dx_token, dstate_rows, num_channels,
    start, step, num_tokens, mask, TAPS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Add dz to dx of its own token and the three before; store the oldest; return the others."""
    back = (times(taps[1], dz), times(taps[2], dz), times(taps[3], dz))
    back = within_document(back, reach, start + step, num_tokens)
    done = add(future[2], back[2])
    token = start + step - MAX_LAG
    inside = mask & ((token >= start) & (token < num_tokens))[:, None]
    store_pair(dx_rows + (step - MAX_LAG) * dx_token, done, inside, HALF)
    if dstate_rows is not None:
        # The state's rows are tokens -(TAPS - 1) to -1.
        inside = mask & ((token < 0) & (token > -TAPS))[:, None]
        place = step + (TAPS - 1 - MAX_LAG)
        store_pair(dstate_rows + place * num_channels, done, inside, HALF)
    return times(taps[0], dz), add(future[0], back[0]), add(future[1], back[1])


@triton.jit
def _store_sums(pointers, pair, mask, HALF: tl.constexpr, STRIPS: tl.constexpr):
    """Sum a tile's rows over its strips, `[heads, half]`."""
    low = tl.reshape(pair[0], [STRIPS, HEADS_PER_TILE, pair[0].shape[1]])
    high = tl.reshape(pair[1], [STRIPS, HEADS_PER_TILE, pair[1].shape[1]])
    store_pair(pointers, (tl.sum(low, axis=0), tl.sum(high, axis=0)), mask, HALF)
