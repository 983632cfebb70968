"""What forward and backward share: a tile's rows, the convolution's window, norms, rotation.

A program holds a tile of heads x strips rows. Each row walks its own strip of consecutive tokens
of one head, so that the convolution's past and, backward, its future stay in registers: x and the
upstream gradient are read once, dx is written once. Rows of neighbouring heads lie next to each
other in memory and share cos and sin.

A row's vector is a pair of halves, dimensions 0 to d/2 - 1 and d/2 to d - 1, which is how
rotate-half pairs them: the rotation never leaves a thread. Vectors `past`, `taps` and `future`
are tuples of such pairs, by lag.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Every window has room for four taps; fewer are padded with zeros.
MAX_LAG = tl.constexpr(3)
HEADS_PER_TILE = tl.constexpr(4)
# 1 / 1e-12: the most that L2 normalisation multiplies by, as torch.nn.functional.normalize does.
MOST = tl.constexpr(1e12)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_pair(pointers, mask, HALF: tl.constexpr):
    """Both halves of each row's vector in float32; zeros where masked."""
    low = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(pointers + HALF, mask=mask, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def store_pair(pointers, pair, mask, HALF: tl.constexpr):
    tl.store(pointers, pair[0].to(pointers.dtype.element_ty), mask=mask)
    tl.store(pointers + HALF, pair[1].to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def add(a, b):
    return a[0] + b[0], a[1] + b[1]


@triton.jit
def times(a, b):
    return a[0] * b[0], a[1] * b[1]


@triton.jit
def scaled(a, factor):
    return a[0] * factor, a[1] * factor


@triton.jit
def dot(a, b):
    """Each row's inner product, `[rows, 1]`."""
    return tl.sum(a[0] * b[0] + a[1] * b[1], axis=1)[:, None]


@triton.jit
def where(condition, pair):
    """The pair where its row's condition holds, else zeros."""
    return tl.where(condition[:, None], pair[0], 0.0), tl.where(condition[:, None], pair[1], 0.0)


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)) by the two approximations that take one instruction each.

    The division and the exp that guard denormals and overflow take twelve; here 2^inf gives the
    0 that it should. The error is that of float32's last two bits.
    """
    root = tl.rsqrt(1.0 + tl.exp2(z * -LOG2_E))
    return root * root


@triton.jit
def inverse_rms(c, eps, DIM: tl.constexpr):
    return tl.rsqrt(dot(c, c) * (1.0 / DIM) + eps)


@triton.jit
def inverse_norm(square):
    """1 / max(norm, 1e-12), from the norm's square."""
    return tl.minimum(tl.rsqrt(square), MOST)


@triton.jit
def load_tap(conv_weight, channel, mask, LAG: tl.constexpr, TAPS: tl.constexpr, HALF: tl.constexpr):
    """The tap on the token LAG back; zeros where the convolution does not reach so far."""
    pointers = conv_weight + channel * TAPS + (TAPS - 1 - LAG)
    low = tl.load(pointers, mask=mask & (LAG < TAPS), other=0.0).to(tl.float32)
    high = tl.load(pointers + HALF * TAPS, mask=mask & (LAG < TAPS), other=0.0).to(tl.float32)
    return low, high


@triton.jit
def load_taps(conv_weight, channel, mask, TAPS: tl.constexpr, HALF: tl.constexpr):
    """The taps on a token itself and on the one, two and three before it."""
    return (
        load_tap(conv_weight, channel, mask, 0, TAPS, HALF),
        load_tap(conv_weight, channel, mask, 1, TAPS, HALF),
        load_tap(conv_weight, channel, mask, 2, TAPS, HALF),
        load_tap(conv_weight, channel, mask, 3, TAPS, HALF),
    )


@triton.jit
def load_token_before(
    x_rows, x_token, state_rows, num_channels, start, num_tokens, mask,
    LAG: tl.constexpr, TAPS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The token LAG before each strip's start: of x, of the initial state, or zeros."""
    token = start - LAG
    inside = mask & ((token >= 0) & (token < num_tokens))[:, None]
    pair = load_pair(x_rows - LAG * x_token, inside, HALF)
    if state_rows is not None:
        # The state's rows are tokens -(TAPS - 1) to -1 of a strip that starts the sequence.
        inside = mask & ((start == 0) & (LAG < TAPS))[:, None]
        pair = add(pair, load_pair(state_rows + (TAPS - 1 - LAG) * num_channels, inside, HALF))
    return pair


@triton.jit
def load_past(
    x_rows, x_token, state_rows, num_channels, start, num_tokens, mask,
    TAPS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The three tokens before each strip, the last one first."""
    return (
        load_token_before(
            x_rows, x_token, state_rows, num_channels, start, num_tokens, mask, 1, TAPS, HALF
        ),
        load_token_before(
            x_rows, x_token, state_rows, num_channels, start, num_tokens, mask, 2, TAPS, HALF
        ),
        load_token_before(
            x_rows, x_token, state_rows, num_channels, start, num_tokens, mask, 3, TAPS, HALF
        ),
    )


@triton.jit
def within_document(triple, reach, token, num_tokens):
    """Of what lies one, two and three tokens away, what is of the same document."""
    if reach is not None:
        seen = tl.load(reach + token, mask=token < num_tokens, other=0)
        triple = (
            where(seen >= 1, triple[0]),
            where(seen >= 2, triple[1]),
            where(seen >= 3, triple[2]),
        )
    return triple


@triton.jit
def convolve(taps, x, past):
    # A chain, so that each step is one multiply-add.
    z = add(times(taps[0], x), times(taps[1], past[0]))
    return add(add(z, times(taps[2], past[1])), times(taps[3], past[2]))


@triton.jit(do_not_specialize=["num_tokens", "num_documents"])
def reach_kernel(
    cu_seqlens, reach, num_tokens, num_documents, STEPS: tl.constexpr, BLOCK: tl.constexpr
):
    """How many tokens back, up to three, each token of a packed row may see: int32 [t].

    The first document has no bound: before it lie its initial state or zeros. STEPS halvings find
    a token among 2^STEPS documents.
    """
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.zeros([BLOCK], tl.int32)
    last = first + (num_documents - 1)
    for _ in range(STEPS):  # the last document that has begun
        middle = (first + last + 1) // 2
        begun = tl.load(cu_seqlens + middle) <= token
        first = tl.where(begun, middle, first)
        last = tl.where(begun, last, middle - 1)
    position = (token - tl.load(cu_seqlens + first)).to(tl.int32)
    seen = tl.where(first == 0, MAX_LAG, tl.minimum(position, MAX_LAG))
    tl.store(reach + token, seen, mask=token < num_tokens)
