"""A conversion goes by parts: what it ends with when it is killed, and what the parts are together.

Catches: a part that is lost or written twice, random numbers that depend on what was done before,
parts of another model, weights of a layer under another one's name.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_hydra import cpu

cpu.install_if_needed()

from hydra_tools import cli  # noqa: E402
from kit.kills import kill_at  # noqa: E402
from kit.tiny_qwen3 import edit_config, write_tiny_qwen3  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_hydra import disk  # noqa: E402
from megatron_hydra.head_plan import HeadPlan  # noqa: E402
from megatron_hydra.teachers import calibration, conversion, converted, loading  # noqa: E402
from megatron_hydra.teachers.checkpoint import load_checkpoint  # noqa: E402
from megatron_hydra.teachers.converted import Converted  # noqa: E402
from megatron_hydra.teachers.unfinished_checkpoint import parts_of  # noqa: E402
from megatron_hydra.teachers.weight_reuse import reuse_teacher_weights  # noqa: E402
from megatron_hydra.teachers.weights import TeacherWeights, read_weights  # noqa: E402

FA_HEADS: dict[int, list[int]] = {0: [1], 1: [], 2: [0, 1, 3]}
PLACES = ["measured.safetensors", "part_0001", "part_0004", "model.json", "__2_0.distcp", "hybrid"]
"""What is about to be written, or moved to its place, when the kill comes."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a plan, and `hybrid`, converted undisturbed."""
    folder = tmp_path_factory.mktemp("inputs")
    write_tiny_qwen3(folder / "teacher", num_hidden_layers=3, tie_word_embeddings=False)
    HeadPlan.from_fa_heads(FA_HEADS, 3, 4, 2).save(folder / "plan.json")
    (folder / "text.txt").write_text("the quick brown fox " * 2000)
    assert cli.main([*_convert(folder), f"{folder}/hybrid"]) == 0
    return folder


def _convert(inputs: Path) -> list[str]:
    return [
        "convert", "--teacher", f"{inputs}/teacher", "--plan", f"{inputs}/plan.json",
        "--calibration-text", f"{inputs}/text.txt", "--calibration-tokens", "256",
        "--calibrate-recurrence", "--out",
    ]  # fmt: skip


def _tensors(folder: Path) -> dict[str, Tensor]:
    return dict(load_checkpoint(folder).model.named_parameters())


def _same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_conversion_goes_on(
    inputs: Path,
    tmp_path: Path,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [*_convert(inputs), f"{tmp_path}/hybrid"]
    kill_at(place, command, tmp_path)
    assert not (tmp_path / "hybrid").exists() and (tmp_path / "hybrid.partial").is_dir()
    built: list[int] = []
    measured: list[int] = []

    def count(*arguments: object, **options: object) -> object:
        built.append(arguments[2])  # type: ignore[arg-type]
        return build(*arguments, **options)  # type: ignore[arg-type]

    def measure(*arguments: object, **options: object) -> object:
        measured.append(1)
        return calibration.measure_heads(*arguments, **options)  # type: ignore[arg-type]

    build = converted.build_layer
    monkeypatch.setattr(converted, "build_layer", count)
    monkeypatch.setattr(converted, "measure_heads", measure)
    assert cli.main(command) == 0
    output = capsys.readouterr().out
    # Moved files are made anew: from here on a second kill could leave half of them.
    left = {"part_0004": [], "model.json": []}
    assert built == left.get(place, [0, 1, 2])
    assert bool(measured) == (place == "measured.safetensors")
    assert _same(_tensors(tmp_path / "hybrid"), _tensors(inputs / "hybrid"))
    assert not (tmp_path / "hybrid.partial").exists()
    total = sum(x.numel() for x in _tensors(inputs / "hybrid").values())
    counts = [line.split()[0] for line in output.splitlines() if line.startswith(" ")]
    padding = _padding(inputs / "hybrid")
    assert sum(int(count.replace(",", "")) for count in counts) + padding == total


def _padding(folder: Path) -> int:
    attentions = [layer.self_attention for layer in load_checkpoint(folder).model.decoder.layers]
    return sum(a.in_proj.weight[a.layout.padding_rows].numel() for a in attentions)


def test_another_conversion_is_not_taken_for_the_killed_one(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*_convert(inputs), f"{tmp_path}/hybrid"]
    kill_at("part_0002", command, tmp_path)
    for other, key in (
        (["model.fusion=norm"], "options.fusion"),
        (["--dtype", "bfloat16"], "dtype"),
        (["--teacher", f"{_with_config(inputs, tmp_path, rope_theta=5e5)}"], "config.json of the"),
    ):
        assert cli.main([*command, *other]) == 2
        assert f"an unfinished conversion with another {key}" in capsys.readouterr().err
    assert cli.main([*command, "--dtype", "bfloat16", "--overwrite"]) == 0
    assert {x.dtype for x in _tensors(tmp_path / "hybrid").values()} >= {torch.bfloat16}


def _with_config(inputs: Path, folder: Path, **changes: object) -> Path:
    """A copy of the teacher whose configuration alone is another."""
    teacher = Path(shutil.copytree(inputs / "teacher", folder / "teacher"))
    edit_config(teacher, **changes)
    return teacher


def test_what_a_killed_conversion_has_written_needs_no_room_again(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    kill_at("model.json", [*_convert(inputs), f"{tmp_path}/hybrid"], tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    assert cli.main([*_convert(inputs), f"{tmp_path}/other"]) == 2
    assert "other needs" in capsys.readouterr().err
    assert cli.main([*_convert(inputs), f"{tmp_path}/hybrid"]) == 0
    assert _same(_tensors(tmp_path / "hybrid"), _tensors(inputs / "hybrid"))


def test_a_damaged_tensor_leaves_nothing(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found in the last layer, when all others are written."""
    shutil.copytree(inputs / "teacher", tmp_path / "teacher")
    path = tmp_path / "teacher/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    before = sorted(tmp_path.iterdir())
    command = ["convert", "--teacher", f"{tmp_path}/teacher", "--out", f"{tmp_path}/hybrid"]
    assert cli.main(command) == 2
    assert "model.layers.2.mlp.down_proj.weight" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.usefixtures("one_rank")
def test_parts_are_the_whole(tmp_path: Path, tied: bool) -> None:
    """What comes from the teacher, against a model built whole."""
    folder = write_tiny_qwen3(tmp_path, num_hidden_layers=3, tie_word_embeddings=tied)
    plan = HeadPlan.from_fa_heads(FA_HEADS, 3, 4, 2)
    config = loading.hydra_config(folder)
    whole = loading.build_model(config, plan)
    tensors = conversion.tensors_by_head(config, read_weights(folder))
    summary = reuse_teacher_weights(whole, tensors)
    found: dict[str, Tensor] = {}
    model = Converted(config, plan, TeacherWeights(folder))
    for part in parts_of(config):
        state, _ = model.part(part)
        found |= {name: getattr(value, "data", value) for name, value in state.items()}
    expected = dict(whole.named_parameters())
    assert found.keys() == expected.keys()
    assert summary.new
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        if "in_proj" not in name and not any(new in name for new in ("A_log", "dt_bias", "conv")):
            assert torch.equal(found[name], tensor), name
