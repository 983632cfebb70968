"""The chunked gated delta rule against the sequential recurrence, others' code and known bounds."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from hydra_kernels.gated_delta_rule import gated_delta_rule
from hydra_kernels.gated_delta_rule.reference import recurrent_gated_delta_rule

NAMES = ("q", "k", "v", "g", "beta", "initial_state")
D_K, D_V = 8, 6
SCALE = D_K**-0.5


def make_inputs(
    length: int,
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    heads: int = 3,
    seed: int = 0,
    of_channels: bool = False,
) -> dict[str, torch.Tensor]:
    """Random q, k of unit length, v, mild decays, betas in (0, 1) and a start state."""
    decay = (D_K,) if of_channels else ()
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    return {
        "q": F.normalize(randn(batch, length, heads, D_K), dim=-1).to(dtype),
        "k": F.normalize(randn(batch, length, heads, D_K), dim=-1).to(dtype),
        "v": randn(batch, length, heads, D_V).to(dtype),
        "g": F.logsigmoid(randn(batch, length, heads, *decay) + 2).to(dtype),
        "beta": randn(batch, length, heads).sigmoid().to(dtype),
        "initial_state": randn(batch, heads, D_K, D_V).to(dtype),
    }


def recurrence(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return recurrent_gated_delta_rule(
        *(inputs.get(n) for n in NAMES[:5]), SCALE, inputs.get(NAMES[5])
    )


def chunked(inputs: dict[str, torch.Tensor], chunk_size: int = 64) -> tuple[torch.Tensor, ...]:
    return gated_delta_rule(
        **inputs, output_final_state=True, impl="reference", chunk_size=chunk_size
    )


def values_and_gradients(forward, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Output, final state, and the gradients of a random projection of both."""
    inputs = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    output, state = forward(inputs)
    rng = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x)).sum()
        for x in (output, state)
    )
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    named = {f"d{name}": grad for name, grad in zip(inputs, gradients, strict=True)}
    return {"output": output.detach(), "final_state": state.detach()} | named


def assert_all_close(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name].double() - value.double()).norm() / value.double().norm()
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


@pytest.mark.parametrize("of_channels", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 64, 256])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_chunked_equals_recurrence(length: int, chunk_size: int, of_channels: bool):
    inputs = make_inputs(length, of_channels=of_channels)
    actual = values_and_gradients(lambda x: chunked(x, chunk_size), inputs)
    assert_all_close(actual, values_and_gradients(recurrence, inputs), 1e-12)


def test_decay_per_channel_equals_products_of_matrices():
    """Kimi Delta Attention's recurrence, Eq 1 of arXiv 2510.26692, matrix by matrix."""
    inputs = make_inputs(20, of_channels=True)
    state = inputs["initial_state"].clone()
    expected = []
    for t in range(20):
        q, k, v, g, beta = (inputs[name][:, t] for name in NAMES[:5])
        erase = torch.eye(D_K) - beta[..., None, None] * torch.einsum("bhi,bhj->bhij", k, k)
        write = beta[..., None, None] * torch.einsum("bhi,bhj->bhij", k, v)
        state = erase @ torch.diag_embed(g.exp()) @ state + write
        expected.append(SCALE * (state.mT @ q[..., None]).squeeze(-1))
    output, last = chunked(inputs)
    torch.testing.assert_close(output, torch.stack(expected, 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, state, rtol=1e-12, atol=1e-12)


def test_channels_that_decay_alike_are_one_head_that_decays():
    inputs = make_inputs(130)
    alike = inputs | {"g": inputs["g"][..., None].expand(-1, -1, -1, D_K)}
    for actual, expected in zip(chunked(alike), chunked(inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_without_start_state_it_starts_from_zeros():
    inputs = make_inputs(65)
    zeros = inputs | {"initial_state": torch.zeros_like(inputs["initial_state"])}
    del inputs["initial_state"]
    for forward in (recurrence, chunked):
        for absent, zero in zip(forward(inputs), forward(zeros), strict=True):
            assert torch.equal(absent, zero)


@pytest.mark.parametrize("split", [1, 64, 100])
def test_final_state_continues_the_sequence(split: int):
    inputs = make_inputs(130)
    whole, whole_state = chunked(inputs)
    first = {n: x if n == "initial_state" else x[:, :split] for n, x in inputs.items()}
    head, state = chunked(first)
    rest = {n: state if n == "initial_state" else x[:, split:] for n, x in inputs.items()}
    tail, state = chunked(rest)
    torch.testing.assert_close(torch.cat((head, tail), 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, whole_state, rtol=1e-12, atol=1e-12)


PACKED = {
    "one that fills everything": [130],
    "of length 1 at both ends": [1, 128, 1],
    "many tiny ones": [1] * 40 + [2, 3] * 18,
    "at the borders of chunks": [64, 64, 2],
    "several in a chunk": [10, 20, 3, 97],
}


@pytest.mark.parametrize("of_channels", [False, True])
@pytest.mark.parametrize("lengths", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("chunk_size", [7, 64])
def test_packed_documents_equal_each_alone(lengths: list[int], chunk_size: int, of_channels: bool):
    inputs = make_inputs(130, batch=1, of_channels=of_channels)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)

    def packed(x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return chunked(x | {"cu_seqlens": cu_seqlens}, chunk_size)

    def alone(x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        outputs, state = [], x["initial_state"]
        documents = zip(*(x[name].split(lengths, 1) for name in NAMES[:5]), strict=True)
        for parts in documents:
            output, last = recurrent_gated_delta_rule(*parts, SCALE, state)
            state = torch.zeros_like(state)  # the next document's
            outputs.append(output)
        return torch.cat(outputs, 1), last

    assert_all_close(
        values_and_gradients(packed, inputs), values_and_gradients(alone, inputs), 1e-12
    )
    with_starts = recurrent_gated_delta_rule(
        *(inputs[n] for n in NAMES[:5]), SCALE, inputs["initial_state"], cu_seqlens
    )
    for actual, expected in zip(with_starts, alone(inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"]
)
def test_agrees_with_transformers(name: str):
    qwen3_next = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    inputs = make_inputs(130, torch.float32)
    q, k, v, g, beta, state = inputs.values()
    # Newer releases wrap the PyTorch function and call fla's kernels where there is a GPU.
    theirs = inspect.unwrap(getattr(qwen3_next, name))(
        q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True
    )
    for ours, other in zip(chunked(inputs), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("token", [0, 40, 129])
def test_causal(token: int):
    inputs = make_inputs(130)
    other = make_inputs(130, seed=5)
    changed = {
        n: x if n == "initial_state" else torch.cat((x[:, :token], other[n][:, token:]), 1)
        for n, x in inputs.items()
    }
    before, after = chunked(inputs)[0], chunked(changed)[0]
    torch.testing.assert_close(after[:, :token], before[:, :token], rtol=0, atol=1e-14)
    assert not torch.allclose(after[:, token], before[:, token])


def test_what_is_written_is_read_back():
    inputs = make_inputs(130)
    inputs |= {"g": torch.zeros_like(inputs["g"]), "beta": torch.ones_like(inputs["beta"])}
    output, _ = chunked(inputs | {"q": inputs["k"]})
    torch.testing.assert_close(output, SCALE * inputs["v"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("of_channels", [False, True])
def test_strong_decay_stays_finite_and_exact(of_channels: bool):
    inputs = make_inputs(130, torch.float32, of_channels=of_channels)
    is_strong = inputs["beta"] > 0.5
    is_strong = is_strong[..., None] if of_channels else is_strong
    inputs["g"] = torch.where(is_strong, -50.0, inputs["g"])
    actual = values_and_gradients(chunked, inputs)
    assert all(x.isfinite().all() for x in actual.values())
    expected = values_and_gradients(recurrence, {n: x.double() for n, x in inputs.items()})
    assert_all_close(actual, expected, 1e-5)


def test_small_decays_survive_a_large_total_decay():
    """Differences of float32 sums near -3000 would be wrong by 1e-4: 5e-5 of each decay here."""
    inputs = make_inputs(128, torch.float32)
    inputs["g"][:, :60] = -50.0
    inputs["g"][:, 60:] = -0.01
    actual = values_and_gradients(lambda x: chunked(x, 128), inputs)
    expected = values_and_gradients(recurrence, {n: x.double() for n, x in inputs.items()})
    assert_all_close(actual, expected, 3e-6)


@pytest.mark.parametrize("length", [1, 10, 64, 130])
def test_state_is_bounded_by_its_decay(length: int):
    inputs = {n: x if n == "initial_state" else x[:, :length] for n, x in make_inputs(130).items()}
    start = inputs["initial_state"].norm(dim=(-2, -1))
    silent = chunked(inputs | {"v": torch.zeros_like(inputs["v"])})[1].norm(dim=(-2, -1))
    assert (silent <= inputs["g"].sum(1).exp() * start * (1 + 1e-12)).all()

    slowest, loudest = inputs["g"].exp().amax(1), inputs["v"].norm(dim=-1).amax(1)
    spoken = chunked(inputs)[1].norm(dim=(-2, -1))
    assert (spoken <= start + loudest / (1 - slowest)).all()


def test_bf16_input_gives_bf16_output_and_float32_state():
    inputs = make_inputs(70, torch.bfloat16)
    inputs["g"], inputs["beta"] = inputs["g"].float(), inputs["beta"].float()
    for output, state in (chunked(inputs), recurrence(inputs)):
        assert (output.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact, exact_state = recurrence({n: x.double() for n, x in inputs.items()})
    output, state = chunked(inputs)
    torch.testing.assert_close(state.double(), exact_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.double(), exact, rtol=2**-8, atol=1e-5)


def test_final_state_only_when_asked_for():
    assert gated_delta_rule(**make_inputs(5), impl="reference").final_state is None


def test_fla_refuses_cpu_tensors():
    with pytest.raises(ValueError, match=r"CUDA tensors alone, got cpu"):
        gated_delta_rule(**make_inputs(5), impl="fla")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"impl": "fused"}, "impl must be one of"),
        ({"chunk_size": 0}, "chunk_size must be 1 or more"),
        ({"k": torch.zeros(2, 5, 3, D_K + 1)}, "k must be"),
        ({"v": torch.zeros(2, 6, 3, D_V)}, "v must be"),
        ({"v": torch.zeros(2, 5, 4, D_V)}, "v must be"),
        ({"g": torch.zeros(2, 3, 5)}, "g must be"),
        ({"beta": torch.zeros(2, 5, 4)}, "beta must be"),
        ({"initial_state": torch.zeros(2, 3, D_V, D_K)}, "initial_state must be"),
        ({"q": torch.zeros(2, 0, 3, D_K)}, "no tokens"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "go with one row, got \\(2,\\) and 2 rows"),
        ({"q": torch.zeros(2, 5, D_K)}, "must be \\[b, t, heads, d\\]"),
    ],
)
def test_bad_input_is_named(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**(make_inputs(5) | {"impl": "reference"} | changes))


@pytest.mark.parametrize("of_channels", [False, True])
def test_runs_under_autocast(of_channels: bool):
    """Whose products are bfloat16, which no triangular system is solved in on a GPU."""
    inputs = make_inputs(70, torch.float32, of_channels=of_channels)
    expected = values_and_gradients(chunked, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = values_and_gradients(chunked, inputs)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 0.05 * value.norm(), name
