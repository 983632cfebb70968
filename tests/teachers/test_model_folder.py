"""Model folders: which weight files are read, as transformers chooses, and their hash."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra_tools import cli
from kit.tiny_qwen3 import write_tiny_qwen3
from safetensors.torch import load_file, save_file

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.teachers.checkpoint import load_any_model, read_metadata
from megatron_hydra.teachers.model_folder import weights_hash

pytestmark = pytest.mark.usefixtures("one_rank")


def _write(folder: Path, **fields: Any) -> Path:
    return write_tiny_qwen3(folder, **fields)


def _change_one_value(file: Path) -> None:
    """As a training step would leave it: same names, shapes, size and time, another number."""
    before, tensors = file.stat(), load_file(file)
    next(iter(tensors.values())).view(-1)[-1] += 1
    save_file(tensors, file, {"format": "pt"})
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_hash_tells_two_trainings_of_one_shape_apart(tmp_path: Path) -> None:
    first = _write(tmp_path / "first")
    copy = Path(shutil.copytree(first, tmp_path / "copy"))
    (copy / "README.md").write_text("a file that is no weight")
    (copy / "config.json").write_text((first / "config.json").read_text() + "\n")
    assert weights_hash(first) == weights_hash(copy)
    _change_one_value(copy / "model.safetensors")
    assert weights_hash(first) != weights_hash(copy)
    sharded = _write(tmp_path / "sharded", max_shard_size="20KB")
    before = weights_hash(sharded)
    _change_one_value(sorted(sharded.glob("model-*.safetensors"))[-1])
    assert weights_hash(sharded) != before


def test_hash_covers_the_files_that_are_read_and_no_others(tmp_path: Path) -> None:
    folder = _write(tmp_path / "teacher")
    before = weights_hash(folder)
    shards = _write(tmp_path / "older", seed=1, max_shard_size="20KB")
    for file in shards.glob("model*"):
        shutil.copy(file, folder)
    assert weights_hash(folder) == before
    (folder / "model.safetensors").unlink()
    assert weights_hash(folder) == weights_hash(shards) != before


def test_checkpoint_folders_know_the_weights_they_were_converted_from(tmp_path: Path) -> None:
    source, plan = _write(tmp_path / "qwen3"), tmp_path / "plan.json"
    HeadPlan.from_fa_heads({0: [1], 1: [0, 3]}, 2, 4, 2).save(plan)
    convert = ["convert", "--teacher", str(source), "--out"]
    assert cli.main([*convert, f"{tmp_path}/teacher", "--dtype", "bfloat16"]) == 0
    options = ["--plan", str(plan), "--calibration-tokens", "256"]
    assert cli.main([*convert, f"{tmp_path}/hybrid", *options]) == 0
    for name in ("teacher", "hybrid"):
        meta = read_metadata(tmp_path / name)
        assert meta["teacher_weights_hash"] == weights_hash(source) != ""
        assert load_any_model(tmp_path / name).meta == meta
    assert load_any_model(source).meta["teacher_weights_hash"] == weights_hash(source)
    # Of the folder itself: a training changes it in place.
    own = weights_hash(tmp_path / "teacher")
    file = next((tmp_path / "teacher/weights").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert weights_hash(tmp_path / "teacher") != own


def test_folders_of_earlier_releases_still_load(tmp_path: Path) -> None:
    source = _write(tmp_path / "qwen3")
    assert cli.main(["convert", "--teacher", str(source), "--out", f"{tmp_path}/teacher"]) == 0
    path = tmp_path / "teacher/model.json"
    meta = json.loads(path.read_text())
    del meta["teacher_weights_hash"]
    path.write_text(json.dumps(meta))
    assert load_any_model(tmp_path / "teacher").meta["teacher_weights_hash"] == ""
    path.write_text(json.dumps({**meta, "teacher_weights_hash": 5}))
    with pytest.raises(UserError, match="teacher_weights_hash is 5; text is needed"):
        read_metadata(tmp_path / "teacher")


def test_a_folder_without_weights_has_no_hash(tmp_path: Path) -> None:
    for name in ("config.json", "model.json"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(UserError, match="model.safetensors does not exist|no complete weights"):
            weights_hash(tmp_path)
    with pytest.raises(UserError, match="model folder .* does not exist"):
        weights_hash(tmp_path / "nothing")
