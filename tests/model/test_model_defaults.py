"""Defaults of verbs for real models: lengths and text by the model at hand, and said aloud."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_hydra import cpu
from megatron_hydra.errors import UserError

cpu.install_if_needed()

from hydra_tools import evaluate  # noqa: E402
from hydra_tools.cli import main  # noqa: E402
from kit.tiny_qwen3 import write_tiny_qwen3  # noqa: E402

from megatron_hydra.api import evaluate as step  # noqa: E402
from megatron_hydra.evaluation.lengths import (  # noqa: E402
    Reach,
    default_lengths,
    training_length,
)
from megatron_hydra.evaluation.reading import read_evaluation  # noqa: E402
from megatron_hydra.head_plan import HeadPlan  # noqa: E402
from megatron_hydra.parallel import initialize_model_parallel  # noqa: E402
from megatron_hydra.tasks import text  # noqa: E402
from megatron_hydra.teachers.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402

QWEN3 = Reach(40960)  # max_position_embeddings of Qwen3-1.7B


@pytest.mark.parametrize(
    ("models", "trained_on", "most", "lengths", "words"),
    [
        ([QWEN3, Reach(40960, 4096)], 4096, 10**6, (4096, 8192, 16384), "twice, four times"),
        ([QWEN3, Reach(40960, 16384)], 16384, 10**6, (16384, 32768),
         "the training length, twice; no longer, as 40,960 tokens are what the models are built"),
        ([Reach(2048), Reach(4096, 4096)], 4096, 10**6, (4096,), "the training length; no longer"),
        ([QWEN3], 4096, 9000, (4096, 8192), "as 9,000 tokens are what there is text for"),
        ([QWEN3], 4096, 300, (4096,), "the training length; no longer"),
        ([QWEN3], None, 10**6, (2048, 4096, 8192), "up to 8,192 of the 40,960 tokens that"),
        ([Reach(2048), QWEN3], None, 10**6, (512, 1024, 2048), "what the models are built for"),
        ([QWEN3], None, 4000, (1000, 2000, 4000), "up to 4,000 of the 40,960 tokens"),
    ],
)  # fmt: skip
def test_lengths_are_those_that_the_models_were_made_for(
    models: list[Reach], trained_on: int | None, most: int, lengths: tuple[int, ...], words: str
) -> None:
    named = {f"model {index}": reach for index, reach in enumerate(models)}
    found = default_lengths(named, trained_on, most)
    assert found.lengths == lengths
    assert words in found.words


def test_the_training_length_is_the_longest_that_a_folder_names() -> None:
    models = {"teacher": Reach(2048), "short": Reach(2048, 256), "long": Reach(2048, 1024)}
    assert training_length(models) == ((1024,), "1,024 tokens, by the folder of 'long'")
    (length,), words = training_length({"teacher": QWEN3, "untrained": Reach(32768)})
    assert length == 32768 and "what the models are built for" in words


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A float32 teacher built for 1,024 tokens, a float32 hybrid, and one that was trained.

    The last is in bf16, and its folder says that it was trained on 300 tokens per sample. Beside
    each lies `plan.json`.
    """
    folder = tmp_path_factory.mktemp("models")
    teacher = write_tiny_qwen3(folder / "teacher", max_position_embeddings=1024)
    plan, converted = folder / "plan.json", folder / "converted"
    HeadPlan.from_fa_heads({0: [1], 1: [2, 3]}, 2, 4, 2).save(plan)
    command = ["convert", "--teacher", teacher, "--plan", plan, "--out"]
    assert main([str(word) for word in (*command, converted)]) == 0
    half = folder / "half"
    assert main([str(word) for word in (*command, half, "--dtype", "bfloat16")]) == 0
    initialize_model_parallel()
    loaded = load_checkpoint(half)
    trained = folder / "trained"
    save_checkpoint(
        trained, loaded.model, loaded.config, loaded.plan, loaded.tokenizer_folder,
        {"seq_length": 300},
    )  # fmt: skip
    return {"teacher": teacher, "converted": converted, "trained": trained}


def run_evaluate(models: dict[str, Path], names: list[str], out: Path, *more: str) -> Any:
    words = [f"--model={name}={models[name]}" for name in names]
    quick = ["--tasks", "single", "--num-samples", "5", "--overwrite"]
    assert main(["evaluate", *words, *quick, "--out", str(out), *more]) == 0
    return read_evaluation(out)


def test_evaluate_takes_its_lengths_from_the_models_and_says_so(
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = "".join(f"Sentence {i} says that {i * i} is a square. " for i in range(2000))
    monkeypatch.setattr(text, "local_text", lambda: short)
    monkeypatch.setattr(step, "PERPLEXITY_TOKENS", 600)
    out = tmp_path / "out.json"
    with caplog.at_level(logging.WARNING):
        found = run_evaluate(models, ["teacher", "trained"], out)
    assert [length for _, length in found.cells] == [300, 600]
    assert found.training_length == 300
    printed = capsys.readouterr().out
    assert "lengths: 300, 600 tokens (the training length, twice; no longer, as 1,024" in printed
    assert "training length: 300 tokens, by the folder of 'trained'" in printed
    assert "Python's documentation, a stand-in: no text was named (--text)" in printed
    assert found.provenance["text"] == "Python's documentation, a stand-in: no text was named"
    assert "Python's documentation stands in for it: name" in caplog.text
    assert "with --text" in caplog.text
    # What is asked for wins.
    options = ["--lengths", "200,260", "--training-length", "250", "--perplexity-tokens", "260"]
    found = run_evaluate(models, ["teacher", "trained"], out, *options)
    assert [length for _, length in found.cells] == [200, 260] and found.training_length == 250
    # Nothing is known of a training: what the models are built for, whatever a window takes.
    found = run_evaluate(models, ["teacher", "converted"], out)
    assert [length for _, length in found.cells] == [256, 512, 1024]
    assert found.provenance["perplexity_tokens"] >= 1024


def test_one_plan_has_one_cache_whatever_its_weights_are(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = [json.loads((models[n] / "model.json").read_text()) for n in ("converted", "trained")]
    assert [meta["config"]["params_dtype"] for meta in stored] == ["float32", "bfloat16"]
    quick = ["--lengths", "200", "--perplexity-tokens", "200"]
    shares = {}
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        more = [*quick, "--serve-dtype", dtype]
        found = run_evaluate(models, list(models), tmp_path / "out.json", *more)
        teacher, converted, trained = (model.cache_bytes_per_token for model in found.models)
        assert teacher == 2 * 2 * 2 * 16 * size  # layers, groups, key and value, channels
        assert converted == trained
        assert found.models[1].state_bytes == found.models[2].state_bytes
        assert f"cache B/token ({dtype})" in capsys.readouterr().out
        shares[dtype] = trained / teacher
    assert shares["bf16"] == shares["fp32"] == 2 / 4  # one group per layer


def test_convert_calibrates_at_the_length_that_the_teacher_is_built_for(
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    made_by = json.loads((models["converted"] / "model.json").read_text())["provenance"]
    assert made_by["calibration_length"] == 1024 and made_by["calibration_tokens"] == 8192
    assert made_by["calibration_text"] == "Python's documentation, a stand-in: no text was named"
    plan = models["teacher"].with_name("plan.json")
    wide = write_tiny_qwen3(tmp_path / "wide", max_position_embeddings=32768)
    for options, length in (
        ([], 2048),
        (["--calibration-tokens", "600"], 600),
        (["--calibration-length", "64"], 64),
    ):
        capsys.readouterr()
        caplog.clear()
        command = ["convert", "--teacher", wide, "--plan", plan, *options]
        assert main([*map(str, command), "--out", str(tmp_path / "out"), "--overwrite"]) == 0
        assert f" tokens, {length:,} per sequence" in capsys.readouterr().out
        assert "text like what the model is for with --calibration-text" in caplog.text


def test_a_calibration_length_of_nothing_is_no_default(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = models["teacher"].with_name("plan.json")
    command = ["convert", "--teacher", models["teacher"], "--plan", plan]
    options = ["--calibration-length", "0", "--out", tmp_path / "out"]
    assert main([str(word) for word in (*command, *options)]) == 2
    assert "the calibration length is 0 tokens; allowed: 1 to" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "num_warnings"), [("0", 1), ("3", 0)])
def test_one_rank_warns_of_the_text_that_stands_in(
    rank: str,
    num_warnings: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert text.stand_in_text("probes.text=") == text.local_text()
    assert len(caplog.records) == num_warnings


def test_a_missing_model_is_named_before_pytorch_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def install() -> None:
        pytest.fail("PyTorch and Megatron are imported from here on")

    monkeypatch.setattr(cpu, "install_if_needed", install)
    folder = tmp_path / "model"
    folder.mkdir()
    for words, message in (
        (["--model", "a=nowhere"], "model folder nowhere does not exist"),
        (["--model", f"a={folder}", "--num-samples", "7"], "7 samples are not divisible by 5"),
        (["--model", f"a={folder}", "--lengths", "64", "--perplexity-tokens", "8"], "is 8, less"),
    ):
        arguments = evaluate_arguments([*words, "--out", str(tmp_path / "out.json")])
        with pytest.raises(UserError, match=message):
            evaluate.run(arguments)


def evaluate_arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    return parser.parse_args(words)
