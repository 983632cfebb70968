"""The chunked loss against float64 autograd through full logits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hydra_kernels import linear_kl as operator
from kit.losses import with_options
from torch.utils._python_dispatch import TorchDispatchMode

linear_kl = with_options(partial(operator.linear_kl, impl="reference"))

ROWS, VOCAB, HIDDEN, TEACHER_HIDDEN = 23, 37, 8, 11
MASKS = {
    "all": torch.ones(ROWS),
    "partial": (torch.arange(ROWS) % 3 != 1).float(),
    "weighted": torch.linspace(0.1, 2, ROWS),
    "none": torch.zeros(ROWS),
}


def make_inputs(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Student and teacher far apart, with logits of several units, and random labels."""
    rng = torch.Generator().manual_seed(0)
    shapes = {
        "student_hidden": (ROWS, HIDDEN),
        "student_weight": (VOCAB, HIDDEN),
        "teacher_hidden": (ROWS, TEACHER_HIDDEN),
        "teacher_weight": (VOCAB, TEACHER_HIDDEN),
    }
    inputs = {
        name: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }
    return inputs | {"labels": torch.randint(VOCAB, (ROWS,), generator=rng)}


def loss_and_gradients(
    inputs: dict[str, torch.Tensor], **settings
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The parts, and the gradients of the student's hidden states and weights."""
    student = [
        inputs[name].clone().requires_grad_() for name in ("student_hidden", "student_weight")
    ]
    parts = linear_kl(*student, *list(inputs.values())[2:], **settings)
    return [part.detach() for part in parts], list(torch.autograd.grad(parts.loss_sum, student))


def full_logits_loss(
    inputs: dict[str, torch.Tensor],
    loss_mask: torch.Tensor,
    kl_weight: float,
    ce_weight: float,
    temperature: float = 1.0,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same from PyTorch's own KL and cross entropy on full logits in float64."""
    hidden, weight, teacher_hidden, teacher_weight = (
        x.double().requires_grad_() for x in list(inputs.values())[:4]
    )
    logits = hidden @ weight.T
    kl = F.kl_div(
        F.log_softmax(logits / temperature, -1),
        F.log_softmax(teacher_hidden @ teacher_weight.T / temperature, -1).detach(),
        log_target=True,
        reduction="none",
    ).sum(-1)
    kl_sum = temperature**2 * (kl * loss_mask).sum()
    ce_sum = (F.cross_entropy(logits, inputs["labels"], reduction="none") * loss_mask).sum()
    loss = kl_weight * kl_sum + ce_weight * ce_sum
    gradients = torch.autograd.grad(loss, (hidden, weight))
    return [x.detach() for x in (loss, kl_sum, ce_sum, loss_mask.sum().double())], list(gradients)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("chunk_tokens", [1, 7, ROWS, ROWS + 10])
def test_equals_autograd_through_full_logits(chunk_tokens: int, mask: str, temperature: float):
    inputs, weights = make_inputs(), {"kl_weight": 0.7, "ce_weight": 0.3}
    actual = loss_and_gradients(
        inputs | {"loss_mask": MASKS[mask]},
        chunk_tokens=chunk_tokens,
        temperature=temperature,
        **weights,
    )
    expected = full_logits_loss(inputs, MASKS[mask].double(), temperature=temperature, **weights)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_summed_in_float32(dtype: torch.dtype):
    inputs, weights = make_inputs(dtype), {"kl_weight": 0.7, "ce_weight": 0.3}
    mask = MASKS["weighted"].repeat(20)
    for name in ("student_hidden", "teacher_hidden", "labels"):
        inputs[name] = inputs[name].repeat(20, *[1] * (inputs[name].dim() - 1))
    (*sums, _), gradients = loss_and_gradients(
        inputs | {"loss_mask": mask}, chunk_tokens=1, **weights
    )
    (*exact_sums, _), exact_gradients = full_logits_loss(inputs, mask.double(), **weights)
    assert all(x.dtype == torch.float32 for x in sums)
    assert all(x.dtype == dtype for x in gradients)
    # bf16: the logits and their gradient are rounded once, 460 chunks or not.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    for actual, exact in zip(sums + gradients, exact_sums + exact_gradients, strict=True):
        assert (actual - exact).norm() <= tolerance * exact.norm()


def test_without_teacher_it_is_cross_entropy():
    inputs = make_inputs() | {"loss_mask": MASKS["partial"]}
    expected = full_logits_loss(inputs, MASKS["partial"].double(), 0.0, 2.0)
    inputs |= {"teacher_hidden": None, "teacher_weight": None}
    (loss, kl, ce, num_tokens), gradients = loss_and_gradients(
        inputs, kl_weight=0.0, ce_weight=2.0, chunk_tokens=5
    )
    assert kl == 0 and num_tokens == MASKS["partial"].sum()
    torch.testing.assert_close((loss, ce), (expected[0][0], expected[0][2]))
    torch.testing.assert_close(gradients, expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64])
def test_every_row_counts_and_masked_rows_do_not(chunk_tokens: int):
    inputs = make_inputs()
    mask = MASKS["partial"]

    def kl_and_gradient(teacher_hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        changed = inputs | {"teacher_hidden": teacher_hidden, "loss_mask": mask}
        parts, (gradient, _) = loss_and_gradients(
            changed, kl_weight=1.0, ce_weight=0.0, chunk_tokens=chunk_tokens
        )
        return parts[1], gradient

    kl, gradient = kl_and_gradient(inputs["teacher_hidden"])
    for row in range(ROWS):
        teacher_hidden = inputs["teacher_hidden"].clone()
        teacher_hidden[row] += 0.01
        moved_kl, moved_gradient = kl_and_gradient(teacher_hidden)
        assert (abs(moved_kl - kl) > 1e-6) == bool(mask[row]), row
        moved_rows = (moved_gradient != gradient).any(-1).nonzero().flatten().tolist()
        assert moved_rows == ([row] if mask[row] else []), row


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_student_equal_to_its_teacher_has_no_kl(dtype: torch.dtype, temperature: float):
    inputs = make_inputs(dtype) | {"loss_mask": MASKS["all"]}
    inputs |= {f"teacher_{name}": inputs[f"student_{name}"] for name in ("hidden", "weight")}
    parts, gradients = loss_and_gradients(
        inputs, kl_weight=1.0, ce_weight=0.0, chunk_tokens=7, temperature=temperature
    )
    assert parts[0] == parts[1] == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_huge_logits_stay_finite():
    inputs = make_inputs(torch.float32) | {"loss_mask": MASKS["all"]}
    inputs["student_hidden"] = inputs["student_hidden"] * 1e3
    inputs["teacher_hidden"] = inputs["teacher_hidden"] * 1e3
    parts, gradients = loss_and_gradients(inputs, kl_weight=1.0, ce_weight=1.0, chunk_tokens=7)
    assert all(x.isfinite().all() for x in parts + gradients)
    expected, _ = full_logits_loss(inputs, MASKS["all"].double(), 1.0, 1.0)
    torch.testing.assert_close(parts[1].double(), expected[1], rtol=1e-5, atol=0)


def test_masked_rows_may_have_any_label():
    inputs = make_inputs() | {"loss_mask": MASKS["partial"]}
    settings = {"kl_weight": 1.0, "ce_weight": 1.0, "chunk_tokens": 7}
    expected = loss_and_gradients(inputs, **settings)
    labels = torch.where(MASKS["partial"] == 0, -100, inputs["labels"])
    actual = loss_and_gradients(inputs | {"labels": labels}, **settings)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_backward_scales_and_may_run_twice():
    inputs = make_inputs() | {"loss_mask": MASKS["all"]}
    settings = {"kl_weight": 1.0, "ce_weight": 1.0, "chunk_tokens": 7}
    _, expected = loss_and_gradients(inputs, **settings)
    hidden = inputs["student_hidden"].clone().requires_grad_()
    parts = linear_kl(hidden, *list(inputs.values())[1:], **settings)
    assert not parts.kl_sum.requires_grad and not parts.ce_sum.requires_grad
    for _ in range(2):
        (gradient,) = torch.autograd.grad(parts.loss_sum / 4, hidden, retain_graph=True)
        torch.testing.assert_close(gradient, expected[0] / 4)
    with torch.no_grad():
        silent = linear_kl(hidden, *list(inputs.values())[1:], **settings)
    assert not silent.loss_sum.requires_grad
    assert torch.equal(silent.loss_sum, parts.loss_sum)


def test_logits_can_stay_float32():
    inputs = make_inputs() | {"loss_mask": MASKS["partial"]}
    low = {
        name: x.detach().bfloat16() if name.endswith(("hidden", "weight")) else x
        for name, x in inputs.items()
    }
    settings = {"kl_weight": 1.0, "ce_weight": 0.0, "chunk_tokens": 7}
    exact = linear_kl(
        **{name: x.double() if x.dtype == torch.bfloat16 else x for name, x in low.items()},
        **settings,
    ).kl_sum
    rounded, whole = (
        abs(linear_kl(**low, **settings, float32_logits=wide).kl_sum - exact)
        for wide in (False, True)
    )
    assert whole <= 1e-5 * exact < rounded


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.num_elements = max(self.num_elements, x.numel())
        return result


def test_full_logits_never_exist():
    inputs = make_inputs() | {"loss_mask": MASKS["all"]}
    with LargestTensor() as largest:
        loss_and_gradients(inputs, kl_weight=1.0, ce_weight=1.0, chunk_tokens=2)
    assert largest.num_elements == VOCAB * TEACHER_HIDDEN < ROWS * VOCAB
