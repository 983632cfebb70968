"""linear_kl against autograd through whole float64 logits, in every divergence and precision.

Triton's kernels run on a GPU, and in Triton's interpreter where there is none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hydra_kernels import linear_kl as operator
from kit.distributed import run_distributed
from kit.losses import with_options

linear_kl = with_options(operator.linear_kl)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Twice what the number format costs; the interpreter cuts bf16 off where a GPU rounds it.
FACTOR = 2 if DEVICE == "cuda" else 4
WEIGHTS = {"kl_weight": 0.7, "ce_weight": 0.3}
BETA = 0.3
UPSTREAM = 0.37
KINDS = ("forward", "reverse", "jsd")
ROWS, VOCAB, HIDDEN, TEACHER_HIDDEN = 9, 100, 8, 11
# Odd sizes; several splits of a row with a tail; large enough to fill a GPU.
SHAPES = [(ROWS, VOCAB, 4), (3, 20001, 3)] + [(1100, 50000, 300)] * (DEVICE == "cuda")


def make_inputs(
    dtype: torch.dtype, rows: int = ROWS, vocab: int = VOCAB, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Student and teacher apart by a nat or so, every fifth row masked, the others weighted."""
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    inputs = {
        "student_hidden": randn(rows, HIDDEN),
        "student_weight": 0.7 * randn(vocab, HIDDEN),
        "teacher_hidden": randn(rows, TEACHER_HIDDEN),
        "teacher_weight": 0.6 * randn(vocab, TEACHER_HIDDEN),
    }
    inputs = {name: x.to(DEVICE, dtype) for name, x in inputs.items()}
    loss_mask = randn(rows).abs()
    loss_mask[::5] = 0
    labels = torch.randint(vocab, (rows,), generator=rng)
    labels[0] = -100
    return inputs | {"labels": labels.to(DEVICE), "loss_mask": loss_mask.float().to(DEVICE)}


def run(inputs: dict[str, torch.Tensor], **settings) -> dict[str, torch.Tensor]:
    """Sums and gradients, in float64."""
    inputs = dict(inputs)
    student = ["student_hidden", "student_weight"]
    for name in student:
        inputs[name] = inputs[name].detach().requires_grad_()
    output = linear_kl(**inputs, **({"jsd_beta": BETA} | WEIGHTS | settings))
    (UPSTREAM * output.loss_sum).backward()
    gradients = {f"d{name}": inputs[name].grad for name in student}
    assert all(x.dtype == inputs[n[1:]].dtype for n, x in gradients.items())
    named = {name: x.detach() for name, x in output._asdict().items()} | gradients
    return {name: x.double() for name, x in named.items()}


def divergence(kind: str, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """[n], by PyTorch's own kl_div."""

    def kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
        return F.kl_div(log_b, log_a, log_target=True, reduction="none").sum(-1)

    if kind == "forward":
        return kl(log_p, log_q)
    if kind == "reverse":
        return kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(BETA), log_q + math.log(1 - BETA))
    return BETA * kl(log_p, log_m) + (1 - BETA) * kl(log_q, log_m)


def exact(
    inputs: dict[str, torch.Tensor], kind: str = "forward", temperature: float = 1.0
) -> dict[str, torch.Tensor]:
    """The same through whole logits in float64."""
    hidden, weight, *teacher = (x.detach().double() for x in list(inputs.values())[:4])
    hidden.requires_grad_(), weight.requires_grad_()
    logits, mask = hidden @ weight.T, inputs["loss_mask"].double()
    log_p = F.log_softmax(teacher[0] @ teacher[1].T / temperature, -1)
    log_q = F.log_softmax(logits / temperature, -1)
    kl_sum = temperature**2 * (divergence(kind, log_p, log_q) * mask).sum()
    ce = F.cross_entropy(logits, inputs["labels"], reduction="none", ignore_index=-100)
    ce_sum = (ce * mask).sum()
    loss_sum = WEIGHTS["kl_weight"] * kl_sum + WEIGHTS["ce_weight"] * ce_sum
    (UPSTREAM * loss_sum).backward()
    sums = {"loss_sum": loss_sum, "kl_sum": kl_sum, "ce_sum": ce_sum, "num_tokens": mask.sum()}
    gradients = {"dstudent_hidden": hidden.grad, "dstudent_weight": weight.grad}
    return {name: x.detach() for name, x in (sums | gradients).items()}


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def assert_at_most_twice_the_error(actual: dict, reference: dict, expected: dict, dtype) -> None:
    for name, value in expected.items():
        # A sum's error may be small by luck: the format's own step is always allowed, and the
        # few of float32's that a GPU's approximate exponentials cost.
        few = 2e-6 if DEVICE == "cuda" else 1e-6
        floor = few if dtype == torch.float32 or name.startswith("d") else 2**-9
        allowed = max(FACTOR * error(reference[name], value), floor)
        assert error(actual[name], value) <= allowed, name


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not written holds NaN."""

    def poison(allocate: Callable) -> Callable:
        def allocate_nan(*args, **options) -> torch.Tensor:
            x = allocate(*args, **options)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return allocate_nan

    for place, name in ((torch.Tensor, "new_empty"), (torch, "empty_like")):
        monkeypatch.setattr(place, name, poison(getattr(place, name)))


@pytest.mark.parametrize("chunk_tokens", [1, 4, ROWS + 3])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_reference_equals_autograd(kind: str, temperature: float, chunk_tokens: int):
    inputs = make_inputs(torch.float64)
    inputs["loss_mask"] = inputs["loss_mask"].double()
    settings = {"kind": kind, "temperature": temperature, "chunk_tokens": chunk_tokens}
    actual = run(inputs, **settings, impl="reference")
    torch.testing.assert_close(actual, exact(inputs, kind, temperature), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "float32_logits"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
)
@pytest.mark.parametrize(("rows", "vocab", "chunk_tokens"), SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_triton(
    kind: str,
    temperature: float,
    rows: int,
    vocab: int,
    chunk_tokens: int,
    dtype: torch.dtype,
    float32_logits: bool,
    poisoned: None,
):
    inputs = make_inputs(dtype, rows, vocab)
    settings = {"kind": kind, "temperature": temperature, "chunk_tokens": chunk_tokens}
    settings["float32_logits"] = float32_logits
    actual, reference = (run(inputs, **settings, impl=impl) for impl in ("triton", "reference"))
    expected = exact(inputs, kind, temperature)
    assert_at_most_twice_the_error(actual, reference, expected, dtype)
    masked = inputs["loss_mask"] == 0
    assert (actual["dstudent_hidden"][masked] == 0).all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_without_teacher_it_is_cross_entropy(impl: str):
    inputs = make_inputs(torch.float32)
    bare = inputs | {"teacher_hidden": None, "teacher_weight": None}
    actual = run(bare, kl_weight=0.0, ce_weight=0.3, chunk_tokens=4, impl=impl)
    with_teacher = run(inputs, kl_weight=0.0, ce_weight=0.3, chunk_tokens=4, impl="reference")
    assert actual.pop("kl_sum") == 0 and with_teacher.pop("kl_sum") > 0
    torch.testing.assert_close(actual, with_teacher, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_rows_may_hold_garbage(kind: str, impl: str, poisoned: None):
    inputs = make_inputs(torch.float32)
    settings = {"kind": kind, "chunk_tokens": 4, "impl": impl}
    expected = run(inputs, **settings)
    for name in ("student_hidden", "teacher_hidden"):
        inputs[name][inputs["loss_mask"] == 0] = 3e38  # its logits are infinite or not numbers
    actual = run(inputs, **settings)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_equal_to_its_teacher_has_no_divergence(kind: str, temperature: float):
    inputs = make_inputs(torch.float32)
    inputs |= {f"teacher_{name}": inputs[f"student_{name}"] for name in ("hidden", "weight")}
    settings = {"kind": kind, "temperature": temperature, "kl_weight": 1.0, "ce_weight": 0.0}
    actual = run(inputs, **settings, impl="triton")
    assert abs(actual["kl_sum"]) < 1e-5
    assert actual["dstudent_hidden"].norm() < 1e-5 and actual["dstudent_weight"].norm() < 1e-5


def test_huge_logits_stay_finite():
    inputs = make_inputs(torch.float32)
    for name in ("student_hidden", "teacher_hidden"):
        inputs[name] = inputs[name] * 1e3
    for kind in KINDS:
        actual, expected = run(inputs, kind=kind, impl="triton"), exact(inputs, kind)
        for name in actual:
            # Of KL(q || p) of 1e4 nats, float32 keeps 1e-3, and the gradient is its difference.
            allowed = 1e-2 if (kind, name[0]) == ("reverse", "d") else 1e-5
            assert error(actual[name], expected[name]) < allowed, (kind, name)


@pytest.mark.parametrize("float32_logits", [False, True])
@pytest.mark.parametrize("trains_weight", [False, True])
def test_one_output_matrix(trains_weight: bool, float32_logits: bool, poisoned: None):
    """Frozen, one product serves both models; training, the teacher's part gets no gradient."""
    inputs = make_inputs(torch.float32)
    inputs["teacher_hidden"] = inputs["teacher_hidden"][:, :HIDDEN].contiguous()
    weight = inputs["student_weight"].requires_grad_(trains_weight)
    inputs["teacher_weight"] = weight.detach()
    hidden = inputs["student_hidden"].requires_grad_()
    results = []
    for impl, teacher in (("triton", weight), ("reference", weight.detach().clone())):
        output = linear_kl(
            **(inputs | {"teacher_weight": teacher.detach()}),
            **WEIGHTS,
            chunk_tokens=4,
            float32_logits=float32_logits,
            impl=impl,
        )
        leaves = [hidden, weight] if trains_weight else [hidden]
        results.append([*output[:3], *torch.autograd.grad(output.loss_sum, leaves)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_strided_input(impl: str):
    inputs = make_inputs(torch.float32)
    expected = run(inputs, chunk_tokens=4, impl=impl)
    for name, x in inputs.items():
        apart = x[..., None].repeat(*[1] * x.dim(), 2)[..., 0]
        assert not apart.is_contiguous()
        inputs[name] = x.t().contiguous().t() if name.endswith("hidden") else apart
    actual = run(inputs, chunk_tokens=4, impl=impl)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_no_gradient_is_made_where_none_is_wanted(impl: str):
    inputs = make_inputs(torch.float32)
    with_gradient = run(inputs, impl=impl)
    silent = linear_kl(**inputs, **WEIGHTS, impl=impl)
    assert not silent.loss_sum.requires_grad
    assert silent.loss_sum.double() == with_gradient["loss_sum"]
    none = {name: x[:0] if "weight" not in name else x for name, x in inputs.items()}
    empty = run(none, impl=impl)
    assert all((x == 0).all() for x in empty.values())


def test_rounded_logits_cost_more_than_float32_logits():
    """Of a student close to its teacher: the KL is made of small differences of large logits."""
    inputs = make_inputs(torch.bfloat16, rows=12, vocab=300)
    close = inputs["teacher_hidden"].float() * (1 + 2**-6)
    inputs |= {"student_hidden": close.bfloat16(), "student_weight": inputs["teacher_weight"] * 3}
    inputs["teacher_weight"] = inputs["student_weight"]
    expected = exact(inputs)
    errors = [
        error(run(inputs, float32_logits=wide, impl="triton")["kl_sum"], expected["kl_sum"])
        for wide in (False, True)
    ]
    assert errors[1] < errors[0] / 10, errors


def test_the_weights_gradient_is_made_in_its_sums_memory(monkeypatch: pytest.MonkeyPatch):
    from hydra_kernels.linear_kl import triton_linear_kl

    monkeypatch.setattr(triton_linear_kl, "_FIRST_NARROWED", 100)  # of 800 numbers: four steps
    inputs = make_inputs(torch.bfloat16)
    weight = inputs["student_weight"].requires_grad_()
    output = linear_kl(**inputs, **WEIGHTS, impl="triton")
    (gradient,) = torch.autograd.grad(UPSTREAM * output.loss_sum, weight, retain_graph=True)
    assert gradient.untyped_storage().nbytes() == 2 * gradient.numel() * gradient.itemsize
    expected = run(inputs, impl="reference")["dstudent_weight"]
    assert error(gradient.double(), expected) < FACTOR * 2**-8
    with pytest.raises(RuntimeError, match="allows one backward"):
        torch.autograd.grad(output.loss_sum, weight)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_cuda_graph_replays_it():
    inputs = make_inputs(torch.bfloat16, 256, 4096)
    inputs["student_hidden"].requires_grad_()
    inputs["labels"].clamp_(min=0)
    settings = {"chunk_tokens": 100, "impl": "triton"}

    def step() -> list[torch.Tensor]:
        output = linear_kl(**inputs, **WEIGHTS, **settings)
        return [output.loss_sum, *torch.autograd.grad(output.loss_sum, inputs["student_hidden"])]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    other = make_inputs(torch.bfloat16, 256, 4096, seed=1)
    with torch.no_grad():
        for name in ("student_hidden", "teacher_hidden"):
            inputs[name].copy_(other[name])
    graph.replay()
    torch.testing.assert_close([x.detach() for x in captured], [x.detach() for x in step()])


def check_shards(size: int) -> None:
    """Every rank: values of the whole, gradients of its rows, and a part of the hidden states'."""
    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    weights = ("student_weight", "teacher_weight")
    inputs = make_inputs(torch.float32)
    mine = slice(group.rank() * VOCAB // size, (group.rank() + 1) * VOCAB // size)
    shard = inputs | {name: inputs[name][mine] for name in weights}
    for kind in KINDS:
        settings = {"kind": kind, "temperature": 2.0, "chunk_tokens": 4}
        for impl in ("reference", "triton"):
            expected = exact(inputs, kind, 2.0)
            actual = run(shard, **settings, group=group, impl=impl)
            torch.distributed.all_reduce(actual["dstudent_hidden"])
            expected["dstudent_weight"] = expected["dstudent_weight"][mine]
            torch.testing.assert_close(actual, expected, rtol=2e-4, atol=1e-6)
    # Padding: a little, and so much that the last rank has fewer splits of its own than others.
    for rows, part, vocab in ((ROWS, 51, VOCAB), (3, 9000, 9100)):
        inputs = make_inputs(torch.float32, rows, vocab)
        mine = slice(group.rank() * part, min((group.rank() + 1) * part, vocab))
        shard = dict(inputs)
        for name in weights:
            shard[name] = torch.full((part, inputs[name].shape[1]), 1e3)  # seen by no softmax
            shard[name][: mine.stop - mine.start] = inputs[name][mine]
        for kind, impl in itertools.product(KINDS, ("reference", "triton")):
            expected = exact(inputs, kind)
            actual = run(shard, kind=kind, group=group, vocab_size=vocab, impl=impl)
            torch.distributed.all_reduce(actual["dstudent_hidden"])
            padded = torch.zeros_like(actual["dstudent_weight"])
            padded[: mine.stop - mine.start] = expected["dstudent_weight"][mine]
            expected["dstudent_weight"] = padded
            torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-6)


@pytest.mark.dist
@pytest.mark.skipif(DEVICE == "cuda", reason="the ranks' Triton kernels run in the interpreter")
@pytest.mark.parametrize("size", [2])
def test_a_vocabulary_over_ranks(size: int):
    run_distributed(check_shards, size, size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"impl": "fused"}, "impl must be one of"),
        ({"kind": "symmetric"}, "kind must be one of .* got 'symmetric'"),
        ({"kind": "jsd", "jsd_beta": 1.0}, "jsd_beta must be between 0 and 1, got 1.0"),
        ({"chunk_tokens": 0}, "chunk_tokens must be 1 or more, got 0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"teacher_weight": None}, "go together"),
        ({"teacher_hidden": None, "teacher_weight": None}, "there is no teacher"),
        ({"teacher_weight": torch.zeros(VOCAB + 1, TEACHER_HIDDEN)}, "share one vocabulary"),
        ({"teacher_weight": torch.zeros(VOCAB, HIDDEN)}, "with one h"),
        ({"student_weight": torch.zeros(VOCAB, HIDDEN + 1)}, "with one h"),
        ({"teacher_hidden": torch.zeros(ROWS - 1, TEACHER_HIDDEN)}, f"{ROWS - 1} rows"),
        ({"labels": torch.zeros(ROWS - 1, dtype=torch.long)}, "as many labels"),
        ({"loss_mask": torch.ones(ROWS, 1)}, "as many labels and mask values"),
        ({"labels": torch.full((ROWS,), VOCAB)}, "label 100 counts .* 0 to 99 are allowed"),
        ({"vocab_size": 9}, "label .* counts .* 0 to 8 are allowed"),
        ({"vocab_size": VOCAB + 1}, "vocab_size 101 does not end on the last of 1 ranks"),
        (
            {"impl": "triton", "student_weight": torch.zeros(VOCAB, HIDDEN).double()},
            "takes bfloat16, float16 or float32, got student_weight of torch.float64",
        ),
    ],
)
def test_bad_input_is_named(changes: dict, message: str):
    inputs = make_inputs(torch.float32)
    changes = {n: x.to(DEVICE) if torch.is_tensor(x) else x for n, x in changes.items()}
    with pytest.raises(ValueError, match=message):
        linear_kl(**(inputs | WEIGHTS | {"impl": "reference"} | changes))


def test_the_interpreter_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = {name: x.cpu() for name, x in make_inputs(torch.float32).items()}
    with pytest.raises(ValueError, match="CUDA tensors alone, got cpu"):
        linear_kl(**inputs, **WEIGHTS, impl="triton")
