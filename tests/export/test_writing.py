"""How the folder is written: whole or not at all, though it is killed.

Catches: a folder cut off by `kill -9` that something takes for a model, another end after it than
without it, work that is done again.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from hydra_tools import cli  # noqa: E402
from kit.kills import kill_at  # noqa: E402
from kit.tiny_models import PLAN_OF_KINDS, write_models  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from megatron_hydra import disk  # noqa: E402
from megatron_hydra.export import exported  # noqa: E402
from megatron_hydra.teachers.distributed_weights import load_layer  # noqa: E402

PLACES = ["model-00002-of-00018.safetensors", "part_0002", "plan.json", "README.md",
          "moved model-00002-of-00018.safetensors",
          "moved model.safetensors.index.json"]  # fmt: skip
"""What is about to be written, or moved to its place, when the kill comes."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Checkpoint `hybrid`, and `hf`, exported of it undisturbed."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, PLAN_OF_KINDS)
    assert cli.main([*_export(folder), f"{folder}/hf"]) == 0
    return folder


def _export(models: Path) -> list[str]:
    return ["export", "--model", f"{models}/hybrid", "--max-shard-gb", "1e-5", "--out"]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_export_is_no_model_and_the_next_ends_as_if_nothing_had_been(
    models, tmp_path, capsys, place, monkeypatch
):
    command = [*_export(models), f"{tmp_path}/hf"]
    kill_at(place, command, tmp_path)
    left = sorted(tmp_path.iterdir())
    # By names that nothing could stumble over.
    assert [path.name for path in left][-1] == "hf.partial" and len(left) <= 2
    for number, path in enumerate(left):
        assert re.fullmatch(r"hf\.partial|\.hf\.\d+\.partial", path.name)
        shutil.copytree(path, tmp_path / f"copy{number}")
        # Without a config.json transformers may take a word in the folder's path for a model's.
        with pytest.raises((OSError, ValueError), match="no file named|Unrecognized"):
            AutoModelForCausalLM.from_pretrained(tmp_path / f"copy{number}", trust_remote_code=True)
        back = ["convert", "--hybrid", f"{tmp_path}/copy{number}", "--out", f"{tmp_path}/back"]
        assert cli.main(back) == 2 and not (tmp_path / "back").exists()
    loaded: list[int] = []
    monkeypatch.setattr(exported, "load_layer", lambda *x: [loaded.append(x[1]), load_layer(*x)])
    assert cli.main(command) == 0
    assert _files(tmp_path / "hf") == _files(models / "hf")
    assert not (tmp_path / "hf.partial").exists()
    done = {"part_0002": [1], "plan.json": [], "README.md": []}
    assert loaded == done.get(place, [0, 1]), "what was finished is not done again"
    capsys.readouterr()
    assert cli.main(command) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.endswith(f"output {tmp_path}/hf exists: name another, or pass --overwrite")
    assert _files(tmp_path / "hf") == _files(models / "hf")


def test_another_export_does_not_go_on_with_what_a_killed_one_left(models, tmp_path, capsys):
    command = [*_export(models), f"{tmp_path}/hf"]
    kill_at("part_0002", command, tmp_path)
    assert cli.main([*command, "--dtype", "bfloat16"]) == 2
    assert "holds an unfinished export with another dtype" in capsys.readouterr().err
    assert cli.main([*command, "--dtype", "bfloat16", "--overwrite"]) == 0
    assert not (tmp_path / "hf.partial").exists()


def test_what_a_killed_export_has_written_needs_no_room_again(
    models, tmp_path, monkeypatch, capsys
):
    kill_at("part_0002", [*_export(models), f"{tmp_path}/hf"], tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    assert cli.main([*_export(models), f"{tmp_path}/other"]) == 2
    assert "other needs" in capsys.readouterr().err
    assert cli.main([*_export(models), f"{tmp_path}/hf"]) == 0
    assert _files(tmp_path / "hf") == _files(models / "hf")


@pytest.mark.parametrize("place", ["part_0002", "hf"])
def test_a_killed_export_over_an_earlier_one_leaves_that_whole(models, tmp_path, place):
    """`hf`: when the earlier folder has been put aside, and the new one is not in its place yet."""
    assert cli.main([*_export(models), f"{tmp_path}/hf", "--dtype", "bfloat16"]) == 0
    earlier = _files(tmp_path / "hf")
    command = [*_export(models), f"{tmp_path}/hf", "--overwrite"]
    kill_at(place, command, tmp_path)
    (old,) = tmp_path.glob(".hf.*.old") if place == "hf" else [tmp_path / "hf"]
    assert _files(old) == earlier != _files(models / "hf")
    assert (tmp_path / "hf").exists() == (place != "hf")
    assert cli.main(command) == 0
    assert _files(tmp_path / "hf") == _files(models / "hf")
