"""Weight reuse: the hybrid is its teacher wherever its heads are, head by head."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import Qwen3ForCausalLM

from megatron_hydra import cpu

cpu.install_if_needed()

from kit.plans import all_fa  # noqa: E402
from kit.tiny_qwen3 import write_tiny_qwen3  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402

from megatron_hydra.head_plan import HeadPlan  # noqa: E402
from megatron_hydra.model.build import build_model  # noqa: E402
from megatron_hydra.teachers import conversion, loading, weights  # noqa: E402
from megatron_hydra.teachers.calibration import HeadRms, measure_heads  # noqa: E402
from megatron_hydra.teachers.weight_reuse import reuse_teacher_weights  # noqa: E402

# Everything off that a teacher's attention has not.
PLAIN = {"fa_rope": True, "fa_query_scale": "none", "fa_output_gate": False, "fusion": "none"}
# Layer 0 splits both query groups (heads 0-1 and 2-3), layer 1 keeps one of them whole.
MIXED = {0: [1, 2], 1: [2, 3]}

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("teacher"), tie_word_embeddings=request.param)


def _tokens(batch: int = 2) -> Tensor:
    return torch.randint(0, 257, (batch, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    return model.eval()(_tokens(), torch.arange(40).expand(2, -1), None)


def _hybrid(folder: Path, plan: HeadPlan, head_rms: Tensor | None = None, **fields: Any) -> Any:
    config = loading.hydra_config(folder, **fields)
    model = build_model(config, plan)
    tensors = conversion.tensors_by_head(config, weights.read_weights(folder))
    summary = reuse_teacher_weights(model, tensors, head_rms)
    return model, summary


def _megatrons_own_model(folder: Path) -> GPTModel:
    """The teacher of Megatron's modules alone: its local spec, attention and norms unchanged."""
    config = loading.hydra_config(folder)
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm"),
        config.vocab_size,
        config.seq_length,
        share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=config.rotary_base,
    )
    ours = [m for m in model.modules() if type(m).__module__.startswith("megatron_hydra")]
    attention = model.decoder.layers[0].self_attention
    assert not ours and isinstance(attention.core_attention, DotProductAttention)
    loading.load_weights_into(model, weights.read_weights(folder))
    return model


def test_hybrid_of_fa_heads_alone_is_the_teacher(folder: Path) -> None:
    """Held to Megatron's own modules, to our teacher and to transformers."""
    hybrid, summary = _hybrid(folder, all_fa(2, 4, 2), **PLAIN)
    reference = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = _logits(hybrid)
    for model in (_megatrons_own_model(folder), loading.load_teacher(folder)):
        torch.testing.assert_close(logits, _logits(model), atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(logits, reference(_tokens()).logits, atol=1e-4, rtol=0)
    assert summary.new.total() == 0


def test_the_control_of_the_docs_is_such_a_hybrid() -> None:
    page = (Path(__file__).parents[2] / "docs/export.md").read_text()
    line = page[page.index("--fa-ratio 1 ") : page.index("stage2_distill.yaml")]
    options = dict(re.findall(r"model\.(\w+)=(\w+)", line))
    assert {key: yaml.safe_load(value) for key, value in options.items()} == PLAIN


def test_output_gate_starts_at_identity(folder: Path) -> None:
    plan = all_fa(2, 4, 2)
    plain, _ = _hybrid(folder, plan, **PLAIN)
    gated, summary = _hybrid(folder, plan, **{**PLAIN, "fa_output_gate": True})
    torch.testing.assert_close(_logits(gated), _logits(plain), atol=1e-6, rtol=0)
    assert summary.new == {"fa_gate": 2 * 4 * 16 * 32}


def test_fa_heads_of_a_mixed_layer_are_the_teachers(folder: Path) -> None:
    """With the LA heads' output columns at zero, the teacher without these heads remains.

    Catches FA heads in a wrong order, with a wrong group's key, or with wrong output columns.
    """
    hybrid, _ = _hybrid(folder, HeadPlan.from_fa_heads(MIXED, 2, 4, 2), **PLAIN)
    teacher = loading.load_teacher(folder)
    before = _logits(teacher)
    for model in (hybrid, teacher):
        for layer, fa_heads in MIXED.items():
            columns = model.decoder.layers[layer].self_attention.linear_proj.weight.data
            for head in set(range(4)) - set(fa_heads):
                columns[:, head * 16 : (head + 1) * 16] = 0.0
    after = _logits(teacher)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(_logits(hybrid), after, atol=1e-5, rtol=0)


def test_each_la_head_gets_its_groups_key_and_value(folder: Path) -> None:
    hybrid, _ = _hybrid(folder, HeadPlan.from_fa_heads(MIXED, 2, 4, 2))
    source = weights.read_weights(folder)
    for layer, fa_heads in MIXED.items():
        attention = hybrid.decoder.layers[layer].self_attention
        weight = attention.in_proj.weight.data
        prefix = f"model.layers.{layer}.self_attn."
        for head in set(range(4)) - set(fa_heads):
            for section, name, unit in (
                ("la_query", "q_proj", head),
                ("la_key", "k_proj", head // 2),
                ("la_value", "v_proj", head // 2),
            ):
                rows = source[f"{prefix}{name}.weight"][unit * 16 : (unit + 1) * 16]
                assert torch.equal(weight[attention.layout.rows(section, head)], rows)
        for norm in ("q_norm", "k_norm"):
            linear = getattr(attention.linear_attention, norm.replace("_", "_layer"))
            assert torch.equal(linear.weight, source[f"{prefix}{norm}.weight"])


@pytest.mark.parametrize("fusion", ["scale", "norm", "none", "gate"])
def test_every_value_is_counted_once(folder: Path, fusion: str) -> None:
    plan = HeadPlan.from_fa_heads(MIXED, 2, 4, 2)
    model, summary = _hybrid(folder, plan, torch.ones(2, 4), fusion=fusion)
    padding = 0
    for layer in model.decoder.layers:
        attention = layer.self_attention
        rows = attention.in_proj.weight[attention.layout.padding_rows]
        assert (rows == 0).all()
        padding += rows.numel()
    total = sum(parameter.numel() for parameter in model.parameters())
    assert summary.reused.total() + summary.new.total() + padding == total


def test_unknown_or_missing_teacher_tensors_do_not_pass(folder: Path) -> None:
    config = loading.hydra_config(folder)
    model = build_model(config, all_fa(2, 4, 2))
    tensors = conversion.tensors_by_head(config, weights.read_weights(folder))
    with pytest.raises(AssertionError, match="without a place"):
        reuse_teacher_weights(model, {**tensors, "extra": torch.ones(1)})
    del tensors["decoder.final_layernorm.weight"]
    with pytest.raises(AssertionError, match="no decoder.final_layernorm"):
        reuse_teacher_weights(model, tensors)


def test_head_rms_is_that_of_transformers(folder: Path) -> None:
    reference = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    outputs: list[Tensor] = []
    for layer in reference.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, x: outputs.append(x[0]))
    tokens = _tokens(batch=5)
    with torch.no_grad():
        reference(tokens)
    expected = torch.stack([x.view(-1, 4, 16).square().mean((0, 2)).sqrt() for x in outputs])
    # Batches of unequal size: every token has the same weight.
    found = _measured(folder, tokens.split((3, 2)))
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-5)


def _measured(folder: Path, batches: Any) -> Tensor:
    config, source = loading.hydra_config(folder), weights.TeacherWeights(folder)
    return measure_heads(config, source, batches, range(2), rms=True, attention=False).head_rms


def test_output_projection_sees_its_old_scale(folder: Path) -> None:
    """Each head of the fused hybrid has the RMS that the teacher's had, LA heads included."""
    rms = _measured(folder, [_tokens()])
    plan = HeadPlan.from_fa_heads(MIXED, 2, 4, 2)
    hybrid, _ = _hybrid(folder, plan, rms, fusion="scale", la_output_gate="none")
    meters = [HeadRms(layer.self_attention) for layer in hybrid.decoder.layers]
    _logits(hybrid)
    # The norm adds epsilon to the mean square, which shows where a head writes little.
    found = torch.stack([meter.found() for meter in meters])
    torch.testing.assert_close(found, rms, atol=0, rtol=1e-2)
