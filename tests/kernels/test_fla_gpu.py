"""fla's kernels against the float64 recurrence, by the error of the same formula in bf16.

A kernel passes if it is at most twice as far from float64 as our reference is when its matrix
products run in bf16, or by what rounding one operand and one result costs: what the number format
does, and no more.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hydra_kernels.gated_delta_rule import compilation, documents, fla_kernels, gated_delta_rule
from hydra_kernels.gated_delta_rule.reference import recurrent_gated_delta_rule

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
        if not value.any():  # what the decay before a row's only token does, without a state
            assert not actual[name].any(), f"{name} is 0, got {actual[name]}"
            continue
        error, of_bf16 = ((x[name] - value).norm() / value.norm() for x in (actual, bf16))
        allowed = max(2 * of_bf16.item(), 2 * 2**-8)
        assert error <= allowed, f"{name}: error {error:.2e}, bf16 reference {of_bf16:.2e}"


def with_grad(inputs: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict:
    return {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in inputs.items()}


def documents_of(length: int) -> torch.Tensor:
    """Where a row's documents begin: one of a single token, others across chunks."""
    return torch.tensor([0, 1, length // 3, length], device="cuda", dtype=torch.int32).unique()


COUNTS = range(1, 17)
# How a layer calls: whole rows, documents of a packed one, pieces of a stream with their states.
MODES = ("whole", "packed", "context parallel")
OTHER_DIMS = [(head_dim, heads) for head_dim in (32, 96, 128, 256) for heads in (1, 9, 13)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("heads", COUNTS)
def test_flash_qla_at_every_number_of_heads(heads: int, mode: str, monkeypatch):
    pytest.importorskip("flash_qla")
    monkeypatch.setenv("FLA_FLASH_QLA", "1")
    q = torch.zeros(1, 1, 1, 128, device="cuda", dtype=torch.bfloat16)
    assert fla_kernels.why_not_flash_qla(q, q, q, q[..., 0], q[..., 0]) is None
    check_gated_delta_rule(130, heads, 128, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [1, 63, 1024, 4100])
def test_flash_qla_at_other_lengths(length: int, mode: str, monkeypatch):
    """Beyond 256 tokens FlashQLA cuts rows into pieces, more of them the fewer heads there are."""
    pytest.importorskip("flash_qla")
    monkeypatch.setenv("FLA_FLASH_QLA", "1")
    check_gated_delta_rule(length, 5, 128, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("heads", COUNTS)
def test_fla_at_every_number_of_heads(heads: int, mode: str, monkeypatch):
    monkeypatch.setenv("FLA_FLASH_QLA", "0")
    check_gated_delta_rule(130, heads, 64, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("head_dim", "heads"), OTHER_DIMS)
def test_fla_at_other_head_dimensions(head_dim: int, heads: int, mode: str, monkeypatch):
    monkeypatch.setenv("FLA_FLASH_QLA", "0")
    check_gated_delta_rule(130, heads, head_dim, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [1, 63, 512])
def test_fla_at_other_lengths(length: int, mode: str, monkeypatch):
    monkeypatch.setenv("FLA_FLASH_QLA", "0")
    check_gated_delta_rule(length, 3, 64, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "length, heads, head_dim",
    [(130, 1, 128), (130, 13, 128), (1, 3, 64), (4100, 5, 128), (130, 3, 32), (130, 3, 256)],
)
def test_decay_per_channel(length: int, heads: int, head_dim: int, mode: str):
    check_gated_delta_rule(length, heads, head_dim, mode, of_channels=True)


def test_groups_of_heads_are_one_after_the_other(monkeypatch):
    """What a call too large for 32-bit indices is cut into; here by a lower bound."""
    monkeypatch.setattr(documents, "_MOST_ELEMENTS", 3 * 5 * 128**2)
    calls, run = [], fla_kernels.run
    monkeypatch.setattr(fla_kernels, "run", lambda *args: calls.append(args) or run(*args))
    check_gated_delta_rule(130, 7, 128, "context parallel")
    assert len(calls) == 3  # of 3, 3 and 1 heads, in whose rows documents make 1, 1 and 2 chunks


@pytest.mark.parametrize("with_state", [False, True])
def test_nothing_is_compiled_for_another_plan(with_state: bool, monkeypatch):
    """In a process of its own, which has no kernels but those that are compiled beforehand."""
    pytest.importorskip("flash_qla")
    monkeypatch.setenv("FLA_FLASH_QLA", "1")
    torch.multiprocessing.spawn(_run_on_what_is_compiled, args=(with_state,), nprocs=1)


def _run_on_what_is_compiled(_rank: int, with_state: bool) -> None:
    from tilelang.jit import JITImpl

    mode = compilation.Mode(128, 128, torch.bfloat16, with_state)
    compilation.compile_all(mode, torch.device("cuda", 0), uses_flash_qla=True)
    compilation.compile_once = lambda mode, device: None

    def fails(impl, *args, **kwargs):
        raise AssertionError(f"{impl.func} is compiled for {args} {kwargs}")

    JITImpl.compile = fails  # called for what this process has not, be it in the cache
    for heads in (1, 5, 13, 16, 40):
        for length in (64, 100, 1000, 20000):
            for of_mode in MODES[2:] if with_state else MODES[:2]:
                inputs, cu_seqlens = make_inputs(length, heads, 128, of_mode)
                for own in (with_grad(inputs), inputs):
                    outputs = gated_delta_rule(
                        **own, output_final_state=with_state, cu_seqlens=cu_seqlens, impl="fla"
                    )
                    if own is not inputs:
                        sum(x.float().sum() for x in outputs if x is not None).backward()


def test_a_first_step_loads_nothing():
    """In a process of its own: what is loaded beforehand is all that such heads call."""
    pytest.importorskip("flash_qla")
    torch.multiprocessing.spawn(_run_on_what_is_loaded, nprocs=1)


def _run_on_what_is_loaded(_rank: int) -> None:
    from tilelang.jit import JITImpl

    rows = [(heads, length) for heads in (1, 9, 16) for length in (64, 1000, 2**15)]
    for heads, length in rows:
        mode = compilation.Mode(128, 128, torch.bfloat16, False)
        compilation.load(mode, heads, length, torch.device("cuda", 0))

    def fails(impl, *args, **kwargs):
        raise AssertionError(f"{impl.func} is loaded for {args} {kwargs}")

    JITImpl.compile = fails
    for heads, length in rows:
        inputs, _ = make_inputs(length, heads, 128, "packed")
        own = with_grad(inputs)
        gated_delta_rule(**own, impl="fla").output.float().sum().backward()


def test_more_chunks_than_a_grid_holds(monkeypatch):
    """Documents of one token each: more chunks than fla can launch its backward kernel for."""
    monkeypatch.setenv("FLA_FLASH_QLA", "0")
    inputs, _ = make_inputs(2**15, 3, 32, "packed")
    cu_seqlens = torch.arange(2**15 + 1, device="cuda", dtype=torch.int32)
    own = with_grad(inputs)
    output = gated_delta_rule(**own, cu_seqlens=cu_seqlens, impl="fla").output
    output.float().sum().backward()
    # A document's first token reads what it has written itself.
    q, k, v, beta = (inputs[name].double() for name in ("q", "k", "v", "beta"))
    expected = (q * k).sum(-1, keepdim=True) * beta[..., None] * v * 32**-0.5
    assert (output.double() - expected).norm() <= 0.02 * expected.norm()
    assert (own["beta"].grad.double() - expected.sum(-1) / beta).norm() <= (
        0.02 * (expected.sum(-1) / beta).norm()
    )


def test_kernels_read_heads_where_they_lie():
    """No copy: queries, keys and values that lie head by head save the memory of their copies."""
    inputs, _ = make_inputs(4096, 16, 128, "whole")
    by_head = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in inputs.items()}
    gated_delta_rule(**by_head, impl="fla")
    peaks = []
    for own in (by_head, {n: x.contiguous() for n, x in by_head.items()}):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gated_delta_rule(**own, impl="fla")
        peaks.append(torch.cuda.max_memory_allocated() - before)
    copies = sum(inputs[name].numel() * inputs[name].element_size() for name in "qkv")
    assert peaks[0] <= peaks[1] - copies, "nothing was saved by lying head by head"


def make_inputs(
    length: int, heads: int, head_dim: int, mode: str, of_channels: bool = False
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """bf16 vectors of two rows, or one packed, float32 gates, and a state if the mode has one."""
    batch = 2 if mode == "whole" else 1
    rng = torch.Generator(device="cuda").manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, device="cuda")

    gates, vectors = (batch, length, heads), (batch, length, heads, head_dim)
    inputs = {
        "q": F.normalize(randn(*vectors), dim=-1).bfloat16(),
        "k": F.normalize(randn(*vectors), dim=-1).bfloat16(),
        "v": randn(*vectors).bfloat16(),
        "g": F.logsigmoid(randn(*(vectors if of_channels else gates)) + 2),
        "beta": randn(*gates).sigmoid(),
    }
    if mode == "context parallel":
        inputs["initial_state"] = randn(batch, heads, head_dim, head_dim) * 0.1
    return inputs, None if mode == "whole" else documents_of(length)


def check_gated_delta_rule(
    length: int, heads: int, head_dim: int, mode: str, of_channels: bool = False
) -> None:
    inputs, cu_seqlens = make_inputs(length, heads, head_dim, mode, of_channels)
    with_state = "initial_state" in inputs

    def outputs_and_gradients(outputs, own) -> dict[str, torch.Tensor]:
        return gradients(outputs if with_state else outputs[:1], own)

    exact_inputs = with_grad(inputs, torch.float64)
    q, k, v, g, beta, *state = exact_inputs.values()
    exact = outputs_and_gradients(
        recurrent_gated_delta_rule(
            q, k, v, g, beta, head_dim**-0.5, state[0] if state else None, cu_seqlens
        ),
        exact_inputs,
    )
    results = []
    for impl in ("fla", "reference"):
        own = with_grad(inputs)
        with torch.autocast("cuda", torch.bfloat16, enabled=impl == "reference"):
            outputs = gated_delta_rule(
                **own, output_final_state=with_state, cu_seqlens=cu_seqlens, impl=impl
            )
        assert outputs.output.dtype == torch.bfloat16
        if impl == "fla" and with_state:  # autocast makes the reference's state bf16 too
            assert outputs.final_state.dtype == torch.float32
        results.append(outputs_and_gradients(outputs, own))
    assert_at_most_twice_the_error(*results, exact)
