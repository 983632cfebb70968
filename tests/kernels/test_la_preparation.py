"""LA preparation: the reference against plain formulas, the kernels by the reference's own error.

A kernel passes if it is at most twice as far from float64 as our reference is with the same
tensors in the same number format, plus a few units in float32's last place.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hydra_kernels.la_preparation import la_preparation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Float32's last bits, of which approximate exponentials and roots on a GPU cost a few.
ROUNDING = 2e-6
NAMES = ("q", "k", "v", "g", "beta")
# Triton's interpreter cuts float32 to bfloat16 where a GPU rounds: twice the error.
TIMES = 2 if torch.cuda.is_available() else 4
EVERYTHING = ("conv", "state", "norm", "rope", "decay", "beta")

# 1 / |0| of rows that are masked or zero is infinite before it is clamped.
division = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
pytestmark = [division, pytest.mark.usefixtures("short_strips")]
gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]


def make_inputs(
    length: int,
    *,
    parts: tuple[str, ...] = EVERYTHING,
    batch: int = 2,
    heads: int = 3,
    dim: int = 8,
    taps: int = 4,
    angle_rows: int = 1,
) -> dict[str, Any]:
    """Random float64 tensors of the parts asked for; x as a slice of wider rows, tokens first."""
    rng = torch.Generator().manual_seed(length)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    channels = 3 * heads * dim
    rows = randn(length, batch, channels + 64).transpose(0, 1)
    inputs: dict[str, Any] = {"x": rows[..., 32 : 32 + channels]}
    if "conv" in parts:
        inputs["conv_weight"] = randn(channels, taps)
        if "state" in parts:
            inputs["initial_state"] = randn(batch, taps - 1, channels)
    if "norm" in parts:
        inputs["q_norm_weight"], inputs["k_norm_weight"] = randn(dim) + 1, randn(dim) + 1
    if "decay" in parts:
        inputs["a"] = rows[..., :heads]
        # Towards small rates, where log(1 + y) by itself would lose most of y.
        inputs["a_log"], inputs["dt_bias"] = randn(heads), randn(heads) - 4
    if "beta" in parts:
        inputs["b"] = rows[..., heads : 2 * heads]
    if "rope" in parts:
        angles = 100 * randn(angle_rows, length, dim // 2)
        inputs["cos"], inputs["sin"] = angles.cos(), angles.sin()
    return inputs


def values_and_gradients(
    function, inputs: dict[str, Any], dtype: torch.dtype, heads: int, **options: Any
) -> dict[str, torch.Tensor]:
    """Outputs, and the gradients of a random projection of them, by name and in float64."""
    given = {name: _as(x, _dtype_of(name, dtype)) for name, x in inputs.items()}
    learned = {n: x.requires_grad_() for n, x in given.items() if n not in ("cos", "sin")}
    outputs = function(**given, num_heads=heads, **options)
    named = {
        n: x for n, x in zip(["q", "k", "v", "g", "beta"], outputs, strict=True) if x is not None
    }
    rng = torch.Generator().manual_seed(1)
    loss = sum(
        (x.double() * torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x.device)).sum()
        for x in named.values()
    )
    gradients = torch.autograd.grad(loss, list(learned.values()))
    named |= {f"d{name}": x for name, x in zip(learned, gradients, strict=True)}
    return {name: x.detach().double().cpu() for name, x in named.items()}


def _as(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy on the device under test that keeps the strides."""
    copy = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=DEVICE)
    return copy.copy_(x).detach()


def rounded(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What `dtype` can hold of them, in float64."""
    return {name: _as(x, _dtype_of(name, dtype)).double() for name, x in inputs.items()}


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """Angles keep float32 where all else has less."""
    return torch.promote_types(dtype, torch.float32) if name in ("cos", "sin") else dtype


def by_definition(
    x, *, num_heads, a=None, a_log=None, dt_bias=None, b=None, conv_weight=None, initial_state=None,
    q_norm_weight=None, k_norm_weight=None, norm_eps=1e-6, cos=None, sin=None, cu_seqlens=None,
):  # fmt: skip
    """The same from documents, tokens and heads one by one: F.conv1d, complex RoPE, logaddexp."""
    rows, length, channels = x.shape
    if conv_weight is not None:
        ends = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
        taps = conv_weight.shape[1]
        mixed = []
        for start, end in zip(ends, ends[1:], strict=False):
            before = x.new_zeros(rows, taps - 1, channels)
            if start == 0 and initial_state is not None:
                before = initial_state
            seen = torch.cat((before, x[:, start:end]), 1).mT
            y = torch.nn.functional.conv1d(seen, conv_weight[:, None], groups=channels).mT
            mixed.append(y / (1 + torch.exp(-y)))
        x = torch.cat(mixed, 1)
    dim = channels // 3 // num_heads
    heads = x.split(dim, dim=-1)
    q, k, v = (
        torch.stack(heads[i * num_heads : (i + 1) * num_heads], dim=2).clone() for i in range(3)
    )
    if q_norm_weight is not None:
        q, k = (
            t * (t.square().mean(-1, keepdim=True) + norm_eps) ** -0.5 * weight
            for t, weight in ((q, q_norm_weight), (k, k_norm_weight))
        )
    if cos is not None:
        turn = torch.complex(cos, sin).repeat_interleave(rows // cos.shape[0], 0)[:, :, None]
        half = dim // 2
        turned = (torch.complex(t[..., :half], t[..., half:]) * turn for t in (q, k))
        q, k = (torch.cat((t.real, t.imag), -1) for t in turned)
    q, k = (t / t.norm(dim=-1, keepdim=True).clamp_min(1e-12) for t in (q, k))
    g = None
    if a is not None:
        g = -a_log.exp() * torch.logaddexp(a + dt_bias, torch.zeros_like(a))
    beta = None if b is None else 1 / (1 + torch.exp(-b))
    return q, k, v, g, beta


def assert_kernel_is_right(
    inputs: dict[str, Any], dtype: torch.dtype, heads: int, **options: Any
) -> None:
    inputs = rounded(inputs, dtype)
    reference, kernel = (
        values_and_gradients(la_preparation, inputs, dtype, heads, impl=impl, **options)
        for impl in ("reference", "triton")
    )
    exact = values_and_gradients(
        la_preparation, inputs, torch.float64, heads, impl="reference", **options
    )
    assert kernel.keys() == exact.keys()
    for name, value in exact.items():
        scale = value.norm().clamp_min(1e-30)
        error, allowed = ((x[name] - value).norm() / scale for x in (kernel, reference))
        limit = (TIMES if dtype == torch.bfloat16 else 2) * allowed + ROUNDING
        assert error <= limit, f"{name}: {error:.2e}, reference {allowed:.2e}"


LENGTHS = {"whole": None, "packed": [1, 2, 3, 1, 10], "an end of one": [16, 1]}
OPTIONS = {
    "everything": EVERYTHING,
    "no state": ("conv", "norm", "rope", "decay", "beta"),
    "no convolution": ("norm", "rope", "decay", "beta"),
    "no norm": ("conv", "state", "rope", "decay", "beta"),
    "no rope": ("conv", "state", "norm", "decay", "beta"),
    "no decay": ("conv", "norm", "rope", "beta"),
    "no beta": ("conv", "norm", "rope", "decay"),
    "L2 norm alone": (),
}


def case(lengths: list[int] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `make_inputs` and options of a call, for 17 tokens."""
    if lengths is None:
        return {"batch": 2}, {}
    boundaries = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()  # as Megatron's
    return {"batch": 1}, {"cu_seqlens": boundaries}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("parts", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("taps", [1, 3, 4])
def test_reference_equals_its_definition(taps: int, parts: tuple[str, ...], lengths: Any):
    sizes, options = case(lengths)
    inputs = make_inputs(17, taps=taps, parts=parts, **sizes)
    found = values_and_gradients(
        la_preparation, inputs, torch.float64, 3, impl="reference", **options
    )
    expected = values_and_gradients(by_definition, inputs, torch.float64, 3, **options)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_a_row_of_one_token_sees_all_of_its_state():
    inputs, boundaries = make_inputs(1, batch=1), torch.tensor([0, 1], device=DEVICE)
    results = [
        values_and_gradients(la_preparation, inputs, torch.float64, 3, impl="reference", **options)
        for options in ({}, {"cu_seqlens": boundaries})
    ]
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("parts", OPTIONS.values(), ids=OPTIONS)
def test_kernel_with_parts_left_out(parts: tuple[str, ...]):
    assert_kernel_is_right(make_inputs(17, parts=parts, heads=1), torch.float32, 1)


@pytest.mark.parametrize("lengths", [[1, 2, 3, 1, 10], [16, 1]], ids=str)
@pytest.mark.parametrize("parts", [EVERYTHING, OPTIONS["no state"]], ids=["state", "no state"])
def test_kernel_packed(parts: tuple[str, ...], lengths: list[int]):
    sizes, options = case(lengths)
    assert_kernel_is_right(
        make_inputs(17, parts=parts, heads=1, **sizes), torch.float32, 1, **options
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernel_in_low_precision(dtype: torch.dtype):
    assert_kernel_is_right(make_inputs(9, batch=1, heads=2, dim=16), dtype, 2)


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_kernel_with_fewer_taps(taps: int):
    assert_kernel_is_right(make_inputs(7, taps=taps, batch=1, heads=1), torch.float32, 1)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_kernel_on_rows_shorter_than_its_window(length: int):
    assert_kernel_is_right(make_inputs(length, heads=1, batch=1), torch.float32, 1)


def test_kernel_over_several_blocks_strips_and_tiles(monkeypatch: pytest.MonkeyPatch):
    """Strips of 16 tokens, two to a program: 70 tokens begin inside each and end inside one."""
    monkeypatch.undo()  # short strips
    inputs = make_inputs(70, heads=3, dim=128, batch=1)
    boundaries = torch.tensor([0, 15, 33, 34, 62, 70], device=DEVICE)
    assert_kernel_is_right(inputs, torch.float32, 3, cu_seqlens=boundaries)


def test_kernel_with_a_head_dimension_between_powers_of_two():
    assert_kernel_is_right(make_inputs(5, heads=2, dim=12, batch=1), torch.float32, 2)


def test_kernel_with_angles_of_several_pieces():
    assert_kernel_is_right(make_inputs(5, heads=1, batch=4, angle_rows=2), torch.float32, 1)


def test_kernel_reads_any_strides():
    inputs = make_inputs(5, heads=2, batch=2)
    inputs["x"] = inputs["x"].mT.contiguous().mT
    inputs["a"] = inputs["a"].mT.contiguous().mT
    assert_kernel_is_right(inputs, torch.float32, 2)
    inputs["x"] = inputs["x"].contiguous()  # batch first
    assert_kernel_is_right(inputs, torch.float32, 2)


def test_kernel_on_zeros():
    """Tokens of zeros have no direction; nothing may become NaN."""
    inputs = make_inputs(9, heads=1, parts=("conv", "norm", "rope"))
    inputs["x"] = inputs["x"] * (torch.arange(9) % 6 == 5)[:, None]
    found = values_and_gradients(la_preparation, inputs, torch.float32, 1, impl="triton")
    assert all(x.isfinite().all() for x in found.values())
    for name in ("q", "k", "v"):
        assert (found[name][:, :5] == 0).all()


def test_kernel_writes_all_that_it_allocates(monkeypatch: pytest.MonkeyPatch):
    allocate = torch.empty

    def poisoned(*shape: Any, **options: Any) -> torch.Tensor:
        tensor = allocate(*shape, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-1)

    monkeypatch.setattr(torch, "empty", poisoned)
    inputs = make_inputs(7, heads=1, batch=1)
    boundaries = torch.tensor([0, 3, 7], device=DEVICE)
    found = values_and_gradients(
        la_preparation, inputs, torch.float32, 1, impl="triton", cu_seqlens=boundaries
    )
    assert all(x.isfinite().all() for x in found.values())


def test_gradients_lie_as_the_inputs_do_or_where_told():
    inputs = {name: _as(t, torch.float32) for name, t in make_inputs(5, heads=1).items()}
    learned = [inputs[name].requires_grad_() for name in ("x", "a", "b")]
    wide = [torch.full((2, 5, t.shape[2] + 7), torch.nan, device=DEVICE) for t in learned]
    places = [t[..., 3:-4] for t in wide]
    results = []
    for options in ({}, {"empty_gradients": lambda: places}):
        outputs = la_preparation(**inputs, num_heads=1, impl="triton", **options)
        assert all(t.is_contiguous() for t in outputs)
        results.append(torch.autograd.grad(sum((t**3).sum() for t in outputs), learned))
    assert results[0][0].transpose(0, 1).is_contiguous()
    for expected, found, place in zip(*results, places, strict=True):
        assert torch.equal(found, expected)
        assert (found.data_ptr(), found.stride()) == (place.data_ptr(), place.stride())


def test_low_precision_is_computed_in_float32():
    inputs = rounded(make_inputs(17), torch.bfloat16)
    low = {name: x.to(torch.bfloat16) for name, x in inputs.items()}
    exact = la_preparation(**inputs, num_heads=3, impl="reference")
    for name, value in la_preparation(**low, num_heads=3, impl="reference")._asdict().items():
        assert value.dtype == (torch.float32 if name in ("g", "beta") else torch.bfloat16)
        allowed = 1e-5 if name in ("g", "beta") else 2**-8
        torch.testing.assert_close(
            value.double(), getattr(exact, name), rtol=allowed, atol=2e-2 if name in "qk" else 1e-5
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"impl": "fused"}, "impl must be one of"),
        ({"x": torch.zeros(2, 0, 72)}, "with a token at least"),
        ({"num_heads": 5}, "is not q, k and v of 5 heads"),
        ({"conv_weight": torch.zeros(71, 4)}, r"conv_weight must be \[72, k\]"),
        ({"conv_weight": None}, "initial_state is given without conv_weight"),
        ({"initial_state": torch.zeros(2, 4, 72)}, "initial_state must be"),
        ({"a_log": None}, "a, a_log and dt_bias make the decay together"),
        ({"a": torch.zeros(2, 5, 4)}, r"a must be \(2, 5, 3\)"),
        ({"b": torch.zeros(2, 4, 3)}, r"b must be \(2, 5, 3\)"),
        ({"dt_bias": torch.zeros(4)}, r"dt_bias must be \(3,\)"),
        ({"k_norm_weight": None}, "give both or neither"),
        ({"q_norm_weight": torch.zeros(4)}, r"q_norm_weight must be \(8,\)"),
        ({"sin": None}, "cos and sin go together"),
        ({"cos": torch.zeros(3, 5, 4)}, "cos must be"),
        ({"sin": torch.zeros(1, 5, 8)}, r"sin must be \(1, 5, 4\)"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "go with one row"),
        ({"impl": "triton", "x": torch.zeros(2, 5, 72).double()}, "bfloat16, float16 or float32"),
        (
            {"impl": "triton", "conv_weight": torch.zeros(72, 5), "initial_state": None},
            "takes up to 4 taps, got 5",
        ),
    ],
)
def test_bad_input_is_named(changes: dict, message: str):
    inputs = {name: x.to(DEVICE).float() for name, x in make_inputs(5).items()}
    changes = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in changes.items()}
    with pytest.raises(ValueError, match=message):
        la_preparation(**({"num_heads": 3, "impl": "reference"} | inputs | changes))


@pytest.mark.parametrize("dim", [9, 258])
def test_head_dimensions_that_the_kernel_does_not_take(dim: int):
    x = torch.zeros(1, 5, 3 * dim, device=DEVICE)
    with pytest.raises(ValueError, match=f"even head dimensions up to 256, got {dim}"):
        la_preparation(x, num_heads=1, impl="triton")


def test_triton_refuses_cpu_tensors(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="CUDA tensors alone, got cpu"):
        la_preparation(torch.zeros(1, 5, 24), num_heads=1, impl="triton")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("length", "heads", "dim"),
    [(1, 14, 128), (63, 5, 32), (1000, 3, 64), (1027, 14, 128), (515, 2, 256), (300, 4, 96)],
)
class TestOnAGpu:
    pytestmark = gpu

    def test_kernel(self, length: int, heads: int, dim: int, dtype: torch.dtype, packed: bool):
        inputs = make_inputs(length, heads=heads, dim=dim, batch=1 if packed else 2)
        options = {}
        if packed:
            ends = [0, 1, 3, 6, length // 3, length // 3 + 1, length]
            boundaries = torch.tensor([end for end in ends if end <= length], device=DEVICE)
            options["cu_seqlens"] = boundaries.unique()
        assert_kernel_is_right(inputs, dtype, heads, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offsets_past_2_to_the_31():
    """Rows of a wide projection: 2.4e9 elements, of which the last tokens are compared."""
    length, width, heads, dim = 300_000, 8_192, 4, 128
    rows = torch.zeros(length, 1, width, dtype=torch.bfloat16, device="cuda")
    channels = 3 * heads * dim
    rows[-40:] = torch.randn(40, 1, width, device="cuda").bfloat16()
    x = rows[..., :channels].transpose(0, 1).detach().requires_grad_()
    weight = torch.randn(channels, 4, device="cuda").bfloat16()
    output = la_preparation(x, num_heads=heads, conv_weight=weight, impl="triton")
    tail = x.detach()[:, -40:].clone().requires_grad_()
    expected = la_preparation(tail, num_heads=heads, conv_weight=weight, impl="reference")
    upstream = torch.randn(1, 40, heads, dim, device="cuda").bfloat16()
    (gradient,) = torch.autograd.grad((output.q[:, -40:] * upstream).sum(), x)
    (other,) = torch.autograd.grad((expected.q * upstream).sum(), tail)
    torch.testing.assert_close(output.q[:, -40:], expected.q, rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(gradient[:, -40:], other, rtol=2**-5, atol=1e-2)
