"""Calls that ask for CUDA on a machine without it: each answered by a tensor on the CPU.

Catches a way to ask for a device that is not mapped, a layout or number format that is lost on the
way, and a caller's arguments that are changed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is mapped with a GPU")

HERE = torch.arange(6.0).reshape(2, 3).t()  # strides (1, 3)
CUDA = torch.device("cuda", 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(2, device="cuda"),
        lambda: torch.zeros((2,), dtype=torch.int, device="cuda"),
        lambda: torch.ones(2, device=CUDA),
        lambda: torch.full((2,), 3.0, device=torch.cuda.current_device()),
        lambda: torch.arange(2, device="cuda:0"),
        lambda: torch.tensor([1, 2], device="cuda"),
        lambda: torch.as_tensor([1, 2], device="cuda"),
        lambda: torch.scalar_tensor(2, device="cuda"),
        lambda: torch.rand(2, device="cuda"),
        lambda: torch.randn(2, device="cuda"),
        lambda: torch.randint(3, (2,), device="cuda"),
        lambda: torch.randperm(3, device="cuda"),
        lambda: torch.linspace(0, 1, 3, device="cuda"),
        lambda: torch.eye(3, device="cuda"),
        lambda: torch.empty_strided((2, 2), (1, 2), device="cuda"),
        lambda: torch.empty(2, pin_memory=True),
        lambda: torch.zeros_like(HERE, device="cuda"),
        lambda: torch.empty_like(HERE, device="cuda", pin_memory=True),
        lambda: torch.randn_like(HERE, device="cuda"),
        lambda: HERE.new_empty(2, device="cuda"),
        lambda: HERE.new_zeros((2,), device="cuda"),
        lambda: HERE.new_full((2,), 1.0, device=CUDA),
        lambda: HERE.new_tensor([1.0], device="cuda"),
        lambda: HERE.to("cuda"),
        lambda: HERE.to(CUDA, torch.float64),
        lambda: HERE.to(device="cuda", dtype=torch.float64),
        lambda: HERE.cuda(),
        lambda: HERE.pin_memory(),
        lambda: nn.Linear(2, 2, device="cuda").weight,
        lambda: nn.Linear(2, 2).to("cuda").weight,
        lambda: nn.Linear(2, 2).cuda().weight,
        lambda: nn.Parameter(HERE.clone()).to("cuda"),
    ],
)
def test_a_tensor_on_the_cpu(make: Callable[[], Tensor]) -> None:
    assert make().device == torch.device("cpu")


def test_values_formats_and_strides_stay() -> None:
    assert HERE.to("cuda") is HERE
    moved = HERE.to(CUDA, torch.float64, copy=True)
    assert moved.dtype == torch.float64 and moved.stride() == HERE.stride()
    assert torch.equal(moved.float(), HERE)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    assert torch.zeros(2, **options).dtype == torch.bfloat16
    assert options == {"device": "cuda", "dtype": torch.bfloat16}


def test_types_have_the_names_that_megatron_looks_for() -> None:
    assert HERE.type() == "torch.cuda.FloatTensor"
    assert HERE.type("torch.cuda.DoubleTensor").dtype == torch.float64


def test_operators_are_not_looked_at() -> None:
    """A mode that sees every call costs small operators more than they take themselves."""
    assert torch.overrides._len_torch_function_stack() == 0
