"""An exported hybrid becomes a checkpoint again, bit by bit, or is refused in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from hydra_tools import cli  # noqa: E402
from kit.exported import megatron_logits  # noqa: E402
from kit.kills import kill_at  # noqa: E402
from kit.tiny_models import PLAN_OF_KINDS, write_models  # noqa: E402
from kit.tiny_qwen3 import edit_config  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from megatron_hydra.parallel import initialize_model_parallel  # noqa: E402
from megatron_hydra.teachers.checkpoint import load_checkpoint  # noqa: E402


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Checkpoints `teacher` and `hybrid`, and `hf`, exported in several files."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, PLAN_OF_KINDS)
    export = ["export", "--model", f"{folder}/hybrid", "--out", f"{folder}/hf"]
    assert cli.main([*export, "--max-shard-gb", "3e-5"]) == 0
    return folder


def _load(folder: Path):
    initialize_model_parallel()
    return load_checkpoint(folder)


def test_there_and_back_and_there_again(models, tmp_path):
    assert cli.main(["convert", "--hybrid", f"{models}/hf", "--out", f"{tmp_path}/back"]) == 0
    first, second = _load(models / "hybrid"), _load(tmp_path / "back")
    theirs = dict(second.model.named_parameters())
    for name, parameter in first.model.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
    assert first.plan == second.plan
    for key in ("config", "teacher_config_hash", "teacher_weights_hash"):
        assert first.meta[key] == second.meta[key]
    assert second.meta["provenance"]["exported_from"] == first.meta["provenance"]
    export = ["export", "--model", f"{tmp_path}/back", "--out", f"{tmp_path}/again"]
    assert cli.main([*export, "--max-shard-gb", "3e-5"]) == 0
    files = sorted(path.name for path in (models / "hf").glob("*.safetensors"))
    assert len(files) > 3
    for name in [*files, "config.json", "model.safetensors.index.json", "tokenizer.json"]:
        assert (models / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_killed_way_back_goes_on_in_the_same_number_format_alone(models, tmp_path, capsys):
    shutil.copytree(models / "hf", tmp_path / "hf")
    command = ["convert", "--hybrid", f"{tmp_path}/hf", "--out", f"{tmp_path}/back"]
    kill_at("part_0002", command, tmp_path)
    edit_config(tmp_path / "hf", dtype="bfloat16")
    assert cli.main(command) == 2
    assert "holds an unfinished conversion with another dtype" in capsys.readouterr().err
    edit_config(tmp_path / "hf", dtype="float32")
    assert cli.main(command) == 0
    theirs = dict(_load(tmp_path / "back").model.named_parameters())
    for name, parameter in _load(models / "hybrid").model.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


def test_what_transformers_has_trained_comes_back(models, tmp_path):
    """In another number format, and saved by transformers, under its own shards."""
    model = AutoModelForCausalLM.from_pretrained(models / "hf", trust_remote_code=True)
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    before = model(tokens).logits
    model(tokens, labels=tokens).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * parameter.grad
    shutil.copytree(models / "hf", tmp_path / "hf")
    for path in (tmp_path / "hf").glob("model*"):
        path.unlink()
    model.save_pretrained(tmp_path / "hf")
    assert cli.main(["convert", "--hybrid", f"{tmp_path}/hf", "--out", f"{tmp_path}/back"]) == 0
    logits = megatron_logits(_load(tmp_path / "back").model.eval(), tokens)
    expected = model(tokens).logits
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_comes_back_as_bfloat16(models, tmp_path):
    export = ["export", "--model", f"{models}/hybrid", "--out", f"{tmp_path}/hf"]
    assert cli.main([*export, "--dtype", "bfloat16"]) == 0
    assert cli.main(["convert", "--hybrid", f"{tmp_path}/hf", "--out", f"{tmp_path}/back"]) == 0
    full, back = _load(models / "hybrid").model, _load(tmp_path / "back").model
    for (name, parameter), theirs in zip(full.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(parameter.to(theirs.dtype), theirs), name


def _without_a_tensor(folder: Path, **changes: torch.Tensor) -> None:
    path = sorted(folder.glob("*.safetensors"))[-1]
    tensors = {**load_file(path), **changes}
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def _with(name: str, tensor: torch.Tensor):
    def change(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[-1]
        save_file({**load_file(path), name: tensor}, path, metadata={"format": "pt"})

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_without_a_tensor, "lacks tensor model.norm.weight"),
        (_with("model.norm.bias", torch.ones(2)), "has tensor model.norm.bias, which the model"),
        (_with("model.norm.weight", torch.ones(2)), "has shape (2,); config.json asks for (32,)"),
        (_with("model.norm.weight", torch.full((32,), torch.nan)), "NaN or infinite"),
        (lambda folder: edit_config(folder, fusion="norm"), "has fusion 'norm', but plan.json"),
        (lambda folder: edit_config(folder, model_type="qwen3"), "is no hybrid that `export`"),
        (lambda folder: edit_config(folder, dtype="float16"), "has dtype 'float16'; allowed"),
        (lambda folder: (folder / "plan.json").unlink(), "cannot read"),
        (lambda folder: (folder / "checkpoint.json").write_text("{"), "is not valid JSON"),
        (
            lambda folder: PLAN_OF_KINDS.resolved("kda").save(folder / "plan.json", True),
            "has head_kinds [['gated_delta_net'",
        ),
    ],
)
def test_a_folder_that_does_not_hold_together(models, tmp_path, capsys, change, sentence):
    shutil.copytree(models / "hf", tmp_path / "hf")
    change(tmp_path / "hf")
    assert cli.main(["convert", "--hybrid", f"{tmp_path}/hf", "--out", f"{tmp_path}/out"]) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--hybrid", "{}/hybrid"], "is a checkpoint folder already"),
        (["--hybrid", "{}/hf", "model.fusion=norm"], "give --hybrid alone"),
        (["--hybrid", "{}/hf", "--plan", "{}/plan.json"], "give --hybrid alone"),
    ],
)
def test_bad_arguments(models, tmp_path, capsys, arguments, sentence):
    given = [text.format(models) for text in arguments]
    assert cli.main(["convert", *given, "--out", f"{tmp_path}/out"]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_folder_keeps_the_checkpoints_own_file(models):
    kept = json.loads((models / "hf/checkpoint.json").read_text("utf-8"))
    assert kept == json.loads((models / "hybrid/model.json").read_text("utf-8"))
