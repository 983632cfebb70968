"""The head fusion: the reference against the formula head by head in float64, then the kernel.

The Triton kernel passes if it is at most twice as far from float64 as the reference is in the same
low precision. Without a GPU it runs in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

ON_GPU = torch.cuda.is_available()

from hydra_kernels.head_fusion import head_fusion  # noqa: E402
from triton import knobs  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter cuts bfloat16 off where a GPU rounds it.
LOW_PRECISION = torch.bfloat16 if ON_GPU else torch.float16
Tensors = dict[str, torch.Tensor]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")

# What the layer's configurations come to: options, and which tensors are left out.
SETTINGS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "silu": ({}, set()),
    "sigmoid": ({"la_activation": "sigmoid2"}, set()),
    "no FA gate": ({}, {"fa_gate"}),
    "no LA gate": ({}, {"la_gate"}),
    "no gate": ({}, {"fa_gate", "la_gate"}),
    "no scale": ({}, {"head_scale"}),
    "no norm": ({"eps": None}, set()),
    "order alone": ({"eps": None}, {"fa_gate", "la_gate", "head_scale"}),
}
KINDS = [(2, 3), (0, 3), (3, 0), (1, 1)]


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make_nan(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return make_nan

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def make_leaves(
    setting: str, kinds: tuple[int, int], d: int, s: int, b: int, dtype: torch.dtype
) -> Tensors:
    """Laid out as in the layer: LA batch first, the gates within one projection's rows."""
    rng = torch.Generator().manual_seed(s + d)
    n_fa, n_la = kinds
    shapes = {
        "fa": (s, b, n_fa, d),
        "la": (b, s, n_la, d),
        "rows": (s, b, (n_fa + n_la) * d + 64),
        "head_scale": (n_fa + n_la,),
    }
    leaves = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    # Heads of very different sizes, which the norm is there to take off.
    for name in ("fa", "la"):
        leaves[name] *= 4.0 ** torch.arange(-1, leaves[name].shape[2] - 1)[:, None]
    without = SETTINGS[setting][1]
    if without >= {"fa_gate", "la_gate"}:
        del leaves["rows"]
    if "head_scale" in without:
        del leaves["head_scale"]
    return {
        name: x.to(DEVICE, torch.float32 if name == "head_scale" else dtype)
        for name, x in leaves.items()
    }


def views(leaves: Tensors, setting: str) -> tuple[torch.Tensor | None, ...]:
    """fa, la, fa_gate, la_gate, head_scale; none of the first four is contiguous but fa."""
    fa, la = leaves["fa"], leaves["la"].transpose(0, 1)
    fa_gate = la_gate = None
    if "rows" in leaves:
        sizes = [fa[0, 0].numel(), 64, la[0, 0].numel()]
        parts = leaves["rows"].split(sizes, dim=-1)
        fa_gate, la_gate = parts[0].view(fa.shape), parts[2].view(la.shape)
    without = SETTINGS[setting][1]
    return (
        fa,
        la,
        None if "fa_gate" in without else fa_gate,
        None if "la_gate" in without else la_gate,
        leaves.get("head_scale"),
    )


def make_positions(n: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(n)).to(DEVICE)


def options(setting: str) -> dict[str, Any]:
    defaults = {"eps": 1e-3, "la_activation": "silu"}
    return defaults | SETTINGS[setting][0]


def fuse(leaves: Tensors, setting: str, impl: str) -> torch.Tensor:
    tensors = views(leaves, setting)
    num_heads = tensors[0].shape[2] + tensors[1].shape[2]
    return head_fusion(*tensors, make_positions(num_heads), **options(setting), impl=impl)


def by_definition(leaves: Tensors, setting: str) -> torch.Tensor:
    """One head after the other."""
    fa, la, fa_gate, la_gate, head_scale = views(leaves, setting)
    chosen = options(setting)
    heads: dict[int, torch.Tensor] = {}
    positions = make_positions(fa.shape[2] + la.shape[2]).tolist()
    for x, gates, kind in ((fa, fa_gate, "fa"), (la, la_gate, "la")):
        for i in range(x.shape[2]):
            out = x[:, :, i]
            if chosen["eps"] is not None:
                out = out / (out.square().mean(-1, keepdim=True) + chosen["eps"]).sqrt()
            if gates is not None:
                z, is_silu = gates[:, :, i], kind == "la" and chosen["la_activation"] == "silu"
                out = out * (F.silu(z) if is_silu else 2 / (1 + torch.exp(-z)))
            position = positions.pop(0)
            if head_scale is not None:
                out = out * head_scale[position]
            heads[position] = out
    out = torch.cat([heads[i] for i in range(len(heads))], dim=-1)
    # A kind without heads stays in the graph.
    return out + 0.0 * sum(x.sum() for x in (fa, la, fa_gate, la_gate) if x is not None)


def values_and_gradients(
    forward: Callable[[Tensors], torch.Tensor], leaves: Tensors, dtype: torch.dtype | None = None
) -> Tensors:
    """The output, and the gradients of a random projection of it."""
    leaves = {name: x.to(dtype or x.dtype).requires_grad_() for name, x in leaves.items()}
    output = forward(leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    # Rounded, so that every precision starts its backward from the same numbers.
    weights = weights.bfloat16().to(DEVICE, output.dtype)
    gradients = torch.autograd.grad(output, list(leaves.values()), weights)
    return {"output": output.detach()} | {
        f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative to what is exact, where that is not zero; a NaN is infinitely far off."""
    size = exact.norm().item() or 1.0
    return ((found.double() - exact).norm() / size).nan_to_num(torch.inf).item()


def assert_kernel_is_exact(leaves: Tensors, setting: str) -> None:
    exact = values_and_gradients(lambda x: by_definition(x, setting), leaves, torch.float64)
    reference, kernel = (
        values_and_gradients(lambda x, impl=impl: fuse(x, setting, impl), leaves)
        for impl in ("reference", "triton")
    )
    for name, value in exact.items():
        assert kernel[name].dtype == reference[name].dtype
        # Float32 sums in another order differ by themselves: the scales' gradients have no other
        # error in the reference.
        allowed = 2 * error(reference[name], value) + 16 * torch.finfo(torch.float32).eps
        found = error(kernel[name], value)
        assert found <= allowed, f"{name}: error {found:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_reference_equals_the_formula(setting: str, kinds: tuple[int, int]):
    leaves = make_leaves(setting, kinds, d=8, s=5, b=2, dtype=torch.float64)
    exact = values_and_gradients(lambda x: by_definition(x, setting), leaves, torch.float64)
    found = values_and_gradients(lambda x: fuse(x, setting, "reference"), leaves, torch.float64)
    for name, value in exact.items():
        assert error(found[name], value) <= 1e-12, name


@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_kernel_in_every_setting(setting: str, kinds: tuple[int, int]):
    leaves = make_leaves(setting, kinds, d=32, s=7, b=2, dtype=LOW_PRECISION)
    assert_kernel_is_exact(leaves, setting)


@pytest.mark.parametrize("dtype", [LOW_PRECISION, torch.float32], ids=str)
@pytest.mark.parametrize(("d", "s"), [(1, 3), (8, 300), (32, 65), (64, 1), (96, 23), (256, 9)])
def test_kernel_at_every_size(d: int, s: int, dtype: torch.dtype):
    leaves = make_leaves("silu", (2, 1), d, s, 1, dtype)
    assert_kernel_is_exact(leaves, "silu")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("s", "b"), [(4099, 1), (1000, 3)])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kinds", [(2, 14), (4, 12), (0, 16), (16, 0)], ids=str)
def test_kernel_at_the_models_size(kinds: tuple[int, int], setting: str, s: int, b: int):
    leaves = make_leaves(setting, kinds, 128, s, b, torch.bfloat16)
    assert_kernel_is_exact(leaves, setting)


@pytest.mark.gpu
@needs_gpu
def test_gates_past_32_bits_of_offset():
    s, rows, d = 2**18 + 5, 8256, 128
    projected = torch.empty(s, 1, rows, device=DEVICE, dtype=torch.bfloat16)
    assert projected.numel() > 2**31
    fa_gate, la_gate = (
        part.unflatten(2, (-1, d)).normal_()
        for part in (projected[:, :, 64 : 64 + d], projected[:, :, -2 * d :])
    )
    fa = torch.randn(s, 1, 1, d, device=DEVICE, dtype=torch.bfloat16)
    la = torch.randn(1, s, 2, d, device=DEVICE, dtype=torch.bfloat16).transpose(0, 1)
    for x in (fa, la, fa_gate, la_gate):
        x.requires_grad_()
    positions = torch.tensor([1, 2, 0], device=DEVICE)
    upstream = torch.randn(s, 1, 3 * d, device=DEVICE, dtype=torch.bfloat16)
    found, expected = [], []
    for impl, results in (("triton", found), ("reference", expected)):
        out = head_fusion(fa, la, fa_gate, la_gate, None, positions, eps=1e-6, impl=impl)
        results += [out, *torch.autograd.grad(out, (fa, la, fa_gate, la_gate), upstream)]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.gpu
@needs_gpu
def test_same_bits_every_time():
    leaves = make_leaves("silu", (2, 14), 128, 4099, 2, torch.bfloat16)
    first, second = (
        values_and_gradients(lambda x: fuse(x, "silu", "triton"), leaves) for _ in range(2)
    )
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_gradients_lie_as_their_makers_want_them():
    """fa's and la's as fa and la do; a copy in front of the LA kernel's backward otherwise."""
    tensors = views(make_leaves("silu", (2, 3), 32, 5, 2, torch.bfloat16), "silu")
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = head_fusion(*tensors, make_positions(5), eps=1e-3, impl="triton")
    dfa, dla, *gates, dscale = torch.autograd.grad(out.float().square().sum(), tensors)
    assert dfa.stride() == tensors[0].stride()
    assert dla.transpose(0, 1).is_contiguous()
    assert all(gradient.is_contiguous() for gradient in gates)
    assert dscale.dtype == torch.float32


@pytest.mark.parametrize("setting", ["silu", "no FA gate", "no gate"])
def test_gradients_are_written_where_told(setting: str):
    tensors = views(make_leaves(setting, (2, 3), 32, 5, 2, LOW_PRECISION), setting)
    tensors = [None if x is None else x.detach().requires_grad_() for x in tensors]
    learned = [x for x in tensors if x is not None]
    gates = [x for x in tensors[2:4] if x is not None]
    made: list[list[torch.Tensor]] = []

    def empty_gradients() -> list[torch.Tensor]:
        made.append(
            [torch.empty_strided(z.shape, z.stride(), dtype=z.dtype, device=DEVICE) for z in gates]
        )
        return made[-1]

    results = []
    for given in ({}, {"empty_gradients": empty_gradients}):
        out = head_fusion(*tensors, make_positions(5), eps=1e-3, impl="triton", **given)
        results.append(torch.autograd.grad(out.float().square().sum(), learned))
    assert all(map(torch.equal, *results))
    assert len(made) == 1
    for found, place in zip(results[1][2:], made[0], strict=False):
        assert found.data_ptr() == place.data_ptr() and found.stride() == place.stride()


def test_saves_its_inputs_and_one_number_a_head_and_token():
    leaves = make_leaves("silu", (2, 3), 32, 5, 2, torch.bfloat16)
    tensors = [x.detach().requires_grad_() for x in views(leaves, "silu")]
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        head_fusion(*tensors, make_positions(5), eps=1e-3, impl="triton")
    owned = {x.untyped_storage().data_ptr() for x in tensors}
    fresh = [
        x
        for x in saved
        if x.untyped_storage().data_ptr() not in owned and x.dtype.is_floating_point
    ]
    assert [(x.dtype, x.numel()) for x in fresh] == [(torch.float32, 5 * 2 * 5)]


@pytest.mark.parametrize("layout", ["heads first", "batch first", "every other token"])
def test_takes_any_strides(layout: str):
    generator = torch.Generator().manual_seed(0)

    def lay(x: torch.Tensor) -> torch.Tensor:
        if layout == "every other token":
            return x.repeat_interleave(2, dim=0)[::2]
        order = (2, 1, 0, 3) if layout == "heads first" else (1, 0, 2, 3)
        return x.permute(order).contiguous().permute(order)

    shapes = [(6, 3, n, 16) for n in (2, 1, 2, 1)]
    plain = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
    results = []
    for tensors in (plain, [lay(x) for x in plain]):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = head_fusion(*leaves, None, make_positions(3), eps=1e-3, impl="triton")
        # An expanded gradient has stride 0 in d.
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


BAD = {
    "fa and la must be": {"la": torch.zeros(5, 2, 3, 16)},
    "a token, a head and a channel": {n: torch.zeros(5, 2, 0, 8) for n in ("fa", "la")},
    "la must be torch.float32": {"la": torch.zeros(5, 2, 3, 8).half()},
    "fa_gate must be": {"fa_gate": torch.zeros(5, 2, 3, 8)},
    "la_gate must be": {"la_gate": torch.zeros(5, 2, 3, 8).half()},
    r"head_scale must be \[5\]": {"head_scale": torch.zeros(4)},
    r"positions must be \[5\] int32 or int64": {"positions": torch.zeros(5)},
    "eps must be above 0": {"eps": 0.0},
    "la_activation must be one of": {"la_activation": None},
    "impl must be one of": {"impl": "fused"},
    "needs stride 1 in d": {"impl": "triton", "fa": torch.zeros(5, 2, 2, 16)[..., ::2]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str):
    arguments = dict(
        fa=torch.zeros(5, 2, 2, 8),
        la=torch.zeros(5, 2, 3, 8),
        fa_gate=None,
        la_gate=None,
        head_scale=None,
        positions=torch.arange(5),
        eps=1e-6,
        impl="reference",
    )
    arguments = {
        name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x
        for name, x in (arguments | BAD[message]).items()
    }
    with pytest.raises(ValueError, match=message):
        head_fusion(**arguments)


def test_kernel_refuses_what_it_cannot_compute():
    fa, positions = torch.zeros(5, 2, 2, 8), torch.arange(4)
    with knobs.runtime.scope():
        knobs.runtime.interpret = False
        with pytest.raises(ValueError, match="runs on CUDA tensors alone, got cpu"):
            head_fusion(fa, fa, None, None, None, positions, eps=1e-6, impl="triton")
        fa, positions = fa.to(DEVICE).double(), positions.to(DEVICE)
        knobs.runtime.interpret = not ON_GPU
        with pytest.raises(ValueError, match="bfloat16, float16 and float32, got torch.float64"):
            head_fusion(fa, fa, None, None, None, positions, eps=1e-6, impl="triton")
