"""The layer on one rank: against its definition head by head, and switch by switch."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from kit.layer_definition import by_definition  # noqa: E402
from kit.tiny import FA_HEADS, tiny_config, tiny_plan, token_batch  # noqa: E402
from megatron.core.models.common.embeddings import RotaryEmbedding  # noqa: E402

from megatron_hydra.errors import UserError  # noqa: E402
from megatron_hydra.model.build import build_model  # noqa: E402
from megatron_hydra.model.config import HydraConfig  # noqa: E402
from megatron_hydra.model.kernel_choice import choose_fused_kernels, choose_la_kernel  # noqa: E402
from megatron_hydra.model.layer_specs import get_hydra_layer_spec  # noqa: E402
from megatron_hydra.model.mixers import gated_delta_net  # noqa: E402
from megatron_hydra.model.sequence import packed_sequence  # noqa: E402
from megatron_hydra.parallel import initialize_model_parallel  # noqa: E402

pytestmark = pytest.mark.usefixtures("short_strips", "one_rank")

THREE_KINDS = {0: {"kda": (0, 6), "sliding_window": (3, 7)}}
"""Beside `FA_HEADS`; head 4 stays Gated DeltaNet."""


def _attention(fa_heads=FA_HEADS[0], other_kinds=None, **overrides):
    """The first layer's attention, every parameter away from its neutral value."""
    plan = tiny_plan({**FA_HEADS, 0: fa_heads}, other_kinds)
    model = build_model(tiny_config(init_method_std=0.2, **overrides), plan)
    attention = model.decoder.layers[0].self_attention
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, attention.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return attention


def _input(length: int = 21) -> torch.Tensor:
    return torch.randn(length, 2, 32, generator=torch.Generator().manual_seed(1))


def _rotary(length: int = 21) -> torch.Tensor:
    return RotaryEmbedding(8, 1.0, rotary_base=10000, use_cpu_initialization=True)(length)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        dict(fa_rope=True, fa_output_gate=False, la_output_gate="sigmoid", la_rope=False),
        dict(fusion="none", la_short_conv=False, la_decay=False, la_beta=False),
        dict(fusion="norm", la_output_gate="none", la_qk_norm=False, fa_query_scale="always"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "kinds",
    [
        {},
        dict(la_kind="kda"),
        dict(la_kind="sliding_window", sliding_window_tokens=5),
        dict(other_kinds=THREE_KINDS, sliding_window_tokens=30, sliding_window_sink=False),
    ],
    ids=str,
)
def test_layer_equals_its_definition(overrides, kinds):
    attention = _attention(**kinds, **overrides)
    x, rotary = _input(), _rotary()
    with torch.no_grad():
        found, bias = attention(x, rotary_pos_emb=rotary)
        expected = by_definition(attention, x.double(), rotary.double())
    assert bias is None
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        dict(la_rope=False, la_decay=False),
        dict(la_short_conv=False, la_qk_norm=False),
        dict(la_kind="kda"),
        dict(la_kind="kda", la_beta=False, la_decay=False),
        # The norm of each head's outputs takes off all that a sink does, but for its epsilon.
        dict(la_kind="sliding_window", sliding_window_tokens=4, fusion="none"),
        dict(other_kinds=THREE_KINDS, sliding_window_tokens=7, fusion="none"),
    ],
    ids=str,
)
def test_triton_kernels_equal_the_reference(overrides, packed):
    results = []
    for kernels in ("reference", "triton"):
        attention = _attention(fused_kernels=kernels, **overrides)
        x, packing = _input(), None
        if packed:
            x, packing = x.flatten(0, 1)[:, None], packed_sequence(torch.tensor([0, 1, 3, 22, 42]))
        x.requires_grad_()
        output, _ = attention(x, rotary_pos_emb=_rotary(), packed_seq_params=packing)
        output.square().sum().backward()
        named = {name: p.grad for name, p in attention.named_parameters() if p.requires_grad}
        results.append({"output": output.detach(), "input": x.grad} | named)
    reference, triton = results
    for name, value in reference.items():
        error = (triton[name] - value).norm() / value.norm().clamp_min(1e-9)
        assert error <= 1e-4, f"{name}: relative error {error:.1e}"


def test_output_is_causal():
    attention = _attention()
    x = _input()
    changed = x.clone()
    changed[13:] += 1.0
    before, after = (attention(t, rotary_pos_emb=_rotary())[0] for t in (x, changed))
    torch.testing.assert_close(before[:13], after[:13], rtol=0, atol=1e-6)
    assert not torch.allclose(before[13:], after[13:])


FUSIONS = [{}, dict(fa_output_gate=False, la_output_gate="sigmoid"), dict(la_output_gate="none"),
           dict(fusion="norm"), dict(fusion="none"), dict(fusion="gate")]  # fmt: skip


@pytest.mark.parametrize(  # in `make test`, heads of one kind have the default alone
    ("overrides", "fa_heads"),
    [
        pytest.param(way, heads, marks=pytest.mark.exhaustive if way and heads != (1, 2, 5) else ())
        for way in FUSIONS
        for heads in ((1, 2, 5), (), tuple(range(8)))
    ],
    ids=str,
)
def test_fusion_in_one_kernel_equals_the_backends_modules(overrides, fa_heads):
    results = []
    for fused_kernels in ("reference", "triton"):
        initialize_model_parallel()  # the same seed for both models
        attention = _attention(
            fa_heads, fused_kernels=fused_kernels, layernorm_epsilon=1e-2, **overrides
        )
        for parameter in attention.parameters():
            parameter.grad = None
        x = _input(5).requires_grad_()
        output, _ = attention(x, rotary_pos_emb=_rotary(5))
        (output * _input(5).flip(0)).sum().backward()
        gradients = {name: p.grad for name, p in attention.named_parameters() if p.requires_grad}
        results.append({"output": output, "x": x.grad, **gradients})
    is_fused = overrides.get("fusion") != "gate"
    assert attention.fusion.impl == ("triton" if is_fused else "reference")
    reference, fused = results
    for name, expected in reference.items():
        # Of a whole tensor: the norm of a head that is nearly zero magnifies rounding.
        assert (fused[name] - expected).norm() <= 1e-5 * expected.norm(), name


def test_inference_scales_queries_past_the_start_only():
    attention = _attention(fa_query_scale_start=10, seq_length=64)
    x = _input()
    training = attention(x, rotary_pos_emb=_rotary())[0]
    inference = attention.eval()(x, rotary_pos_emb=_rotary())[0]
    torch.testing.assert_close(inference[:11], training[:11], rtol=0, atol=0)
    assert not torch.equal(inference[11:], training[11:])


@pytest.mark.parametrize("other", [dict(fa_output_gate=False), dict(fusion="gate")], ids=str)
def test_gates_start_at_the_identity(other):
    tokens, positions = token_batch(tiny_config())
    logits = []
    for overrides in ({}, other):
        initialize_model_parallel()  # the same seed for what the two models share
        model = build_model(tiny_config(**overrides), tiny_plan())
        logits.append(model(tokens, positions, None))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-6)


def test_norm_takes_the_scale_off_a_head():
    attention = _attention()
    with torch.no_grad():
        before = attention(_input(), rotary_pos_emb=_rotary())[0]
        # A softmax average is linear in its values, and heads 0 and 1 share group 0.
        attention.in_proj.weight[attention.layout.rows("fa_value", 0)] *= 50.0
        after = attention(_input(), rotary_pos_emb=_rotary())[0]
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_decay_rates_stay_float32_in_a_bfloat16_model():
    attention = _attention()
    before = attention.linear_attention.A_log.detach().clone()
    attention.bfloat16()
    assert attention.in_proj.weight.dtype == torch.bfloat16
    assert torch.equal(attention.linear_attention.A_log, before)
    assert attention.fusion.head_scale.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("la_conv_kernel_size", 0, "it must be 1 or more"),
        ("seq_length", 0, "it must be 1 or more"),
        ("seq_length", "x", "an integer is needed"),
        ("seq_length", 64.0, "an integer is needed"),
        ("vocab_size", 0, "it must be 1 or more"),
        ("fa_query_scale_start", -600, r"it must be 0 or more, and below 2\^31"),
        ("fa_query_scale_base", math.nan, "a number is needed"),
        ("fa_query_scale_base", 1.0, "it must be above 1"),
        ("rotary_base", math.nan, "a number is needed"),
        ("rotary_base", 0.0, "it must be above 0"),
        ("layernorm_epsilon", math.nan, "it must be a finite number above 0"),
        ("fa_rope", 1, "true or false is needed"),
        ("rope_scaling_factor", 0.5, "it must be 1 or more"),
        ("rope_low_freq_factor", 4.0, "it must be below rope_high_freq_factor, 4.0"),
    ],
)
def test_values_out_of_range_are_errors(name, value, allowed):
    with pytest.raises(UserError, match=f"^{name} is {value!r}; {allowed}$"):
        tiny_config(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_dropout", 0.1),
        ("attention_dropout", math.nan),
        ("add_bias_linear", True),
        ("window_size", (8, 0)),
        ("normalization", "LayerNorm"),
        ("layernorm_zero_centered_gamma", True),
        ("softmax_type", "learnable"),
        ("qk_l2_norm", True),
        ("attention_output_gate", True),
        ("no_rope_freq", [1, 0]),
        ("num_moe_experts", 4),
        ("multi_latent_attention", True),
    ],
)
def test_megatrons_fields_without_a_part_in_the_layer_are_errors(name, value):
    with pytest.raises(UserError, match=f"^{name} is .*; hybrids and their teachers need "):
        tiny_config(**{name: value})


def test_megatrons_own_defaults_are_not_taken_for_qwen3s():
    """A configuration of sizes alone would have LayerNorm, biases and dropout."""
    sizes = dict(num_layers=2, hidden_size=32, num_attention_heads=8, vocab_size=64)
    with pytest.raises(UserError, match="normalization is 'LayerNorm'; hybrids and their teachers"):
        HydraConfig(**sizes)


def _keep_in(saved):
    def keep(tensor):
        saved.append(tensor)
        return tensor

    return keep


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("overrides", [{}, dict(fusion="gate", fa_query_scale="always")], ids=str)
def test_selective_recomputation_is_bit_equal_and_keeps_less(overrides, packed):
    results, kept = [], []
    for granularity in (None, "selective"):
        attention = _attention(recompute_granularity=granularity, **overrides)
        x, angles, packing = _input(), _rotary(), None
        if packed:
            x, packing = x.flatten(0, 1)[:, None], packed_sequence(torch.tensor([0, 1, 22, 42]))
        x.requires_grad_()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(_keep_in(saved), lambda tensor: tensor):
            output, _ = attention(x, rotary_pos_emb=angles, packed_seq_params=packing)
        output.square().sum().backward()
        gradients = [p.grad for p in attention.parameters() if p.requires_grad]
        results.append([output, x.grad, *gradients])
        kept.append(sum(t.numel() for t in saved))
    assert all(map(torch.equal, *results))
    assert kept[1] < kept[0] / 3


def test_layers_share_what_is_known_of_a_packed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    kernel = gated_delta_net.gated_delta_rule

    def watched(*args, cu_seqlens, **kwargs):
        seen.append(cu_seqlens)
        return kernel(*args, cu_seqlens=cu_seqlens, **kwargs)

    monkeypatch.setattr(gated_delta_net, "gated_delta_rule", watched)
    model = build_model(tiny_config(), tiny_plan())
    tokens, positions = (t.flatten()[None] for t in token_batch(model.config))
    for length in (7, 9):  # what one step's layers share is no other step's
        packing = packed_sequence(torch.tensor([0, length, tokens.shape[1]]))
        model(tokens, positions, None, packed_seq_params=packing)
        assert all(each is seen[-1] for each in seen) and seen[-1][1] == length
        assert len(seen) > 1
        seen.clear()


def test_choices_that_do_not_fit_are_errors():
    assert choose_la_kernel("auto") == ("fla" if torch.cuda.is_available() else "reference")
    with pytest.raises(UserError, match="la_kernel is 'fla', whose Triton kernels need a GPU"):
        choose_la_kernel("fla")
    with pytest.raises(UserError, match="fusion is 'mean'; allowed: scale, norm, none, gate"):
        tiny_config(fusion="mean")
    with pytest.raises(UserError, match="size 16 does not fit the model: the 8 query heads"):
        tiny_config(tensor_model_parallel_size=16, vocab_size=64, ffn_hidden_size=48)
    with pytest.raises(UserError, match="transformer_engine', which is not installed"):
        get_hydra_layer_spec(tiny_config(backend="transformer_engine"), tiny_plan().layers[0])
    with pytest.raises(UserError, match="4 heads"):
        get_hydra_layer_spec(tiny_config(), type(tiny_plan().layers[0])(("fa",) * 4))


def test_fused_kernels_are_chosen_by_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    has_gpu = torch.cuda.is_available()
    assert choose_fused_kernels("auto") == ("triton" if has_gpu else "reference")
    assert choose_fused_kernels("reference") == "reference"
    if not has_gpu:
        with pytest.raises(UserError, match="fused_kernels is 'triton', which needs a GPU"):
            choose_fused_kernels("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_fused_kernels("triton") == "triton"
