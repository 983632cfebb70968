"""Weights of Hugging Face Qwen3 folders: transformers' logits, or a refusal in one sentence."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hydra import cpu

cpu.install_if_needed()

from kit.tiny_qwen3 import (  # noqa: E402
    edit_config,
    logits_difference,
    write_tiny_qwen3,
)

from megatron_hydra.errors import UserError  # noqa: E402
from megatron_hydra.teachers import config_json, conversion, loading, weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_qwen3(tmp_path / "teacher")


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
    assert logits_difference(folder) < 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_names_and_shapes_are_read_in_both_directions(tmp_path: Path, tied: bool) -> None:
    """Bit for bit, at unequal numbers of heads and groups."""
    folder = write_tiny_qwen3(
        tmp_path / "teacher", tie_word_embeddings=tied, num_attention_heads=6, head_dim=10
    )
    config, tensors = loading.hydra_config(folder), weights.read_weights(folder)
    of_megatron = conversion.megatron_tensors(config, tensors)
    back = conversion.hugging_face_tensors(config, of_megatron)
    assert back.keys() == tensors.keys() != of_megatron.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_a_single_file_comes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    """A newer save beside the shards of an older one: transformers never opens the index."""
    folder = write_tiny_qwen3(tmp_path / "teacher", seed=1, max_shard_size="20KB")
    older = logits_difference(folder)
    write_tiny_qwen3(tmp_path / "newer", seed=2)
    shutil.copy(tmp_path / "newer/model.safetensors", folder)
    assert older < 1e-4 and logits_difference(folder) < 1e-4
    assert logits_difference(tmp_path / "newer", folder) < 1e-4
    # Nor does a stale index matter, whose shards are gone, nor one that cannot be read.
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()
    assert logits_difference(folder) < 1e-4
    (folder / "model.safetensors.index.json").write_text("[]")
    assert logits_difference(folder) < 1e-4


def test_shards_may_lie_in_a_subfolder(tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path / "teacher", max_shard_size="20KB")
    (folder / "parts").mkdir()
    for shard in folder.glob("model-*.safetensors"):
        shard.rename(folder / "parts" / shard.name)
    _edit_index(folder, lambda name: f"parts/{name}")
    assert logits_difference(folder) < 1e-4


def _edit_index(folder: Path, rename: Callable[[str], Any]) -> None:
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"] = {tensor: rename(name) for tensor, name in data["weight_map"].items()}
    index.write_text(json.dumps(data))


def test_tied_folder_may_carry_a_copy_of_the_embedding(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert logits_difference(folder) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_folder_with_another_output_layer_is_refused(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = write_tiny_qwen3(tmp_path / "teacher", dtype=dtype)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lm_head.weight other than the embedding.*set it to false"):
        weights.read_weights(folder)
    edit_config(folder, tie_word_embeddings=False)  # the way out
    assert torch.equal(weights.read_weights(folder)["lm_head.weight"], tensors["lm_head.weight"])
    assert logits_difference(folder) < 1e-4


def test_hash_follows_the_shape_alone(tmp_path: Path) -> None:
    base = config_json.config_hash(write_tiny_qwen3(tmp_path / "a"))
    trained = write_tiny_qwen3(tmp_path / "b", seed=1, max_position_embeddings=64)
    wider = write_tiny_qwen3(tmp_path / "c", intermediate_size=64)
    assert config_json.config_hash(trained) == base
    assert config_json.config_hash(wider) != base
    assert (
        config_json.teacher_hash(loading.hydra_config(trained, fusion="norm", seq_length=8)) == base
    )
    edit_config(trained, rope_theta=10000)  # a whole number in place of 10000.0
    assert config_json.config_hash(trained) == base


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"fa_ropee": True}, "unknown model option fa_ropee; did you mean fa_rope"),
        ({"num_layers": 3}, "given by the teacher"),
        ({"fa_rope": "yes"}, "fa_rope is 'yes'; it must be a bool"),
        ({"seq_length": True}, "must be a int"),
        ({"fusion": "sum"}, "fusion is 'sum'; allowed"),
        ({"seq_length": -3}, "seq_length is -3; it must be 1 or more"),
    ],
)
def test_bad_overrides_are_named(folder: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        loading.hydra_config(folder, **overrides)


NORM = "model.layers.1.self_attn.q_norm.weight"
EMBEDDING = "model.embed_tokens.weight"


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


def _spoil_values(value: float, dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EMBEDDING] = tensors[EMBEDDING].to(dtype)
        tensors[EMBEDDING][7, 3:6] = value

    return _rewrite(spoil)


def _to_bin(folder: Path) -> None:
    (folder / "training_args.bin").write_text("no weights")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


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
        (_spoil_values(math.nan), f"{EMBEDDING} in .* has 3 of 8,448 values that are NaN or inf"),
        (_spoil_values(-math.inf), f"{EMBEDDING} in .* has 3 of 8,448 values"),
        (_spoil_values(math.nan, torch.bfloat16), f"{EMBEDDING} in .* has 3 of 8,448 values"),
        (_spoil_values(math.inf, torch.float16), f"{EMBEDDING} in .* has 3 of 8,448 values"),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{}"),
            "holds an adapter .adapter_config.json., which is not read: merge it",
        ),
        (_to_bin, "weights as pytorch_model.bin alone.*by save_pretrained.folder, safe_serializ"),
    ],
    ids=[
        "data",
        "header",
        "file",
        "missing",
        "unknown",
        "shape",
        "dtype",
        "nan",
        "inf",
        "nan-bfloat16",
        "inf-float16",
        "adapter",
        "pytorch",
    ],  # fmt: skip
)
def test_bad_weights_are_named(folder: Path, spoil: Callable, message: str) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=message):
        weights.read_weights(folder)


def test_bad_shards_are_named(tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path / "teacher", max_shard_size="20KB")
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    kept = first.read_bytes()
    first.unlink()
    with pytest.raises(UserError, match=f"{first.name} does not exist"):
        weights.read_weights(folder)
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match="is in both"):
        weights.read_weights(folder)
    first.write_bytes(kept)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="weight map"):
        weights.read_weights(folder)


@pytest.mark.parametrize("name", ["../other/{}", "/tmp/{}", 5, "..", "{}/../../{}"])
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: Any) -> None:
    folder = write_tiny_qwen3(tmp_path / "teacher", max_shard_size="20KB")
    shutil.copytree(folder, tmp_path / "other")
    _edit_index(folder, lambda shard: name.replace("{}", shard) if isinstance(name, str) else name)
    with pytest.raises(UserError, match="index.json names .*, which is no file inside"):
        weights.read_weights(folder)


def test_a_tensor_that_the_index_does_not_name_is_refused(tmp_path: Path) -> None:
    """transformers passes over it, and starts that part of the model from random values."""
    folder = write_tiny_qwen3(tmp_path / "teacher", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    del data["weight_map"][NORM]
    index.write_text(json.dumps(data))
    with pytest.raises(UserError, match=f"{NORM} is in .*, but .*index.json does not name it"):
        weights.read_weights(folder)
