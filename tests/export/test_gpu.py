"""On a GPU: fla's kernels, every attention implementation at hand, and decoding, in bfloat16.

Needs no Megatron. Float32 on the CPU is the truth; bfloat16 on a GPU may be twice as far from it as
bfloat16 on the CPU, whose recurrences run in PyTorch.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
from kit import flash_attention_stand_in

from megatron_hydra.export import modeling_hydra
from megatron_hydra.export.configuration_hydra import HydraHeadConfig
from megatron_hydra.export.modeling_hydra import HydraForCausalLM
from megatron_hydra.export.recording_hydra import cuda_graph
from megatron_hydra.export.recurrence_hydra import _fla, attention_of_a_token, gated_delta_rule
from megatron_hydra.export.stream_hydra import CACHE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KINDS = [
    ["fa", "gated_delta_net", "fa", "gated_delta_net", "gated_delta_net", "fa", "fa", "kda"],
    ["sliding_window", "kda", "kda", "fa", "gated_delta_net", "sliding_window", "kda", "kda"],
]


@pytest.fixture(scope="module")
def hybrid() -> HydraForCausalLM:
    """Float32 on the CPU, its gates and sinks away from their start."""
    torch.manual_seed(0)
    config = HydraHeadConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        head_kinds=KINDS,
        sliding_window_tokens=50,
        initializer_range=0.05,
    )
    model = HydraForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def _tokens(length: int = 300) -> torch.Tensor:
    return torch.randint(0, 512, (3, length), generator=torch.Generator().manual_seed(1))


def _mask(tokens: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(tokens)
    mask[0, :100] = 0
    mask[1, 150:170] = 0
    return mask


def _twin(hybrid: HydraForCausalLM, device: str) -> HydraForCausalLM:
    twin = HydraForCausalLM(copy.deepcopy(hybrid.config)).eval()  # which a test may change
    twin.load_state_dict(hybrid.state_dict())
    return twin.to(device, torch.bfloat16)


def _flash_attention(implementation: str, patch: pytest.MonkeyPatch) -> list[str] | None:
    """Where flash-attn is wanted and absent its kernel in PyTorch; the calls of it then."""
    if implementation != "flash_attention_2" or find_spec("flash_attn") is not None:
        return None
    return flash_attention_stand_in.install(patch)


@torch.no_grad()
def _in_pieces(model, tokens, mask, sizes):
    logits, cache, start = [], None, 0
    for size in sizes:
        end = start + size
        found = model(tokens[:, start:end], mask[:, :end], use_cache=True, **{CACHE: cache})
        logits.append(found.logits)
        cache, start = found[CACHE], end
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("sizes", [[300], [230, *[1] * 20, 50]], ids=["whole", "pieces"])
def test_no_further_from_float32_than_a_cpu(hybrid, implementation, sizes, monkeypatch):
    calls = _flash_attention(implementation, monkeypatch)
    tokens, mask = _tokens(), _mask(_tokens())
    with torch.no_grad():
        exact = hybrid(tokens, mask).logits
        on_cpu = _twin(hybrid, "cpu")(tokens, mask).logits
    model = _twin(hybrid, "cuda")
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    on_gpu = _in_pieces(model, tokens.cuda(), mask.cuda(), sizes).cpu()
    real = mask.bool()
    error, allowed = ((x.float() - exact)[real].square().mean().sqrt() for x in (on_gpu, on_cpu))
    assert exact[real].std() > 0.3
    assert error < 2 * allowed + 1e-3
    assert calls is None or calls


@pytest.mark.parametrize("of_channels", [False, True], ids=["gated_delta_net", "kda"])
@pytest.mark.parametrize("num_tokens", [2, 5, 200])
def test_flas_kernels_are_the_recurrence(of_channels, num_tokens):
    pytest.importorskip("fla")
    assert _fla(of_channels) is not None
    generator = torch.Generator().manual_seed(num_tokens)
    b, n, d = 2, 5, 64
    q, k, v = (torch.randn(b, num_tokens, n, d, generator=generator) for _ in range(3))
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    g = -torch.rand(b, num_tokens, n, d if of_channels else 1, generator=generator)
    beta = torch.rand(b, num_tokens, n, generator=generator)
    state = torch.randn(b, n, d, d, generator=generator)
    half = [x.bfloat16() for x in (q, k, v)]
    expected = gated_delta_rule(*(x.float() for x in half), g, beta, state)
    given = [x.cuda() for x in (*half, g, beta, state)]
    with torch.no_grad():
        found = gated_delta_rule(*given)
    for ours, theirs in zip(found, expected, strict=True):
        scale = theirs.square().mean().sqrt()
        assert (ours.cpu().float() - theirs).square().mean().sqrt() < 0.01 * scale
    assert found[1].dtype == torch.float32
    assert torch.equal(given[-1].cpu(), state), "the state that was handed in is not changed"


def test_a_token_over_a_cache_in_pieces():
    """Large scores too: products are rounded once."""
    generator = torch.Generator().manual_seed(0)
    for b, g, m, t in ((2, 3, 2, 640), (1, 2, 1, 65536), (3, 8, 2, 4096)):
        query = 12 * torch.randn(b, g, m, 128, generator=generator)
        keys, values = (torch.randn(b, g, t, 128, generator=generator) for _ in range(2))
        is_seen = torch.rand(b, t, generator=generator) < 0.7
        is_seen[:, 64:128] = False
        half = [x.bfloat16() for x in (query, keys, values)]
        exact = [x.double() for x in half]
        scores = (exact[0] @ exact[1].mT / 128**0.5).masked_fill(
            ~is_seen[:, None, None], -torch.inf
        )
        expected = scores.softmax(-1) @ exact[2]
        found = attention_of_a_token(*(x.cuda() for x in half), is_seen.cuda())
        assert (found.cpu().double() - expected).norm() < 0.004 * expected.norm()


@pytest.mark.parametrize(
    "kept",
    ["dynamic", "static", "static, hooks", "static, eager"]
    + ["dynamic, flash_attention_2", "static, flash_attention_2"],
)
def test_generation_on_a_gpu(hybrid, kept, monkeypatch):
    """With a static cache a step is compiled, and recorded once for each `generate`."""
    model, tokens = _twin(hybrid, "cuda"), _tokens(40).cuda()
    num_calls = num_records = 0

    def record(*args, **options):
        nonlocal num_records
        num_records += 1
        return cuda_graph(*args, **options)

    def count(*args):
        nonlocal num_calls
        num_calls += 1

    monkeypatch.setattr(modeling_hydra, "cuda_graph", record)
    kept, _, how = kept.partition(", ")
    calls = _flash_attention(how, monkeypatch)
    if how == "flash_attention_2":
        model.set_attn_implementation(how)
    if how == "hooks":
        model.model.layers[0].register_forward_hook(count)
    mask = torch.ones_like(tokens)
    mask[0, :25] = 0
    options = dict(max_new_tokens=30, do_sample=False, pad_token_id=0)
    with torch.compiler.set_stance("force_eager" if how == "eager" else "default"):
        for _ in range(2):  # whose caches lie at other places
            together = model.generate(
                tokens, attention_mask=mask, cache_implementation=kept, **options
            )
    assert calls is None or calls
    assert num_records == (2 if kept == "static" and how != "hooks" else 0)
    assert num_calls >= (60 if how == "hooks" else 0)
    assert together.shape == (3, 70)
    logits = _in_pieces(model, together, torch.cat((mask, mask.new_ones(3, 30)), 1), [70])
    # Equal but for near ties, which bfloat16 rounds either way.
    best = logits[:, 39:-1].topk(2).values
    chosen = logits[:, 39:-1].gather(2, together[:, 40:, None])[..., 0]
    assert (best[..., 0] - chosen).max() < 0.1
    assert hasattr(model, "_compiled_call") == (kept == "static")
