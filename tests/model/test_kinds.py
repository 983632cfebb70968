"""Kinds of heads: what each says of itself agrees with what the model builds of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hydra_kernels.window_attention import window_attention
from kit.tiny import tiny_config, tiny_plan
from kit.tiny_qwen3 import write_tiny_qwen3

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from megatron_hydra.api.convert import Calibration, convert  # noqa: E402
from megatron_hydra.errors import UserError  # noqa: E402
from megatron_hydra.head_plan import HeadPlan  # noqa: E402
from megatron_hydra.model.build import build_model  # noqa: E402
from megatron_hydra.model.mixers.costs import COSTS, LA_KINDS  # noqa: E402
from megatron_hydra.model.mixers.kinds import KINDS  # noqa: E402
from megatron_hydra.model.mixers.sliding_window import SlidingWindow  # noqa: E402
from megatron_hydra.parallel import initialize_model_parallel  # noqa: E402
from megatron_hydra.selection.cost import attention_weight_bytes  # noqa: E402
from megatron_hydra.selection.shape import ModelShape  # noqa: E402
from megatron_hydra.teachers.checkpoint import read_metadata  # noqa: E402
from megatron_hydra.teachers.loading import hydra_config  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_rank")


def test_every_kind_has_costs_and_names_of_its_own():
    assert list(KINDS) == list(COSTS)
    assert all(type(kind.costs) is type(COSTS[name]) for name, kind in KINDS.items())
    for name in ("label", "module_name", "gate_name"):
        assert len({getattr(kind, name) for kind in KINDS.values()}) == len(KINDS)


@pytest.mark.parametrize("la_kind", LA_KINDS)
@pytest.mark.parametrize("other_kinds", [None, {0: {"kda": (0,), "sliding_window": (3, 7)}}])
def test_counted_weights_are_the_models(la_kind, other_kinds):
    """Matrices of the attentions: what planning counts is what the model has."""
    config = tiny_config(la_kind=la_kind)
    plan = tiny_plan(other_kinds=other_kinds)
    model = build_model(config, plan)
    found = 0
    for layer in model.decoder.layers:
        attention = layer.self_attention
        padding = attention.layout.num_padding_rows * config.hidden_size
        found += sum(p.numel() for p in attention.parameters() if p.dim() == 2) - padding
    counted = attention_weight_bytes(ModelShape.from_config(config), "fp32").of(plan) / 4
    assert found == counted


@pytest.mark.parametrize("la_kind", LA_KINDS)
def test_heads_that_are_named_are_those_that_the_model_would_take(la_kind):
    """A plan that names the kind of every head is the one that leaves it to `la_kind`."""
    named = tiny_plan().resolved(la_kind)
    models = []
    for plan, config in ((tiny_plan(), tiny_config(la_kind=la_kind)), (named, tiny_config())):
        initialize_model_parallel()
        models.append(build_model(config, plan))
    ours, theirs = (dict(model.named_parameters()) for model in models)
    assert all(parameter.equal(theirs[name]) for name, parameter in ours.items())


def test_convert_takes_over_what_the_plan_was_made_for(tmp_path):
    teacher = write_tiny_qwen3(tmp_path / "qwen3")
    plain = ModelShape.from_config(hydra_config(teacher))
    made_for = dataclasses.replace(plain, la_kind="kda", sliding_window_tokens=64)
    provenance = {"shape": dataclasses.asdict(made_for)}
    sizes = (made_for.num_layers, made_for.num_heads, made_for.num_query_groups)
    HeadPlan.from_fa_heads({0: [1]}, *sizes, provenance=provenance).save(tmp_path / "plan.json")
    found = []
    for name, options in (("a", {}), ("b", {"la_kind": "gated_delta_net"})):
        calibration = Calibration(num_tokens=256)
        convert(teacher, tmp_path / name, tmp_path / "plan.json", options=options,
                calibration=calibration)  # fmt: skip
        config = read_metadata(tmp_path / name)["config"]
        found.append((config["la_kind"], config["sliding_window_tokens"]))
    assert found == [("kda", 64), ("gated_delta_net", 64)]


def test_kinds_that_nobody_knows_are_named():
    with pytest.raises(
        UserError, match="la_kind is 'kimi'; allowed: gated_delta_net, kda, sliding"
    ):
        tiny_config(la_kind="kimi")
    plan = HeadPlan.from_fa_heads({}, 2, 8, 4, other_kinds={1: {"swa": [3]}})
    with pytest.raises(UserError, match="head 3 of layer 1 of the head plan is of kind 'swa'"):
        build_model(tiny_config(), plan)


class CoreAttention(torch.nn.Module):
    """Takes and gives what Megatron's class for Transformer Engine does, of windows alone."""

    def __init__(self, config, layer_number, softmax_scale, **_kwargs):
        super().__init__()
        assert config.softmax_type == "learnable" and config.window_size[1] == 0
        self.window, self.scale = config.window_size[0] + 1, softmax_scale
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        self.softmax_offset = torch.nn.Parameter(torch.zeros(heads))

    def forward(self, *qkv_and_mask, attn_mask_type):
        q, k, v = (x.transpose(0, 1) for x in qkv_and_mask[:3])
        assert qkv_and_mask[3] is None and attn_mask_type.name == "causal"
        assert len(self.softmax_offset) == q.shape[2]
        options = dict(window=self.window, sink=self.softmax_offset, scale=self.scale)
        return window_attention(q, k, v, **options).transpose(0, 1).flatten(2)


def test_windows_on_anothers_attention_have_the_same_weights(monkeypatch):
    """The sinks' values reach it, their gradients come back, and checkpoints know nothing of it."""
    config = tiny_config(la_kind="sliding_window", sliding_window_tokens=3, fusion="none")
    model = build_model(config, tiny_plan())
    for name, parameter in model.named_parameters():
        if name.endswith("sink"):
            torch.nn.init.normal_(parameter)
    tokens = torch.arange(20).view(2, 10)
    positions = torch.arange(10).expand(2, 10)
    results = []
    for takes_it in (False, True):
        monkeypatch.setattr(SlidingWindow, "_takes_transformer_engine", lambda *_, it=takes_it: it)
        for module in model.modules():
            if isinstance(module, SlidingWindow):
                module._core_attention = CoreAttention
        model.zero_grad(set_to_none=True)
        logits = model(tokens, positions, None)
        logits.square().mean().backward()
        results.append([logits] + [p.grad for p in model.parameters()])
        names = list(model.state_dict())
    assert not any("core" in name or "softmax_offset" in name for name in names)
    sinks = [p for n, p in model.named_parameters() if n.endswith("sink")]
    assert sinks and all(sink.grad.abs().max() > 0 for sink in sinks)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
