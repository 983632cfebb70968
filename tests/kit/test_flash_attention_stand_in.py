"""The stand-in for flash-attn, and its kernel, attend as PyTorch does with the mask written out.

Catches: a causal mask from the first key, a window that is one token off, another head's keys.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kit.flash_attention_stand_in import (
    NO_WINDOW,
    Window,
    flash_attn_func,
    flash_attn_varlen_func,
    pad_input,
    unpad_input,
)
from torch import Tensor

on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_a_gpu)])
OPTIONS = pytest.mark.parametrize(
    ("causal", "window_size"),
    [(False, NO_WINDOW), (True, NO_WINDOW), (True, (5, 5)), (False, (4, 2))],
    ids=["all", "causal", "causal window", "window"],
)


def _inputs(num_queries: int, num_keys: int) -> list[Tensor]:
    """Values that bfloat16 has."""
    generator = torch.Generator().manual_seed(num_queries)
    shapes = (num_queries, 6, 64), (num_keys, 2, 64), (num_keys, 2, 64)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def _expected(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: Window) -> Tensor:
    """Of one row, in float64."""
    shape, diagonal = (len(q), len(k)), len(k) - len(q)
    mask = torch.ones(shape, dtype=torch.bool)
    left, right = window_size
    if left >= 0:
        mask = mask.triu(diagonal - left)
    if right >= 0 or causal:
        mask = mask.tril(diagonal + (0 if causal else right))
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(3, dim=0) for x in (k, v))
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.2)
    return found.transpose(0, 1)


def _check(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0.01, atol=0.01)


@DEVICES
@OPTIONS
@pytest.mark.parametrize("sizes", [(40, 40), (7, 40), (1, 40)], ids=str)
def test_rows_of_one_length(device, causal, window_size, sizes):
    rows = [_inputs(*sizes), [x.flip(0) for x in _inputs(*sizes)]]
    expected = torch.stack([_expected(*row, causal, window_size) for row in rows])
    given = (torch.stack(x).to(device) for x in zip(*rows, strict=True))
    options = dict(softmax_scale=0.2, causal=causal, window_size=window_size)
    _check(flash_attn_func(*given, **options), expected)


@DEVICES
@OPTIONS
def test_rows_of_several_lengths(device, causal, window_size):
    sizes = [(40, 40), (3, 29), (0, 5), (1, 1), (17, 100)]
    rows = [_inputs(*each) for each in sizes]
    expected = torch.cat([_expected(*row, causal, window_size) for row in rows])
    given = (torch.cat(x).to(device) for x in zip(*rows, strict=True))
    ends = torch.tensor([(0, 0), *sizes], device=device).cumsum(0, dtype=torch.int32)
    options = dict(softmax_scale=0.2, causal=causal, window_size=window_size)
    starts = [each.contiguous() for each in ends.unbind(1)]
    _check(flash_attn_varlen_func(*given, *starts, 40, 100, **options), expected)


@DEVICES
def test_a_query_without_a_key_has_zeros(device):
    q, k, v = (x.to(device) for x in _inputs(2, 40))
    starts = torch.tensor([[0, 1, 2], [0, 0, 40]], dtype=torch.int32, device=device)
    found = flash_attn_varlen_func(q, k, v, *starts, 1, 40, causal=True)
    assert (found[0] == 0).all() and (found[1] != 0).all()


def test_padding_goes_and_comes_back():
    x = torch.arange(1, 25).view(2, 4, 3)
    mask = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0]])
    real, places, starts, longest, lengths = unpad_input(x, mask)
    assert torch.equal(real, x[mask.bool()]) and places.tolist() == [1, 3, 4, 5, 6]
    assert (starts.tolist(), longest, lengths.tolist()) == ([0, 2, 5], 3, [2, 3])
    assert torch.equal(pad_input(real, places, 2, 4), x * mask[..., None])
