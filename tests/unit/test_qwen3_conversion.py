"""Hugging Face Qwen3 folders: same logits as transformers, and every refusal in one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hydra import cpu

cpu.install_if_needed()

from megatron_hydra.conversion import qwen3  # noqa: E402
from megatron_hydra.errors import UserError  # noqa: E402
from megatron_hydra.parallel import initialize_model_parallel  # noqa: E402
from megatron_hydra.testing.tiny_qwen3 import write_tiny_qwen3  # noqa: E402


@pytest.fixture(autouse=True)
def _single_rank() -> None:
    initialize_model_parallel()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_qwen3(tmp_path / "teacher")


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "REMOVE"}))


@torch.no_grad()
def _logits_difference(folder: Path) -> float:
    from transformers import Qwen3ForCausalLM

    tokens = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    model = qwen3.load_teacher(folder).eval()
    logits = model(tokens, torch.arange(40).expand(2, -1), None)
    assert expected.std() > 0.5, "logits too small for the comparison to mean something"
    return (logits - expected).abs().max().item()


@pytest.mark.parametrize(
    "fields",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False, "rope_theta": 1e6, "rms_norm_eps": 1e-3},
        {"num_key_value_heads": 1, "head_dim": 8},
        {"num_key_value_heads": 4, "dtype": torch.bfloat16},
        {"max_shard_size": "20KB", "tie_word_embeddings": False},
    ],
    ids=["tied", "untied", "one-group", "bfloat16-no-gqa", "sharded"],
)
def test_teacher_has_the_logits_of_transformers(tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = write_tiny_qwen3(tmp_path / "teacher", **fields)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == ("max_shard_size" in fields)
    assert _logits_difference(folder) < 1e-4


def test_tied_folder_may_carry_a_copy_of_the_embedding(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert _logits_difference(folder) < 1e-4


def test_config_of_transformers_5_reads_the_same(folder: Path) -> None:
    _edit_config(folder, rope_theta=5e5, rope_scaling=None)
    before = qwen3.read_qwen3_config(folder)
    _edit_config(
        folder, rope_theta="REMOVE", rope_parameters={"rope_theta": 5e5, "rope_type": "default"}
    )
    assert qwen3.read_qwen3_config(folder) == before
    assert before["rope_theta"] == 5e5


def test_left_out_fields_have_the_defaults_of_transformers(folder: Path) -> None:
    from transformers import Qwen3Config

    optional = ("head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings",
                "max_position_embeddings")  # fmt: skip
    _edit_config(folder, **dict.fromkeys(optional, "REMOVE"))
    found = qwen3.read_qwen3_config(folder)
    expected = Qwen3Config()
    assert {name: found[name] for name in optional} == {
        name: getattr(expected, name) for name in optional
    }


def test_hash_follows_the_shape_alone(tmp_path: Path) -> None:
    base = qwen3.config_hash(write_tiny_qwen3(tmp_path / "a"))
    trained = write_tiny_qwen3(tmp_path / "b", seed=1, max_position_embeddings=64)
    wider = write_tiny_qwen3(tmp_path / "c", intermediate_size=64)
    assert qwen3.config_hash(trained) == base
    assert qwen3.config_hash(wider) != base
    assert qwen3.teacher_hash(qwen3.hydra_config(trained, fusion="norm", seq_length=8)) == base
    _edit_config(trained, rope_theta=10000)  # a whole number in place of 10000.0
    assert qwen3.config_hash(trained) == base


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "architectures"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_scaling 'yarn'"),
        ({"rope_scaling": "yarn"}, "rope_scaling 'yarn'; it must be an object or null"),
        ({"rope_parameters": [1]}, r"rope_parameters \[1\]; it must be an object or null"),
        ({"rope_theta": "REMOVE", "rope_parameters": {"rope_theta": "x"}}, "rope_theta 'x'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"layer_types": 5}, "layer_types 5; it must be a list or null"),
        ({"layer_types": [["full_attention"]]}, "sliding-window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps nan; it must be a finite number > 0"),
        ({"rms_norm_eps": True}, "rms_norm_eps True"),
        ({"rope_theta": math.inf}, "rope_theta inf"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings 'yes'; it must be true or false"),
        ({"hidden_size": "REMOVE"}, "no 'hidden_size'"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers 2.5"),
        ({"num_key_value_heads": 3}, "not a multiple of 3"),
    ],
)
def test_unsupported_configs_are_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    _edit_config(folder, **changes)
    with pytest.raises(UserError, match=message):
        qwen3.read_qwen3_config(folder)


def test_missing_folder_and_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        qwen3.read_qwen3_config(tmp_path / "nothing")
    with pytest.raises(UserError, match="has no config.json"):
        qwen3.read_qwen3_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        qwen3.read_qwen3_config(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"fa_ropee": True}, "unknown model option fa_ropee; did you mean fa_rope"),
        ({"num_layers": 3}, "given by the teacher"),
        ({"fa_rope": "yes"}, "fa_rope is 'yes'; it must be a bool"),
        ({"seq_length": True}, "must be a int"),
        ({"fusion": "sum"}, "fusion is 'sum'; allowed"),
        ({"seq_length": -3}, "seq_length is -3; it must be a whole number from 1 on"),
    ],
)
def test_bad_overrides_are_named(folder: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        qwen3.hydra_config(folder, **overrides)


NORM = "model.layers.1.self_attn.q_norm.weight"


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _truncate_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50])


def _rewrite(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return rewrite


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_truncate, "truncated"),
        (_truncate_header, "truncated"),
        (lambda folder: (folder / "model.safetensors").unlink(), "does not exist"),
        (_rewrite(lambda tensors: tensors.pop(NORM)), f"lacks tensor {NORM}"),
        (_rewrite(lambda t: t.update({"model.extra": torch.ones(1)})), "has tensor model.extra"),
        (_rewrite(lambda t: t.update({NORM: torch.ones(3)})), r"shape \(3,\).*asks for \(16,\)"),
        (_rewrite(lambda t: t.update({NORM: t[NORM].double()})), "dtype F64; allowed: F32, BF16"),
    ],
    ids=["data", "header", "file", "missing", "unknown", "shape", "dtype"],
)
def test_bad_weights_are_named(folder: Path, spoil: Callable, message: str) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=message):
        qwen3.read_weights(folder)


def test_bad_shards_are_named(tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path / "teacher", max_shard_size="20KB")
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    kept = first.read_bytes()
    first.unlink()
    with pytest.raises(UserError, match=f"{first.name} does not exist"):
        qwen3.read_weights(folder)
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match="is in both"):
        qwen3.read_weights(folder)
    first.write_bytes(kept)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="weight map"):
        qwen3.read_weights(folder)


def test_tokenizer_loads_and_its_absence_is_named(folder: Path, tmp_path: Path) -> None:
    tokenizer = qwen3.load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("fünf 5\n")) == "fünf 5\n"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        qwen3.load_tokenizer(tmp_path / "empty")
