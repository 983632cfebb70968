"""The forward kernel: one pass from the in-projection's rows to q, k, v, g and beta.

It reads token by token, as the projection wrote, and writes head by head, `[q k v, b, n, t, d]` and
`[b, n, t]`, as the gated delta rule reads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hydra_kernels.la_preparation.triton_gates import forward_gates
from hydra_kernels.la_preparation.triton_vectors import (
    HEADS_PER_TILE,
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

# Tokens whose loads are in flight together.
UNROLL = tl.constexpr(4)


@triton.jit(
    do_not_specialize=[
        "a_row", "a_token", "b_row", "b_token", "num_tokens", "num_heads", "rows_per_angle",
    ],
    # Where gates begin in an in-projection's rows depends on how many heads there are.
    do_not_specialize_on_alignment=["a", "b"],
)  # fmt: skip
def forward_kernel(
    x, a, b, conv_weight, q_weight, k_weight, cos, sin, a_log, dt_bias, state, reach,
    vectors, g, beta,
    x_row, x_token, a_row, a_token, b_row, b_token,
    num_tokens, num_heads, rows_per_angle, strip, eps,
    DIM: tl.constexpr, HALF_BLOCK: tl.constexpr, STRIPS: tl.constexpr,
    GATE_HEADS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """One program: a tile of heads (or all gates), STRIPS strips of tokens, one row of the batch.

    How many tokens a strip has is no constant: one kernel is compiled for all lengths.

    Grid: (tiles of q and k, tiles of v, the gates; blocks of tokens; rows). Heads vary fastest,
    so that programs that run together read whole rows of memory and share cos and sin in cache.
    """
    tile, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    qk_tiles = tl.cdiv(2 * num_heads, HEADS_PER_TILE)
    v_tiles = tl.cdiv(num_heads, HEADS_PER_TILE)
    if tile < qk_tiles:
        _forward_tile(
            x, conv_weight, q_weight, k_weight, cos, sin, state, reach, vectors,
            x_row, x_token, num_tokens, num_heads, rows_per_angle, strip, eps,
            tile * HEADS_PER_TILE, 2 * num_heads, block, row,
            True, DIM, HALF_BLOCK, STRIPS, TAPS,
        )  # fmt: skip
    elif tile < qk_tiles + v_tiles:
        _forward_tile(
            x, conv_weight, None, None, None, None, state, reach, vectors,
            x_row, x_token, num_tokens, num_heads, rows_per_angle, strip, eps,
            2 * num_heads + (tile - qk_tiles) * HEADS_PER_TILE, 3 * num_heads, block, row,
            False, DIM, HALF_BLOCK, STRIPS, TAPS,
        )  # fmt: skip
    else:
        forward_gates(
            a, b, a_log, dt_bias, g, beta, a_row, a_token, b_row, b_token,
            row, block * STRIPS * strip, num_tokens, num_heads, STRIPS * strip, GATE_HEADS,
        )  # fmt: skip


@triton.jit
def _forward_tile(
    x, conv_weight, q_weight, k_weight, cos, sin, state, reach, vectors,
    x_row, x_token, num_tokens, num_heads, rows_per_angle, strip, eps,
    first_head, end_head, block, row,
    NORMALISE: tl.constexpr, DIM: tl.constexpr, HALF_BLOCK: tl.constexpr, STRIPS: tl.constexpr,
    TAPS: tl.constexpr,
):  # fmt: skip
    """q and k (NORMALISE) or v of HEADS_PER_TILE heads, counted through q, k and v."""
    HALF: tl.constexpr = DIM // 2
    line = tl.arange(0, STRIPS * HEADS_PER_TILE)
    head = first_head + line % HEADS_PER_TILE
    start = (block * STRIPS + line // HEADS_PER_TILE) * strip
    column = tl.arange(0, HALF_BLOCK)[None, :]
    mask = (head < end_head)[:, None] & (column < HALF)
    kind = (head >= num_heads).to(tl.int32) + (head >= 2 * num_heads).to(tl.int32)  # q, k or v

    batch = row.to(tl.int64)
    channel = (head * DIM)[:, None] + column
    num_channels = 3 * num_heads * DIM
    x_token = tl.cast(x_token, tl.int64)
    x_rows = x + batch * x_row + (start.to(tl.int64) * x_token)[:, None] + channel
    y_row = (kind * tl.num_programs(2) + batch) * num_heads + (head - kind * num_heads)
    y_rows = vectors + ((y_row * num_tokens + start) * DIM)[:, None] + column
    if cos is not None:
        angle_start = (batch // rows_per_angle) * num_tokens + start
        angle_offset = (angle_start * HALF)[:, None] + column
    if q_weight is not None:
        weight = load_pair(tl.where((kind == 1)[:, None], k_weight, q_weight) + column, mask, HALF)
    past = 0
    if conv_weight is not None:
        tap = load_taps(conv_weight, channel, mask, TAPS, HALF)
        state_rows = None
        if state is not None:
            state_rows = state + batch * (TAPS - 1) * num_channels + channel
        past = load_past(
            x_rows, x_token, state_rows, num_channels, start, num_tokens, mask, TAPS, HALF
        )

    for i in range(0, strip, UNROLL):
        inside_0 = mask & (start + i < num_tokens)[:, None]
        inside_1 = mask & (start + i + 1 < num_tokens)[:, None]
        inside_2 = mask & (start + i + 2 < num_tokens)[:, None]
        inside_3 = mask & (start + i + 3 < num_tokens)[:, None]
        inside = (inside_0, inside_1, inside_2, inside_3)
        xs = (
            load_pair(x_rows + i * x_token, inside_0, HALF),
            load_pair(x_rows + (i + 1) * x_token, inside_1, HALF),
            load_pair(x_rows + (i + 2) * x_token, inside_2, HALF),
            load_pair(x_rows + (i + 3) * x_token, inside_3, HALF),
        )
        for u in tl.static_range(UNROLL):
            y = xs[u]
            if conv_weight is not None:
                past = within_document(past, reach, start + i + u, num_tokens)
                z = convolve(tap, y, past)
                past = (y, past[0], past[1])
                y = times(z, (sigmoid(z[0]), sigmoid(z[1])))
            if NORMALISE:
                scale = 1.0
                if q_weight is not None:
                    scale = inverse_rms(y, eps, DIM)
                    y = times(y, weight)
                # A rotation keeps the norm, so it may be taken before.
                y = scaled(y, scale * inverse_norm(scale * scale * dot(y, y)))
                if cos is not None:
                    angles = angle_offset + (i + u) * HALF
                    c = tl.load(cos + angles, mask=inside[u], other=0.0)
                    s = tl.load(sin + angles, mask=inside[u], other=0.0)
                    y = (y[0] * c - y[1] * s, y[1] * c + y[0] * s)
            store_pair(y_rows + (i + u) * DIM, y, inside[u], HALF)
