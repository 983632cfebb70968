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


@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("length", [1, 63, 130, 512])
def test_gated_delta_rule(length: int, head_dim: int):
    rng = torch.Generator(device="cuda").manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, device="cuda")

    vectors = (2, length, 4, head_dim)
    inputs = {
        "q": F.normalize(randn(*vectors), dim=-1).bfloat16(),
        "k": F.normalize(randn(*vectors), dim=-1).bfloat16(),
        "v": randn(*vectors).bfloat16(),
        "g": F.logsigmoid(randn(2, length, 4) + 2),
        "beta": randn(2, length, 4).sigmoid(),
        "initial_state": randn(2, 4, head_dim, head_dim) * 0.1,
    }
    exact_inputs = with_grad(inputs, torch.float64)
    q, k, v, g, beta, state = exact_inputs.values()
    exact = gradients(
        recurrent_gated_delta_rule(q, k, v, g, beta, head_dim**-0.5, state), exact_inputs
    )
    results = []
    for impl in ("fla", "reference"):
        own = with_grad(inputs)
        with torch.autocast("cuda", torch.bfloat16, enabled=impl == "reference"):
            outputs = gated_delta_rule(**own, output_final_state=True, impl=impl)
        assert outputs.final_state.dtype == torch.float32
        assert outputs.output.dtype == torch.bfloat16
        results.append(gradients(outputs, own))
    assert_at_most_twice_the_error(*results, exact)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("length", [1, 3, 130])
def test_short_conv(length: int, with_state: bool, activation: str | None):
    rng = torch.Generator(device="cuda").manual_seed(0)
    shapes = {"x": (2, length, 96), "weight": (96, 4), "initial_state": (2, 3, 96)}
    inputs = {
        name: torch.randn(shape, generator=rng, device="cuda").bfloat16()
        for name, shape in shapes.items()
        if with_state or name != "initial_state"
    }
    results = []
    for impl, dtype in (("fla", None), ("reference", None), ("reference", torch.float64)):
        own = with_grad(inputs, dtype)
        results.append(gradients([short_conv(**own, activation=activation, impl=impl)], own))
    assert_at_most_twice_the_error(*results)
