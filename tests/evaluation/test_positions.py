"""Perplexity by position of Hugging Face folders: figures, a run that is killed, bad input."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from hydra_tools import cli  # noqa: E402
from kit.tiny_models import PLAN_OF_KINDS, write_models  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from megatron_hydra.errors import UserError  # noqa: E402
from megatron_hydra.evaluation.generation import (  # noqa: E402
    Answered,
    GeneratedResult,
    Generation,
    generation_table,
    results_markdown,
)
from megatron_hydra.evaluation.positions import (  # noqa: E402
    PositionLoss,
    loss_by_position,
    position_windows,
)
from megatron_hydra.export import generating  # noqa: E402
from megatron_hydra.report.rendering import render  # noqa: E402
from megatron_hydra.report.sections import generation_section  # noqa: E402
from megatron_hydra.tasks.text import split_held_out  # noqa: E402

LENGTH, NUM_WINDOWS = 400, 3
BUCKETS = [(1, 64), (65, 128), (129, 256), (257, 400)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """`qwen3`, a teacher's folder, and `hf`, an exported hybrid; `text.txt`."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, PLAN_OF_KINDS, max_position_embeddings=450)
    assert cli.main(["export", "--model", f"{folder}/hybrid", "--out", f"{folder}/hf"]) == 0
    text = " ".join(f"Sentence {i} says that {i * i} is a square." for i in range(600))
    (folder / "text.txt").write_text(text)
    return folder


def _command(models: Path, out: Path, *more: str, tokens: int = 1300) -> list[str]:
    named = ["--hf", f"teacher={models}/qwen3", "--hf", f"{models}/hf", "--out", str(out)]
    tasks = ["--tasks", "niah_single_2", "--wording", "short", "--num-samples", "1"]
    lengths = ["--lengths", f"350,{LENGTH}", "--perplexity-tokens", str(tokens)]
    return ["evaluate", *named, "--text", f"{models}/text.txt", *tasks, *lengths, *more]


@torch.no_grad()
def _by_hand(folder: Path, text: str) -> list[PositionLoss]:
    """Each window alone, each token looked up."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    _, tokens = split_held_out(tokenizer(text, add_special_tokens=False).input_ids)
    losses: dict[tuple[int, int], list[float]] = {bucket: [] for bucket in BUCKETS}
    for window in range(NUM_WINDOWS):
        start = window * LENGTH
        inputs = torch.tensor([tokens[start : start + LENGTH]])
        logs = model(inputs).logits[0].double().log_softmax(-1)
        for before in range(1, LENGTH + 1):
            (bucket,) = (b for b in BUCKETS if b[0] <= before <= b[1])
            losses[bucket].append(-logs[before - 1, tokens[start + before]].item())
    return [
        PositionLoss(*bucket, len(found), sum(found) / len(found))
        for bucket, found in losses.items()
    ]


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 256), (2, 70)])
def test_losses_are_those_of_each_window_alone(models, tmp_path, monkeypatch, batch_size, chunk):
    monkeypatch.setattr(generating, "_POSITIONS", chunk)
    out = tmp_path / "out.json"
    assert cli.main(_command(models, out, "--batch-size", str(batch_size))) == 0
    found = Generation.load(out)
    assert found.provenance["perplexity_tokens"] == NUM_WINDOWS * LENGTH
    text = (models / "text.txt").read_text()
    for model, name in zip(found.models, ("qwen3", "hf"), strict=True):
        expected = _by_hand(models / name, text)
        assert [each.loss_nats for each in model.loss_by_position] == pytest.approx(
            [each.loss_nats for each in expected], rel=1e-5
        )
        for ours, theirs in zip(model.loss_by_position, expected, strict=True):
            assert replace(ours, loss_nats=0.0) == replace(theirs, loss_nats=0.0)
    one, other = ([each.loss_nats for each in m.loss_by_position] for m in found.models)
    assert one != other and len(set(one)) == len(BUCKETS)


def test_a_killed_run_measures_no_model_twice(models, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole.json", tmp_path / "out.json"
    assert cli.main(_command(models, whole)) == 0
    measured, asked = [], []
    real, generate = generating.Generator.position_losses, generating.Generator.generate

    def losses(self, *arguments):
        measured.append(self.folder.name)
        return real(self, *arguments)

    def dies(self, *arguments):
        asked.append(self.folder.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return generate(self, *arguments)

    monkeypatch.setattr(generating.Generator, "position_losses", losses)
    monkeypatch.setattr(generating.Generator, "generate", dies)
    assert cli.main(_command(models, out)) == 130
    assert measured == ["qwen3"] and not out.exists()
    assert cli.main(_command(models, out, tokens=900)) == 2
    assert "unfinished evaluation with another perplexity text" in capsys.readouterr().err
    assert cli.main(_command(models, out)) == 0
    assert measured == ["qwen3", "hf"]
    first, second = (json.loads(path.read_text()) for path in (whole, out))
    assert first["models"] == second["models"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "whole.json"]


def test_without_being_asked_for_none_is_measured(models, tmp_path, monkeypatch):
    monkeypatch.setattr(
        generating.Generator, "position_losses", lambda *_: pytest.fail("it was measured")
    )
    command = _command(models, tmp_path / "out.json")
    at = command.index("--perplexity-tokens")
    assert cli.main([*command[:at], *command[at + 2 :]]) == 0
    assert [model.loss_by_position for model in Generation.load(tmp_path / "out.json").models] == [
        (),
        (),
    ]


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (0, "the number of perplexity tokens is 0; it must be above 0"),
        (399, "--perplexity-tokens is 399, less than one window of 400 tokens"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(models, tmp_path, capsys, tokens, sentence):
    assert cli.main(_command(models, tmp_path / "out.json", tokens=tokens)) == 2
    assert sentence in capsys.readouterr().err.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_windows_and_buckets():
    assert position_windows(range(11), 5, 10) == [range(6), range(5, 11)]
    assert position_windows(range(11), 5, 9) == position_windows(range(10), 5, 99) == [range(6)]
    with pytest.raises(UserError, match="needs 6 tokens of held-out text, and there are 5"):
        position_windows(range(5), 5, 10)
    assert loss_by_position([1.0] * 64, 2) == (PositionLoss(1, 64, 128, 1.0),)
    assert loss_by_position([1.0] * 64 + [3.0], 2)[1] == PositionLoss(65, 65, 2, 3.0)
    for bad in (math.nan, math.inf):
        with pytest.raises(UserError, match="at 2 tokens is not finite"):
            loss_by_position([1.0, bad], 1)


def _generation(*losses: tuple[PositionLoss, ...]) -> Generation:
    cell = Answered.count(("vt", 512), [5, 0], [5, 5])
    rows = (GeneratedResult(f"m{i}", "p", 2, 8, 64, 0, (cell,), x) for i, x in enumerate(losses))
    return Generation(tuple(rows), "head", "bf16", "0", {})


def test_the_file_the_table_the_card_and_the_report(tmp_path):
    better = (PositionLoss(1, 64, 128, 2.0), PositionLoss(65, 100, 72, 1.0))
    worse = (PositionLoss(1, 64, 128, 3.0), PositionLoss(65, 100, 72, 900.0))
    path = tmp_path / "file.json"
    found = _generation(better, worse)
    found.save(path)
    assert Generation.load(path) == found
    table = [line.split() for line in generation_table(found).splitlines()]
    assert ["1", "to", "64", "7.39", "20.09"] in table
    assert "| 65 to 100 | 2.72 | e^900.0 |" in results_markdown(found)
    page = render("generation.html", generation_section(found))
    assert page.count('class="best">7.39') == page.count('class="best">2.72') == 1
    assert "65–100<small>n = 72" in page and "<td>e^900.0" in page
    data = json.loads(path.read_text())
    for model in data["models"]:
        del model["loss_by_position"]  # as earlier releases wrote it
    path.write_text(json.dumps(data))
    assert Generation.load(path) == _generation((), ())
    assert "position" not in render("generation.html", generation_section(_generation((), ())))
    assert "position" not in generation_table(_generation(())) + results_markdown(_generation(()))
    with pytest.raises(UserError, match="model 'm1': its positions are not those of 'm0'"):
        _generation(better, better[:1]).save(path, overwrite=True)
        Generation.load(path)
