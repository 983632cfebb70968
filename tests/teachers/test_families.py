"""Every family: transformers' logits, whatever its tensors are, in the teacher and its hybrids."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_hydra import cpu

cpu.install_if_needed()

from kit import forks  # noqa: E402
from kit.distributed import run_distributed  # noqa: E402
from kit.families import CASES, SCALED, UNTIED  # noqa: E402
from kit.generated import generated_results  # noqa: E402
from kit.plans import all_fa  # noqa: E402
from kit.tiny_qwen3 import edit_config, logits_difference, write_tiny_teacher  # noqa: E402

from megatron_hydra.errors import UserError  # noqa: E402
from megatron_hydra.head_plan import HeadPlan  # noqa: E402
from megatron_hydra.model.build import build_model  # noqa: E402
from megatron_hydra.parallel import initialize_model_parallel  # noqa: E402
from megatron_hydra.teachers import checkpoint, config_json, conversion, loading  # noqa: E402
from megatron_hydra.teachers.families import FAMILIES  # noqa: E402
from megatron_hydra.teachers.tokenizer import load_tokenizer  # noqa: E402
from megatron_hydra.teachers.weight_reuse import reuse_teacher_weights  # noqa: E402
from megatron_hydra.teachers.weights import read_weights  # noqa: E402

ROOT = Path(__file__).parents[2]
PLAIN = {"fa_rope": True, "fa_query_scale": "none", "fusion": "none"}
# The families whose layers differ most from one another are also run over ranks and to the end.
PROOFS: dict[str, dict[str, Any]] = {"qwen2": {}, "llama": {"rope_scaling": SCALED, **UNTIED}}
LAYERS = {0: [1, 2], 1: [3]}

pytestmark = pytest.mark.usefixtures("one_rank")


def _tokens() -> Tensor:
    return torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    return model.eval()(_tokens(), torch.arange(40).expand(2, -1), None)


def _hybrid(folder: Path, plan: HeadPlan, **fields: Any) -> Any:
    config = loading.hydra_config(folder, **fields)
    model = build_model(config, plan)
    tensors = conversion.tensors_by_head(config, read_weights(folder))
    return model, reuse_teacher_weights(model, tensors)


@torch.no_grad()
def _transformers(folder: Path, layers: dict[int, list[int]] | None = None) -> Tensor:
    """Logits; with ``layers``, of the model without the output of the heads not named there."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    for index, kept in (layers or {}).items():
        columns = model.model.layers[index].self_attn.o_proj.weight
        dim = columns.shape[1] // config.num_attention_heads
        for head in set(range(config.num_attention_heads)) - set(kept):
            columns[:, head * dim : (head + 1) * dim] = 0.0
    logits = model(_tokens()).logits
    assert logits.std() > 0.5, "logits too small for the comparison to mean something"
    return logits


@pytest.mark.parametrize(("family", "fields"), CASES.values(), ids=CASES)
def test_teacher_and_hybrid_of_fa_heads_alone_have_the_logits_of_transformers(
    tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    """With the output gate, at its start the identity."""
    folder = write_tiny_teacher(tmp_path / "teacher", family, **fields)
    expected = _transformers(folder)
    found = _logits(loading.load_teacher(folder))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    config = loading.hydra_config(folder)
    plan = all_fa(config.num_layers, config.num_attention_heads, config.num_query_groups)
    hybrid, summary = _hybrid(folder, plan, **PLAIN)
    torch.testing.assert_close(_logits(hybrid), expected, atol=1e-4, rtol=0)
    assert set(summary.new) == {"fa_gate"}


@pytest.mark.parametrize(("family", "fields"), CASES.values(), ids=CASES)
def test_names_and_shapes_are_read_in_both_directions(
    tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    folder = write_tiny_teacher(tmp_path / "teacher", family, **fields)
    config, tensors = loading.hydra_config(folder), read_weights(folder)
    of_megatron = conversion.megatron_tensors(config, tensors)
    named = dict(loading.load_teacher(folder).named_parameters())
    assert {name: value.shape for name, value in of_megatron.items()} == {
        name: value.shape for name, value in named.items()
    }
    back = conversion.hugging_face_tensors(config, of_megatron)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_fa_heads_of_a_mixed_layer_are_the_teachers(tmp_path: Path, family: str) -> None:
    """With the LA heads' output columns at zero, transformers' model without them remains.

    Catches a bias or a norm of another head's, or a group's that comes to the wrong head.
    """
    folder = write_tiny_teacher(tmp_path / "teacher", family)
    hybrid, _ = _hybrid(folder, HeadPlan.from_fa_heads(LAYERS, 2, 4, 2), **PLAIN)
    for layer, fa_heads in LAYERS.items():
        columns = hybrid.decoder.layers[layer].self_attention.linear_proj.weight.data
        for head in set(range(4)) - set(fa_heads):
            columns[:, head * 16 : (head + 1) * 16] = 0.0
    torch.testing.assert_close(_logits(hybrid), _transformers(folder, LAYERS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_la_heads_start_from_all_that_their_group_has(tmp_path: Path, family: str) -> None:
    folder = write_tiny_teacher(tmp_path / "teacher", family)
    hybrid, summary = _hybrid(folder, HeadPlan.from_fa_heads(LAYERS, 2, 4, 2))
    source = read_weights(folder)
    attention = hybrid.decoder.layers[0].self_attention
    parameters = dict(attention.in_proj.named_parameters())
    has_bias = "model.layers.0.self_attn.q_proj.bias" in source
    assert ("bias" in parameters) == has_bias == FAMILIES[family].fields["add_qkv_bias"]
    for kind, parameter in parameters.items():
        for section, part, unit in (
            ("la_query", "q", 3), ("la_key", "k", 1), ("la_value", "v", 1), ("fa_query", "q", 1),
            ("fa_key", "k", 0), ("fa_value", "v", 1),
        ):  # fmt: skip
            teachers = source[f"model.layers.0.self_attn.{part}_proj.{kind}"]
            head = 3 if section.startswith("la_") else unit
            rows = parameter[attention.layout.rows(section, head)]
            assert torch.equal(rows, teachers[unit * 16 : (unit + 1) * 16]), (section, kind)
    total = sum(parameter.numel() for parameter in hybrid.parameters())
    padding = sum(
        parameter[layer.self_attention.layout.padding_rows].numel()
        for layer in hybrid.decoder.layers
        for parameter in layer.self_attention.in_proj.parameters()
    )
    assert summary.reused.total() + summary.new.total() + padding == total


@pytest.mark.parametrize("family", FAMILIES)
def test_left_out_fields_have_the_defaults_of_transformers(tmp_path: Path, family: str) -> None:
    folder = write_tiny_teacher(tmp_path / "teacher", family)
    left_out = dict.fromkeys(FAMILIES[family].defaults, "REMOVE")
    edit_config(folder, num_attention_heads=32, hidden_size=256, **left_out)
    found = config_json.read_config(folder)
    expected = AutoConfig.for_model(family, num_attention_heads=32, hidden_size=256)
    dim = getattr(expected, "head_dim", 256 // 32)
    assert found["head_dim"] == dim
    assert {name: found[name] for name in left_out if name != "head_dim"} == {
        name: getattr(expected, name) for name in left_out if name != "head_dim"
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_none_of_transformers_own_keys_is_unknown(
    tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tiny_teacher(tmp_path / "teacher", family)
    saved = json.loads((folder / "config.json").read_text())
    edit_config(folder, **AutoConfig.for_model(**saved).to_dict())
    loading.hydra_config(folder)
    assert not caplog.messages


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_without_a_class_is_of_its_familys(tmp_path: Path, family: str) -> None:
    """As AutoTokenizer takes it, and in a checkpoint's folder, which it could not read."""
    folder = write_tiny_teacher(tmp_path / "teacher", family)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    expected = AutoTokenizer.from_pretrained(folder)
    model = loading.load_teacher(folder)
    checkpoint.save_checkpoint(tmp_path / "ckpt", model, model.config, None, folder, {})
    for place in (folder, tmp_path / "ckpt"):
        found = load_tokenizer(place)
        assert type(found) is type(expected)
        text = "fünf 5\n<|endoftext|>"
        options = {"add_special_tokens": False}
        assert found.encode(text, **options) == expected.encode(text, **options)


def test_a_hash_tells_the_families_apart(tmp_path: Path) -> None:
    """Heads of one shape, with and without norms and biases."""
    found = set()
    for family in FAMILIES:
        folder = write_tiny_teacher(tmp_path / family, family)
        own = config_json.config_hash(folder)
        assert config_json.teacher_hash(loading.hydra_config(folder)) == own
        found.add(own)
    assert len(found) == len(FAMILIES)


REFUSED = [
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "sliding-window layers"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window layers"),
    ("qwen2", {"attention_bias": False}, "attention_bias False; only True is supported"),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "type 'yarn' in rope_scaling"),
    ("qwen2", {"architectures": ["Qwen3ForCausalLM"]}, "allowed: Qwen2ForCausalLM"),
    ("qwen2", {"rope_scaling": SCALED}, "'llama3' in rope_scaling; only plain RoPE, 'default', is"),
    ("llama", {"attention_bias": True}, "attention_bias True; only False is supported"),
    ("llama", {"mlp_bias": True}, "mlp_bias True; only False is supported"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "supported: default, llama3"),
    ("llama", {"rope_scaling": {**SCALED, "type": "default"}}, "a rope_type and another type in"),
    (
        "llama",
        {"rope_scaling": {**SCALED, "factor": 0.5}},
        "factor 0.5 in rope_scaling; it must be",
    ),
    ("llama", {"rope_scaling": {**SCALED, "factor": None}}, "factor None in rope_scaling; it must"),
    (
        "llama",
        {"rope_scaling": {**SCALED, "low_freq_factor": 4}},
        "must be below the high_freq_fac",
    ),
    (
        "llama",
        {"rope_scaling": {**SCALED, "beta_fast": 3}},
        "beta_fast 3 in .* llama3 RoPE has not",
    ),
    ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "factor None in rope_scaling; it must be"),
    (
        "llama",
        {"rope_scaling": {**SCALED, "original_max_position_embeddings": 32.5}},
        "original_max_position_embeddings 32.5 in rope_scaling; it must be a whole number > 0",
    ),
    (
        "llama",
        {"rope_scaling": SCALED, "original_max_position_embeddings": 64},
        "original_max_position_embeddings 64 in the top level and 32 in rope_scaling: keep the one",
    ),
    (
        "llama",
        {"rope_scaling": SCALED, "rope_parameters": {"rope_type": "default"}},
        "a RoPE scaling of .* in rope_scaling and .* in rope_parameters: keep the one that",
    ),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_what_a_family_has_not_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    folder = write_tiny_teacher(tmp_path / "teacher", family)
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=f"config.json has .*{message}"):
        config_json.read_config(folder)


IN_PARAMETERS = {"rope_scaling": "REMOVE", "rope_theta": "REMOVE"}
WITHOUT_LENGTH = {k: v for k, v in SCALED.items() if k != "original_max_position_embeddings"}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {**SCALED, "type": "llama3"}},
        {"rope_scaling": {**SCALED, "attention_factor": None}, "dtype": "REMOVE",
         "torch_dtype": "bfloat16"},
        {**IN_PARAMETERS, "rope_parameters": {**SCALED, "rope_theta": 5e5}},
        {"rope_parameters": {**SCALED, "rope_theta": 5e5}},
        {**IN_PARAMETERS, "rope_parameters": {**WITHOUT_LENGTH, "rope_theta": 5e5},
         "original_max_position_embeddings": 32},
    ],
    ids=["both-types", "torch-dtype", "parameters", "both-places", "length-at-top"],
)  # fmt: skip
def test_every_spelling_of_scaled_rope_has_the_logits_of_transformers(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Held to what transformers 4 makes of its own spelling, which plain RoPE is far from."""
    shape = {"rope_theta": 5e5, "rope_scaling": SCALED}
    oracle = write_tiny_teacher(tmp_path / "oracle", "llama", **shape)
    folder = write_tiny_teacher(tmp_path / "teacher", "llama", **shape)
    edit_config(folder, **changes)
    assert logits_difference(folder, oracle) < 1e-4
    assert config_json.config_hash(folder) == config_json.config_hash(oracle)
    edit_config(folder, **{**IN_PARAMETERS, "rope_parameters": "REMOVE", "rope_theta": 5e5})
    assert logits_difference(folder, oracle) > 1e-2
    assert config_json.config_hash(folder) != config_json.config_hash(oracle)


def test_a_folder_of_another_familys_tensors_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_teacher(tmp_path / "teacher", "qwen2")
    edit_config(folder, model_type="qwen3", architectures=["Qwen3ForCausalLM"])
    with pytest.raises(UserError, match="has tensor model.layers.0.self_attn.k_proj.bias, which"):
        read_weights(folder)


@torch.no_grad()
def _random_hybrid(folder: Path) -> Any:
    """Every value drawn anew, biases of the sections without a teacher included."""
    model, _ = _hybrid(folder, HeadPlan.from_fa_heads(LAYERS, 2, 4, 2), fa_rope=True)
    for layer in model.decoder.layers:
        for parameter in layer.self_attention.in_proj.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            parameter[layer.self_attention.layout.padding_rows] = 0
    return model


@pytest.mark.dist
@pytest.mark.parametrize("family", PROOFS)
def test_two_ranks_have_the_logits_of_one(tmp_path: Path, family: str) -> None:
    """One rank has three of a layer's four LA or FA heads under `by_type`: an uneven plan.

    Catches a bias or a frequency that belongs to another rank's rows, or is added on each.
    """
    torch.manual_seed(0)
    folder = write_tiny_teacher(tmp_path / "teacher", family, **PROOFS[family])
    model = _random_hybrid(folder)
    plan = HeadPlan.from_fa_heads(LAYERS, 2, 4, 2, config_json.config_hash(folder))
    checkpoint.save_checkpoint(tmp_path / "one", model, model.config, plan, folder, {})
    run_distributed(_on_two_ranks, 2, tmp_path, _logits(model))
    initialize_model_parallel()
    again = checkpoint.load_checkpoint(tmp_path / "two").model.state_dict()
    for name, parameter in model.named_parameters():
        assert torch.equal(again[name], parameter), name


def _on_two_ranks(folder: Path, expected: Tensor) -> None:
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    initialize_model_parallel(tensor=2)
    for placement in ("by_type", "balanced"):
        loaded = checkpoint.load_checkpoint(folder / "one", placement=placement)
        logits = gather_from_tensor_model_parallel_region(_logits(loaded.model))
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    rest = (loaded.model, loaded.config, loaded.plan, loaded.tokenizer_folder, {})
    checkpoint.save_checkpoint(folder / "two", *rest)


# The quickstart's own teacher has a test of its own, in test_examples.py.
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.exhaustive)])
def test_the_main_job_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Score to report, with the quickstart's tokenizer; of random weights, so any gap counts."""
    shape = {"vocab_size": 1024, "eos_token_id": 0, "max_position_embeddings": 512}
    folder = write_tiny_teacher(tmp_path / "teacher", family, **shape, **PROOFS[family])
    for file in (ROOT / "examples/quickstart/teacher").glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, "examples/api")
from transfer import transfer
transfer(
    Path({str(folder)!r}), Path({str(tmp_path / "run")!r}),
    documents=16, samples=5, lengths=(128, 160, 192),
    scoring=["probes.pairs=12", "probes.pairs_of={{}}", "probes.names=[niah_single_1,text]",
             "probes.min_gap_logits=1e-6", "probes.min_gap_nats=1e-6", "probes.length=128",
             "scorers.path_patching.max_rounds=1"],
    training=["strategy.tensor_model_parallel_size=1", "trainer.max_steps=2"],
)
"""
    file, log = tmp_path / "program.py", tmp_path / "printed.log"
    file.write_text(program)
    monkeypatch.chdir(ROOT)
    assert forks.start([str(file)], dict(os.environ), log).wait() == 0, log.read_text()[-4000:]
    assert "stage3_long_context" in (tmp_path / "run/report.html").read_text(encoding="utf-8")
    results = generated_results(tmp_path / "run")
    assert list(results) == ["teacher", "trained", "untrained"]
    plans = [model["plan"] for model in results.values()]
    assert plans[0] is None and plans[1] == plans[2] and isinstance(plans[1], list)
    stored = checkpoint.read_metadata(tmp_path / "run/stage3_long_context/hybrid")["config"]
    assert stored["qk_layernorm"] == FAMILIES[family].fields["qk_layernorm"]
    assert stored["add_qkv_bias"] == FAMILIES[family].fields["add_qkv_bias"]
    assert stored["rope_original_length"] == (32 if family == "llama" else 8192)
