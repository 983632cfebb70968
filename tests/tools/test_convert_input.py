"""``convert`` given bad places and damaged folders: one sentence, and nothing is lost."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra_tools import cli
from kit.tiny_qwen3 import write_tiny_qwen3

from megatron_hydra import disk
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.teachers.model_folder import weights_hash


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder with a teacher, a plan and a folder of the user's own."""
    write_tiny_qwen3(tmp_path / "teacher")
    HeadPlan.from_fa_heads({0: [1], 1: [2, 3]}, 2, 4, 2).save(tmp_path / "plan.json")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("years of work")
    (tmp_path / "text.txt").write_text("the quick brown fox " * 2000)
    return tmp_path


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _refused(inputs: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one sentence of a refused command, which has changed nothing."""
    before = _contents(inputs)
    assert cli.main(["convert", "--overwrite", *words]) == 2
    assert _contents(inputs) == before
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.strip())
    return line.removeprefix("megatron-hydra: error: ")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("thesis", "thesis holds something else: it has no model.json; not replaced"),
        ("teacher", "teacher would replace the input"),
        ("thesis/../teacher", "teacher would replace the input"),
        (".", "would replace the input"),
        ("plan.json", "plan.json would replace the input"),
        ("text.txt", "text.txt would replace the input"),
        ("teacher/config.json", "config.json lies in the input"),
    ],
)
def test_overwrite_replaces_nothing_but_an_earlier_checkpoint(
    inputs: Path, capsys: pytest.CaptureFixture[str], out: str, message: str
) -> None:
    message_found = _refused(
        inputs, capsys, "--teacher", f"{inputs}/teacher", "--plan", f"{inputs}/plan.json",
        "--calibration-text", f"{inputs}/text.txt", "--out", f"{inputs}/{out}",
    )  # fmt: skip
    assert message in message_found


def test_an_earlier_checkpoint_is_replaced(inputs: Path) -> None:
    words = ["convert", "--teacher", f"{inputs}/teacher", "--out", f"{inputs}/out"]
    assert cli.main(words) == 0
    assert cli.main(words) == 2
    plan = ["--plan", f"{inputs}/plan.json", "--calibration-tokens", "256", "--overwrite"]
    assert cli.main([*words, *plan]) == 0
    assert json.loads((inputs / "out/model.json").read_text())["kind"] == "hybrid"
    (inputs / "empty").mkdir()
    assert cli.main([*words[:-1], f"{inputs}/empty", "--overwrite"]) == 0


def test_without_calibration_every_scale_starts_at_1(
    inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_hydra.teachers.checkpoint import load_checkpoint

    words = ["convert", "--teacher", f"{inputs}/teacher", "--out", f"{inputs}/out", "--overwrite"]
    for tokens, is_measured in (("0", False), ("256", True)):
        plan = ["--plan", f"{inputs}/plan.json", "--calibration-tokens", tokens]
        assert cli.main([*words, *plan]) == 0
        assert ("scales of the heads: on 256 tokens" in capsys.readouterr().out) == is_measured
        layers = load_checkpoint(inputs / "out").model.decoder.layers
        fusions = [layer.self_attention.fusion for layer in layers]
        scales = [x for fusion in fusions for x in fusion.head_scale.tolist()]
        assert ({*scales} == {1.0}) != is_measured
    assert cli.main([*words, *plan[:-1], "-1"]) == 2
    assert "the number of calibration tokens is -1; it must be 0" in capsys.readouterr().err


def test_what_is_not_reused_starts_at_random(
    inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_hydra.teachers.checkpoint import load_checkpoint

    words = ["convert", "--teacher", f"{inputs}/teacher", "--out", f"{inputs}/out", "--overwrite"]
    found = {}
    for reuse in ("all", "no_attention", "nothing"):
        assert cli.main([*words, "--plan", f"{inputs}/plan.json", *MORE[1:], "--reuse", reuse]) == 0
        parameters = load_checkpoint(inputs / "out").model.named_parameters()
        found[reuse] = {name: value.detach().clone() for name, value in parameters}
    for name, value in found["all"].items():
        is_attention, drawn = ".self_attention." in name, found["nothing"][name]
        assert (found["no_attention"][name] != (drawn if is_attention else value)).sum() == 0, name
        if name.endswith((".in_proj.weight", "linear_proj.weight", "linear_fc1.weight")):
            # The teacher's are drawn ten times as large.
            assert 0.01 < float(drawn.std()) < 0.03 < 0.1 < float(value.std()), name
    assert cli.main([*words, "--reuse", "nothing"]) == 2
    assert "reuse is nothing, but without a plan the teacher itself is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": "yarn"}, "config.json has rope_scaling 'yarn'; it must be an object"),
        ({"layer_types": 5}, "config.json has layer_types 5; it must be a list or null"),
        ({"rms_norm_eps": float("nan")}, "config.json: NaN is no number of JSON"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' in rope_parameters; only"),
    ],
)
def test_a_damaged_config_is_named(
    inputs: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    path = inputs / "teacher/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    words = ["--teacher", f"{inputs}/teacher", "--out", f"{inputs}/out"]
    assert message in _refused(inputs, capsys, *words)


def _remove(*names: str) -> Callable[[Path], None]:
    def remove(inputs: Path) -> None:
        for name in names:
            path = inputs / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def _to_checkpoint(inputs: Path) -> None:
    (inputs / "teacher/model.json").write_text("{}")


BAD_INPUTS = {
    "folder": (_remove("teacher"), "model folder IN/teacher does not exist"),
    "config": (
        _remove("teacher/config.json"),
        "IN/teacher is neither a checkpoint folder (model.json)",
    ),
    "weights": (
        _remove("teacher/model.safetensors"),
        "weight file IN/teacher/model.safetensors does not exist",
    ),
    "tokenizer": (
        _remove("teacher/tokenizer.json"),
        "IN/teacher has no tokenizer: tokenizer.json is missing",
    ),
    "plan": (_remove("plan.json"), "cannot read IN/plan.json: No such file"),
    "kind": (
        _to_checkpoint,
        "the teacher IN/teacher is a checkpoint folder: it is converted already",
    ),
}


@pytest.mark.parametrize(
    ("verb", "kind"),
    [("convert", kind) for kind in BAD_INPUTS]
    + [
        (verb, kind)
        for verb in ("score", "evaluate")
        for kind in ("folder", "config", "weights", "tokenizer")
    ],
)
def test_bad_folders_are_said_before_pytorch_is_imported(
    inputs: Path, verb: str, kind: str
) -> None:
    """PyTorch, Megatron and transformers take seconds to import, tens of them on some clusters."""
    spoil, message = BAD_INPUTS[kind]
    spoil(inputs)
    option = {"evaluate": ["--model", "a="]}.get(verb, ["--teacher", ""])
    words = [verb, option[0], f"{option[1]}{inputs}/teacher", "--out", f"{inputs}/out"]
    words += ["--plan", f"{inputs}/plan.json"] if verb == "convert" else []
    program = (
        "import sys\nfrom hydra_tools import cli\n"
        f"code = cli.main({words!r})\n"
        "print(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert message.replace("IN", str(inputs)) in done.stderr
    assert (done.returncode, done.stdout.split()) == (2, ["[]"])


def test_a_plan_of_other_weights_is_warned_of(
    inputs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A fine-tune may take over its base's plan, but hears of it."""

    def convert(weights: str | None) -> list[str]:
        provenance = {} if weights is None else {"teacher_weights_hash": weights}
        plan = HeadPlan.from_fa_heads({0: [1], 1: [2, 3]}, 2, 4, 2, provenance=provenance)
        plan.save(inputs / "plan.json", overwrite=True)
        words = ["--teacher", f"{inputs}/teacher", "--plan", f"{inputs}/plan.json"]
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert cli.main(["convert", *words, "--out", f"{inputs}/out", *MORE]) == 0
        return [text for text in caplog.messages if "scores of other weights" in text]

    (warning,) = convert("feed" * 16)
    assert "plan.json was made from scores of other weights than those in" in warning
    for known in (weights_hash(inputs / "teacher"), "", None):
        assert convert(known) == []


MORE = ["--overwrite", "--calibration-tokens", "256"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("la_conv_kernel_size=0", "la_conv_kernel_size is 0; it must be 1 or more"),
        ("la_conv_kernel_size=-1", "la_conv_kernel_size is -1"),
        ("fa_query_scale_base=0.5", "fa_query_scale_base is 0.5; it must be above 1"),
        ("seq_length=-3", "seq_length is -3; it must be 1 or more"),
        ("seq_length=0", "seq_length is 0"),
        ("fa_query_scale_start=-600", "fa_query_scale_start is -600"),
    ],
)
@pytest.mark.parametrize("kind", ["teacher", "hybrid"])
def test_model_options_out_of_range_are_named(
    inputs: Path, capsys: pytest.CaptureFixture[str], option: str, message: str, kind: str
) -> None:
    if kind == "teacher" and not option.startswith("seq_length"):
        message = "a teacher checkpoint does not store"
    words = ["--teacher", f"{inputs}/teacher", "--out", f"{inputs}/out", option]
    words += ["--plan", f"{inputs}/plan.json"] if kind == "hybrid" else []
    assert message in _refused(inputs, capsys, *words)


def test_nan_is_no_number_of_a_model_option(
    inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--teacher", f"{inputs}/teacher", "--out", f"{inputs}/out"]
    message = _refused(inputs, capsys, *words, "fa_query_scale_base=NaN")
    assert message == "fa_query_scale_base is 'NaN'; it must be a float"


def test_a_disk_without_room_is_said_before_the_weights_are_read(
    inputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    (inputs / "teacher" / "model.safetensors").write_bytes(b"not looked at")
    message = _refused(inputs, capsys, "--teacher", f"{inputs}/teacher", "--out", f"{inputs}/new")
    assert re.search(r"new needs [\d.]+ KiB, and .* has 1000 bytes free", message)


def test_a_token_without_a_row_in_the_embedding_is_said_by_every_verb(
    inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens added without a resize end a run midway, on a GPU without a word of the reason."""
    small = str(write_tiny_qwen3(inputs / "small", vocab_size=256))
    plan, text = str(inputs / "plan.json"), str(inputs / "text.txt")
    for verb in (
        ["convert", "--teacher", small, "--plan", plan],
        ["convert", "--teacher", small],
        ["score", "--teacher", small, f"probes.text={text}", "probes.length=64"],
        ["evaluate", "--model", f"small={small}", "--text", text, "--lengths", "128",
         "--num-samples", "5", "--perplexity-tokens", "128"],
    ):  # fmt: skip
        assert cli.main([*verb, "--out", str(inputs / "out")]) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert re.search(
            r"the tokenizer of .* has a token '.*' of id 256, but the model's embedding has "
            r"256 rows: .* resize_token_embeddings",
            line,
        )
    assert not (inputs / "out").exists()
