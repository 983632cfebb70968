"""Windowed attention against its definition, token by token in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hydra_kernels.window_attention import window_attention

HEADS, DIM = 3, 4


def make_inputs(length: int, batch: int = 2, window: int = 0, dtype=torch.float64) -> dict:
    """Random vectors and sinks; key and value before the row if a window is given."""
    rng = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)

    inputs = {name: randn(batch, length, HEADS, DIM) for name in "qkv"}
    inputs["sink"] = randn(HEADS)
    for name in ("key", "value") if window else ():
        inputs[name] = randn(batch, window - 1, HEADS, DIM)
    return inputs


def by_definition(inputs, window, num_before=None, starts=()):
    """One query and one head at a time."""
    q, k, v, sink = (inputs[name] for name in ("q", "k", "v", "sink"))
    rows = []
    for row in range(len(q)):
        count = 0 if num_before is None else int(num_before[row])
        outputs = []
        for i in range(q.shape[1]):
            document = max((start for start in starts if start <= i), default=0)
            reach = i - window + 1
            least = max(reach, document) if document else max(reach, -count)
            seen_k, seen_v = (
                [
                    x[row, j] if j >= 0 else inputs[name][row, window - 1 + j]
                    for j in range(least, i + 1)
                ]
                for x, name in ((k, "key"), (v, "value"))
            )
            scores = torch.stack([(q[row, i] * x).sum(-1) for x in seen_k]) / math.sqrt(DIM)
            weights = scores.exp() / (scores.exp().sum(0) + sink.exp())
            outputs.append((weights[..., None] * torch.stack(seen_v)).sum(0))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def assert_same(forward, expected, inputs: dict) -> None:
    """Outputs, and gradients of a random projection."""
    results = []
    for function in (forward, expected):
        own = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        output = function(own)
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad((output * weight).sum(), list(own.values()))
        results.append([output, *gradients])
    for found, true in zip(*results, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [1, 4, 5, 16, 21])
@pytest.mark.parametrize("window", [1, 2, 5, 21, 64])
def test_equals_its_definition(length: int, window: int):
    assert_same(
        lambda x: window_attention(x["q"], x["k"], x["v"], window=window, sink=x["sink"]),
        lambda x: by_definition(x, window),
        make_inputs(length),
    )


@pytest.mark.parametrize("window, length", [(2, 9), (5, 3), (5, 5), (5, 12), (9, 9)])
@pytest.mark.parametrize("cuts", [None, [0, 1, 3]], ids=str)
def test_tokens_before_the_row_are_seen(window: int, length: int, cuts):
    """Few of them, as at a document's beginning, and all."""
    batch = 1 if cuts else 3
    num_before = torch.tensor([window - 1, 0, 1])[:batch]
    cu_seqlens = None if cuts is None else torch.tensor([*cuts, length]).unique()
    starts = () if cuts is None else cuts[1:]

    def blocks(x):
        return window_attention(
            x["q"], x["k"], x["v"], window=window, sink=x["sink"],
            before=(x["key"], x["value"]), num_before=num_before, cu_seqlens=cu_seqlens,
        )  # fmt: skip

    inputs = make_inputs(length, batch, window)
    assert_same(blocks, lambda x: by_definition(x, window, num_before, starts), inputs)


@pytest.mark.parametrize("window", [1, 3, 8, 40])
@pytest.mark.parametrize("lengths", [[20], [1, 18, 1], [1] * 20, [8, 8, 4], [3, 1, 16]], ids=str)
def test_documents_do_not_see_each_other(window: int, lengths: list[int]):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    assert_same(
        lambda x: window_attention(
            x["q"], x["k"], x["v"], window=window, sink=x["sink"], cu_seqlens=cu_seqlens
        ),
        lambda x: by_definition(x, window, starts=cu_seqlens[1:-1].tolist()),
        make_inputs(20, batch=1),
    )


def test_without_a_sink_a_window_over_all_is_full_attention():
    q, k, v, sink = (x.float() for x in make_inputs(30).values())
    full = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    torch.testing.assert_close(window_attention(q, k, v, window=30), full)
    no_weight = torch.full_like(sink, -torch.inf).nan_to_num(neginf=-1e4)
    found = window_attention(q, k, v, window=30, sink=no_weight)
    torch.testing.assert_close(found, full)


def test_a_sink_takes_all_that_it_is_given():
    q, k, v, sink = make_inputs(12).values()
    assert window_attention(q, k, v, window=4, sink=sink + 60).abs().max() < 1e-9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window, length", [(64, 1000), (512, 4096), (512, 300), (100, 1001)])
def test_on_a_gpu_in_bf16(window: int, length: int):
    """Within a few roundings of float64, blocks, documents and tokens before them."""
    rng = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, length, 4, 128, device="cuda", generator=rng) for _ in range(3))
    sink = torch.randn(4, device="cuda", generator=rng)
    before = torch.randn(2, 1, window - 1, 4, 128, device="cuda", generator=rng).unbind()
    few = torch.tensor([window // 2], device="cuda")
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        own = [x.bfloat16().to(dtype).requires_grad_() for x in (q, k, v, *before)]
        output = window_attention(
            *own[:3], window=window, sink=sink, before=(own[3], own[4]), num_before=few,
            cu_seqlens=torch.tensor([0, 1, length // 3, length], device="cuda"),
        )  # fmt: skip
        gradients = torch.autograd.grad(output.square().sum(), own)
        results.append([x.double() for x in (output, *gradients)])
    for exact, found in zip(*results, strict=True):
        assert (found - exact).norm() <= 2 * 2**-7 * exact.norm()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(window=0), "window must be 1 or more, got 0"),
        (dict(sink=torch.zeros(2)), r"sink must be \(3,\)"),
        (dict(k=torch.zeros(2, 5, 1, 4)), r"k must be \(2, 5, 3, 4\)"),
        (dict(num_before=torch.zeros(2)), "before and num_before go together"),
        (
            dict(before=(torch.zeros(2, 1, 3, 4),) * 2, num_before=torch.zeros(2)),
            r"key before must be \(2, 2, 3, 4\)",
        ),
    ],
)
def test_bad_input_is_named(changes: dict, message: str):
    inputs = {name: x.float() for name, x in make_inputs(5).items()}
    with pytest.raises(ValueError, match=message):
        window_attention(**{**inputs, "window": 3, **changes})
