"""The short convolution against torch.nn.Conv1d, and its causality."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hydra_kernels.short_conv import short_conv

CHANNELS = 6


def make_inputs(length: int, taps: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [2, length, CHANNELS], weight and initial state in float64, all with gradients."""
    rng = torch.Generator().manual_seed(length)
    shapes = (2, length, CHANNELS), (CHANNELS, taps), (2, taps - 1, CHANNELS)
    return tuple(
        torch.randn(s, generator=rng, dtype=torch.float64, requires_grad=True) for s in shapes
    )


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("taps", [1, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 65])
def test_equals_conv1d(length: int, taps: int, activation: str | None):
    x, weight, _ = make_inputs(length, taps)
    conv = torch.nn.Conv1d(
        CHANNELS, CHANNELS, taps, groups=CHANNELS, padding=taps - 1, bias=False, dtype=x.dtype
    )
    conv.weight.data.copy_(weight[:, None])
    expected = conv(x.mT)[..., :length].mT
    expected = F.silu(expected) if activation else expected
    actual = short_conv(x, weight, activation=activation, impl="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)

    upstream = torch.randn_like(expected)
    dx, dweight = torch.autograd.grad(expected, (x, conv.weight), upstream)
    actual_dx, actual_dweight = torch.autograd.grad(actual, (x, weight), upstream)
    torch.testing.assert_close(actual_dx, dx, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual_dweight, dweight[:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("token", range(9))
def test_causal(token: int):
    x, weight, _ = make_inputs(9)
    before = short_conv(x, weight, impl="reference")
    changed = x.detach().clone()
    changed[:, token] += 1
    moved = (short_conv(changed, weight, impl="reference") != before).any(dim=2).any(dim=0)
    reached = [token <= t < token + 4 for t in range(9)]
    assert moved.tolist() == reached

    (gradient,) = torch.autograd.grad(before[:, token].sum(), x)
    seen = (gradient != 0).any(dim=2).any(dim=0)
    assert seen.tolist() == [token - 4 < t <= token for t in range(9)]


@pytest.mark.parametrize("split", [1, 3, 50])
def test_initial_state_continues_the_sequence(split: int):
    x, weight, state = make_inputs(65)
    whole = short_conv(x, weight, initial_state=state, impl="reference")
    seen = torch.cat((state, x[:, :split]), 1)
    head = short_conv(x[:, :split], weight, initial_state=state, impl="reference")
    tail = short_conv(x[:, split:], weight, initial_state=seen[:, -3:], impl="reference")
    parts = torch.cat((head, tail), 1)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, (x, weight, state), upstream)
    for actual, other in zip(
        torch.autograd.grad(parts, (x, weight, state), upstream), expected, strict=True
    ):
        torch.testing.assert_close(actual, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[65], [1, 63, 1], [1, 2, 3, 4, 5] * 4 + [5], [40, 25]])
def test_packed_documents_equal_each_alone(lengths: list[int]):
    x, weight, state = (t[:1] if t.dim() == 3 else t for t in make_inputs(65))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()  # as Megatron's
    packed = short_conv(x, weight, initial_state=state, cu_seqlens=cu_seqlens, impl="reference")
    states = [state] + [torch.zeros_like(state)] * (len(lengths) - 1)
    alone = torch.cat(
        [
            short_conv(document, weight, initial_state=before, impl="reference")
            for document, before in zip(x.split(lengths, 1), states, strict=True)
        ],
        1,
    )
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-14)
    upstream = torch.randn_like(packed)
    for actual, other in zip(
        torch.autograd.grad(packed, (x, weight, state), upstream),
        torch.autograd.grad(alone, (x, weight, state), upstream),
        strict=True,
    ):
        torch.testing.assert_close(actual, other, rtol=1e-12, atol=1e-12)


def test_without_initial_state_it_starts_from_zeros():
    x, weight, state = make_inputs(5)
    zeros = short_conv(x, weight, initial_state=torch.zeros_like(state), impl="reference")
    assert torch.equal(short_conv(x, weight, impl="reference"), zeros)


def test_bf16_is_computed_in_float32():
    x, weight, state = (tensor.detach().bfloat16() for tensor in make_inputs(65))
    y = short_conv(x, weight, initial_state=state, impl="reference")
    exact = short_conv(x.double(), weight.double(), initial_state=state.double(), impl="reference")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"impl": "fla"}, "CUDA tensors alone, got cpu"),
        ({"impl": "fused"}, "impl must be one of"),
        ({"activation": "gelu"}, "activation must be 'silu' or None"),
        ({"weight": torch.zeros(CHANNELS + 1, 4)}, "weight must be"),
        ({"x": torch.zeros(2, 0, CHANNELS)}, "x must be"),
        ({"initial_state": torch.zeros(2, 4, CHANNELS)}, "initial_state must be"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "go with one row, got \\(2,\\) and 2 rows"),
    ],
)
def test_bad_input_is_named(changes: dict, message: str):
    x, weight, _ = make_inputs(5)
    with pytest.raises(ValueError, match=message):
        short_conv(**({"x": x, "weight": weight, "impl": "reference"} | changes))
