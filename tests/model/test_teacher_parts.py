"""What not every teacher has: biases of the in-projection, norms of queries and keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kit.tiny import tiny_config, tiny_plan
from megatron.core.models.common.embeddings import RotaryEmbedding
from torch import Tensor

from megatron_hydra.model.build import build_model
from megatron_hydra.model.hydra_attention import HydraAttention

LENGTH, HIDDEN = 21, 32
KERNELS = pytest.mark.parametrize("kernels", ["reference", "triton"])

pytestmark = pytest.mark.usefixtures("short_strips", "one_rank")


def _attention(**fields: Any) -> HydraAttention:
    """The first layer's attention of FA heads 1, 2 and 5, every parameter drawn anew."""
    model = build_model(tiny_config(**fields), tiny_plan())
    attention = model.decoder.layers[0].self_attention
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise + (1.0 if "norm" in name else 0.0))
    return attention


def _input() -> Tensor:
    return torch.randn(LENGTH, 2, HIDDEN, generator=torch.Generator().manual_seed(1))


def _run(attention: HydraAttention, x: Tensor) -> Tensor:
    rotary = RotaryEmbedding(8, 1.0, rotary_base=10000, use_cpu_initialization=True)(LENGTH)
    return attention(x, rotary_pos_emb=rotary)[0]


@KERNELS
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_a_bias_is_the_weight_of_an_input_that_is_always_one(kernels: str) -> None:
    """Of every section, in both passes. Catches one that is left out or added twice."""
    biased = _attention(add_qkv_bias=True, fused_kernels=kernels)
    plain = _attention(hidden_size=HIDDEN + 1, fused_kernels=kernels)
    rest = dict(biased.named_parameters())
    weight, bias, proj = (
        rest.pop(name) for name in ("in_proj.weight", "in_proj.bias", "linear_proj.weight")
    )
    with torch.no_grad():
        plain.in_proj.weight.copy_(torch.cat((weight, bias[:, None]), dim=1))
        plain.linear_proj.weight[:HIDDEN] = proj
        for name, parameter in rest.items():
            plain.get_parameter(name).copy_(parameter)
    x = _input()
    found = _run(biased, x)
    expected = _run(plain, torch.cat((x, torch.ones(LENGTH, 2, 1)), dim=-1))[..., :HIDDEN]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    found.backward(upstream)
    expected.backward(upstream)
    assert bias.grad is not None and plain.in_proj.weight.grad is not None
    torch.testing.assert_close(bias.grad, plain.in_proj.weight.grad[:, -1], atol=1e-4, rtol=1e-4)
    for section in biased.layout.sections:
        rows = bias.grad[biased.layout.rows(section.name, section.units[0])]
        assert rows.abs().max() > 1e-4, f"the biases of {section.name} do not train"


@KERNELS
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_la_heads_without_norms_are_those_with_neutral_ones(kernels: str) -> None:
    """The L2 norm that follows takes the length out again; FA heads, which have none, differ."""
    same = dict(layernorm_epsilon=1e-12, fused_kernels=kernels, la_qk_norm=True)
    without, normed = _attention(qk_layernorm=False, **same), _attention(**same)
    with torch.no_grad():
        for name, parameter in normed.named_parameters():
            if "q_layernorm" in name or "k_layernorm" in name:
                parameter.fill_(1.0)
            else:
                parameter.copy_(without.get_parameter(name))
    assert not any("k_layernorm" in name for name, _ in without.named_parameters())
    heads: dict[str, list[Tensor]] = {"full_attention": [], "linear_attention": []}
    for name, outputs in heads.items():
        for attention in (without, normed):
            keep = outputs.append
            attention.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, keep=keep: keep(output.detach())
            )
    _run(without, _input())
    _run(normed, _input())
    torch.testing.assert_close(*heads["linear_attention"], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(*heads["full_attention"], atol=1e-2)


def test_core_attention_gets_no_three_views_of_one_buffer() -> None:
    """Transformer Engine would take them for one interleaved tensor, whatever lies between."""
    attention = _attention(qk_layernorm=False, fa_output_gate=False)
    branch = attention.full_attention
    assert branch.has_key_each and not branch.config.fa_rope
    seen: list[Tensor] = []
    branch.core_attention.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[:3]))
    _run(attention.train(), _input())
    places = {tensor.untyped_storage().data_ptr() for tensor in seen}
    assert len(places) == 3 and all(tensor.is_contiguous() for tensor in seen[:2])
