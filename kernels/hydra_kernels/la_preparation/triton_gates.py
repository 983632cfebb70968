"""Decay and write strength of each head and token, in the same launch as the vectors.

    g = -exp(A_log) softplus(a + dt_bias),    beta = sigmoid(b)        (float32)

They are one number per head where the vectors are 3 d, so they ride along as one more program per
block of tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

TOKENS_PER_STEP = tl.constexpr(32)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), as accurate for small results as log1p makes it.

    With y = exp(-|x|) and s = y / (2 + y) <= 1/3, log(1 + y) = 2 artanh(s), whose series needs
    seven terms in float32.
    """
    y = tl.exp(-tl.abs(x))
    s = y / (2.0 + y)
    q = s * s
    series = 1.0 / 13 + q * (1.0 / 15)
    series = 1.0 / 11 + q * series
    series = 1.0 / 9 + q * series
    series = 1.0 / 7 + q * series
    series = 1.0 / 5 + q * series
    series = 1.0 / 3 + q * series
    return tl.maximum(x, 0.0) + 2.0 * s * (1.0 + q * series)


@triton.jit
def forward_gates(
    a, b, a_log, dt_bias, g, beta,
    a_row, a_token, b_row, b_token,
    row, first, num_tokens, num_heads, block_tokens, HEADS: tl.constexpr,
):  # fmt: skip
    """g and beta of `block_tokens` tokens of one row, from `first` on, all heads."""
    last = tl.minimum(first + block_tokens, num_tokens)
    head = tl.arange(0, HEADS)[None, :]
    real = head < num_heads
    if a is not None:
        rate = -tl.exp(tl.load(a_log + head, mask=real, other=0.0).to(tl.float32))
        bias = tl.load(dt_bias + head, mask=real, other=0.0).to(tl.float32)
    for i in range(0, block_tokens, TOKENS_PER_STEP):
        token = (first + i + tl.arange(0, TOKENS_PER_STEP))[:, None]
        mask = real & (token < last)
        token = token.to(tl.int64)
        out = (row.to(tl.int64) * num_heads + head) * num_tokens + token
        if a is not None:
            offset = row.to(tl.int64) * a_row + token * a_token + head
            x = tl.load(a + offset, mask=mask, other=0.0).to(tl.float32)
            tl.store(g + out, rate * softplus(x + bias), mask=mask)
        if b is not None:
            offset = row.to(tl.int64) * b_row + token * b_token + head
            x = tl.load(b + offset, mask=mask, other=0.0).to(tl.float32)
            tl.store(beta + out, tl.sigmoid(x), mask=mask)


@triton.jit
def backward_gates(
    a, b, a_log, dt_bias, dg, dbeta, da, db, partial,
    a_row, a_token, b_row, b_token, da_row, da_token, db_row, db_token,
    row, first, num_tokens, num_heads, block_tokens, HEADS: tl.constexpr,
):  # fmt: skip
    """Gradients of a and b, and this block's sums for A_log and dt_bias: `partial` [2, heads]."""
    last = tl.minimum(first + block_tokens, num_tokens)
    head = tl.arange(0, HEADS)[None, :]
    real = head < num_heads
    if a is not None:
        rate = -tl.exp(tl.load(a_log + head, mask=real, other=0.0).to(tl.float32))
        bias = tl.load(dt_bias + head, mask=real, other=0.0).to(tl.float32)
    d_a_log = tl.zeros([TOKENS_PER_STEP, HEADS], tl.float32)
    d_dt_bias = tl.zeros([TOKENS_PER_STEP, HEADS], tl.float32)
    for i in range(0, block_tokens, TOKENS_PER_STEP):
        token = (first + i + tl.arange(0, TOKENS_PER_STEP))[:, None]
        mask = real & (token < last)
        token = token.to(tl.int64)
        upstream = (row.to(tl.int64) * num_heads + head) * num_tokens + token
        if a is not None:
            offset = row.to(tl.int64) * a_row + token * a_token + head
            x = tl.load(a + offset, mask=mask, other=0.0).to(tl.float32) + bias
            scaled = tl.load(dg + upstream, mask=mask, other=0.0).to(tl.float32) * rate
            dx = scaled * tl.sigmoid(x)
            d_a_log += scaled * softplus(x)
            d_dt_bias += dx
            offset = row.to(tl.int64) * da_row + token * da_token + head
            tl.store(da + offset, dx.to(da.dtype.element_ty), mask=mask)
        if b is not None:
            offset = row.to(tl.int64) * b_row + token * b_token + head
            strength = tl.sigmoid(tl.load(b + offset, mask=mask, other=0.0).to(tl.float32))
            dx = tl.load(dbeta + upstream, mask=mask, other=0.0).to(tl.float32)
            dx = dx * strength * (1.0 - strength)
            offset = row.to(tl.int64) * db_row + token * db_token + head
            tl.store(db + offset, dx.to(db.dtype.element_ty), mask=mask)
    if a is not None:
        tl.store(partial + head, tl.sum(d_a_log, axis=0)[None, :], mask=real)
        tl.store(partial + num_heads + head, tl.sum(d_dt_bias, axis=0)[None, :], mask=real)
