"""fla's kernels against the float64 recurrence, by the error of the same formula in bf16.

A kernel passes if it is at most twice as far from float64 as our reference is when its matrix
products run in bf16: what the number format costs, and no more.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hydra_kernels.gated_delta_rule import gated_delta_rule
from hydra_kernels.gated_delta_rule.reference import recurrent_gated_delta_rule
from hydra_kernels.short_conv import short_conv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def gradients(outputs, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs, and the gradients of a random projection of them, by name and in float64."""
    rng = torch.Generator(device="cuda").manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=rng, device="cuda", dtype=torch.float64)).sum()
        for x in outputs
    )
    grads = torch.autograd.grad(loss, list(inputs.values()))
    named = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    named |= {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}
    return {name: x.double() for name, x in named.items()}


def assert_at_most_twice_the_error(actual: dict, bf16: dict, exact: dict) -> None:
    for name, value in exact.items():
        error, allowed = ((x[name] - value).norm() / value.norm() for x in (actual, bf16))
        assert error <= 2 * allowed, f"{name}: error {error:.2e}, bf16 reference {allowed:.2e}"


def with_grad(inputs: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict:
    return {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in inputs.items()}


def documents(length: int) -> torch.Tensor:
    """Where a row's documents begin: one of a single token, others across chunks."""
    return torch.tensor([0, 1, length // 3, length], device="cuda", dtype=torch.int32).unique()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("length", [1, 63, 130, 512])
def test_gated_delta_rule(length: int, head_dim: int, packed: bool, monkeypatch):
    monkeypatch.setenv("FLA_FLASH_QLA", "0")
    check_gated_delta_rule(length, 1 if packed else 2, 4, head_dim, packed)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [130, 1024])
def test_flash_qla_behind_fla(length: int, packed: bool, monkeypatch, caplog):
    """FlashQLA compiles for each number of heads for minutes: here two of the benchmarks'."""
    pytest.importorskip("flash_qla")
    monkeypatch.setenv("FLA_FLASH_QLA", "1")
    with caplog.at_level("INFO", logger="fla.backends"):
        check_gated_delta_rule(length, 1, 12 if packed else 14, 128, packed)
    assert "rejected" not in caplog.text


def check_gated_delta_rule(
    length: int, batch: int, heads: int, head_dim: int, packed: bool
) -> None:
    """Packed rows have two value heads a key head, as under context parallelism."""
    group = 2 if packed else 1
    rng = torch.Generator(device="cuda").manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, device="cuda")

    cu_seqlens = documents(length) if packed else None
    vectors, values = (batch, length, heads, head_dim), (batch, length, group * heads, head_dim)
    inputs = {
        "q": F.normalize(randn(*vectors), dim=-1).bfloat16(),
        "k": F.normalize(randn(*vectors), dim=-1).bfloat16(),
        "v": randn(*values).bfloat16(),
        "g": F.logsigmoid(randn(*values[:3]) + 2),
        "beta": randn(*values[:3]).sigmoid(),
        "initial_state": randn(batch, group * heads, head_dim, head_dim) * 0.1,
    }
    exact_inputs = with_grad(inputs, torch.float64)
    q, k, v, g, beta, state = exact_inputs.values()
    q, k = (x.repeat_interleave(group, dim=2) for x in (q, k))
    exact = gradients(
        recurrent_gated_delta_rule(q, k, v, g, beta, head_dim**-0.5, state, cu_seqlens),
        exact_inputs,
    )
    results = []
    for impl in ("fla", "reference"):
        own = with_grad(inputs)
        with torch.autocast("cuda", torch.bfloat16, enabled=impl == "reference"):
            outputs = gated_delta_rule(
                **own, output_final_state=True, cu_seqlens=cu_seqlens, impl=impl
            )
        assert outputs.output.dtype == torch.bfloat16
        if impl == "fla":  # autocast makes the reference's state bf16 too
            assert outputs.final_state.dtype == torch.float32
        results.append(gradients(outputs, own))
    assert_at_most_twice_the_error(*results, exact)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("length", [1, 3, 130])
def test_short_conv(length: int, with_state: bool, activation: str | None, packed: bool):
    rng = torch.Generator(device="cuda").manual_seed(0)
    batch, cu_seqlens = (1, documents(length)) if packed else (2, None)
    shapes = {"x": (batch, length, 96), "weight": (96, 4), "initial_state": (batch, 3, 96)}
    inputs = {
        name: torch.randn(shape, generator=rng, device="cuda").bfloat16()
        for name, shape in shapes.items()
        if with_state or name != "initial_state"
    }
    results = []
    for impl, dtype in (("fla", None), ("reference", None), ("reference", torch.float64)):
        own = with_grad(inputs, dtype)
        output = short_conv(**own, activation=activation, cu_seqlens=cu_seqlens, impl=impl)
        results.append(gradients([output], own))
    assert_at_most_twice_the_error(*results)
