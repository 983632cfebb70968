"""Evaluation: exact match equals greedy decoding, perplexity, counts, cache, the command."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_hydra import cpu
from megatron_hydra.errors import UserError

cpu.install_if_needed()

from hydra_tools.cli import main  # noqa: E402
from kit.plans import all_fa  # noqa: E402
from kit.tiny import random_model  # noqa: E402
from kit.tiny_qwen3 import write_tiny_qwen3  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402

from megatron_hydra.api import evaluate  # noqa: E402
from megatron_hydra.evaluation import ruler  # noqa: E402
from megatron_hydra.evaluation.reading import read_evaluation  # noqa: E402
from megatron_hydra.evaluation.results import (  # noqa: E402
    Accuracy,
    Evaluation,
    ModelResult,
    NeedleGrid,
    count_right,
)
from megatron_hydra.evaluation.ruler import (  # noqa: E402
    answered_right,
    make_task_samples,
    needle_depths,
)
from megatron_hydra.head_plan import HeadPlan  # noqa: E402
from megatron_hydra.selection.cost import cache_bytes_per_token, state_bytes  # noqa: E402
from megatron_hydra.selection.shape import ModelShape  # noqa: E402
from megatron_hydra.tasks.needles import TASKS, NeedleSample, NeedleTask  # noqa: E402
from megatron_hydra.teachers.checkpoint import save_checkpoint  # noqa: E402
from megatron_hydra.teachers.tokenizer import load_tokenizer  # noqa: E402

VOCAB = 32
PLAN = HeadPlan.from_fa_heads({0: [0, 1, 3], 1: [2]}, 2, 4, 2)  # 2 groups, then 1
TWO_KEYS = NeedleTask("multi_key_2", 2)

pytestmark = pytest.mark.usefixtures("one_rank_of_module")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Sentence {i} says that {i * i} is a square. " for i in range(2000)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("model") / "teacher")


def greedy(model: GPTModel, prompt: list[int], num_tokens: int) -> list[int]:
    """Token by token, each from a whole forward of all that was generated so far."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        batch = torch.tensor([tokens])
        with torch.no_grad():
            logits = model(batch, torch.arange(len(tokens))[None], None)
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("plan", [None, PLAN], ids=["teacher", "hybrid"])
@pytest.mark.parametrize("max_tokens", [1, 8192])
def test_teacher_forced_match_is_greedy_decoding(
    plan: HeadPlan | None, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that greedy decoding gives, and the same with one token changed at each place."""
    monkeypatch.setattr(ruler, "MAX_TOKENS", max_tokens)
    model = random_model(plan)
    generator = torch.Generator().manual_seed(2)
    samples, expected = [], []
    for index in range(8):
        length = 9 if index < 4 else 14
        prompt = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        answer = greedy(model, prompt, 3)
        if index % 4:  # 1, 2, 3: the first, second, third token is wrong
            answer[index % 4 - 1] = (answer[index % 4 - 1] + 1) % VOCAB
        samples.append(NeedleSample(prompt, answer, depth=0.0, key="key", value=""))
        expected.append(greedy(model, prompt, 3) == answer)
    assert answered_right(model, samples) == expected
    assert expected == [True, False, False, False] * 2


def test_samples_are_dealt_to_depths_and_do_not_depend_on_other_cells(folder: Path) -> None:
    tokenizer, text = load_tokenizer(folder), list(range(200, 240)) * 30
    depths = needle_depths(3)
    assert depths == (0.0, 0.5, 1.0)
    tasks = [TASKS["single"], TWO_KEYS]
    samples = make_task_samples(tokenizer, text, tasks, [260, 320], 6, depths, seed=4)
    assert len(samples) == 2 * 2 * 6
    for cell in samples:
        tokens, answer = cell.sample.tokens, cell.sample.answer
        assert len(tokens) + len(answer) == cell.length
        needle_start = cell.sample.answer_positions[0] / cell.length
        assert needle_start == pytest.approx(0.15 + 0.5 * cell.depth, abs=0.25)
    assert [s.depth for s in samples[:6]] == list(depths) * 2
    alone = make_task_samples(tokenizer, text, [TWO_KEYS], [320], 6, depths, seed=4)
    assert alone == samples[-6:]
    other = make_task_samples(tokenizer, text, [TWO_KEYS], [320], 6, depths, seed=5)
    assert all(a.sample.tokens != b.sample.tokens for a, b in zip(alone, other, strict=True))
    with pytest.raises(UserError, match="7 samples are not divisible by 3 needle depths"):
        make_task_samples(tokenizer, text, tasks, [260], 7, depths, seed=4)


def test_grid_and_accuracy_count_the_same_samples(folder: Path) -> None:
    tokenizer, text = load_tokenizer(folder), list(range(200, 240)) * 30
    tasks, depths = [TASKS["single"], TWO_KEYS], needle_depths(2)
    samples = make_task_samples(tokenizer, text, tasks, [260, 320], 4, depths, seed=0)
    # single at 260: depth 0 right twice, depth 1 once; single at 320: depth 1 once.
    right = [True, True, True, False] + [False, True, False, False] + [True] * 8
    assert NeedleGrid.count("single", samples, right) == NeedleGrid(
        "single", (260, 320), (0.0, 1.0), ((1.0, 0.5), (0.0, 0.5))
    )
    assert count_right(samples, right, lambda sample: (sample.task, sample.length)) == {
        ("single", 260): Accuracy(3, 4),
        ("single", 320): Accuracy(1, 4),
        ("multi_key_2", 260): Accuracy(4, 4),
        ("multi_key_2", 320): Accuracy(4, 4),
    }


@pytest.mark.parametrize(
    ("num_right", "low", "high"), [(0, 0.0, 0.0370), (50, 0.4038, 0.5962), (97, 0.9155, 0.9897)]
)
def test_wilson_interval_of_100_samples(num_right: int, low: float, high: float) -> None:
    assert Accuracy(num_right, 100).interval == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("fields", [{}, {"la_short_conv": False}, {"params_dtype": torch.bfloat16}])
def test_cache_and_state_are_what_the_built_model_needs(fields: dict) -> None:
    config_fields = {"num_query_groups": 2, **fields}
    if fields.get("params_dtype"):
        config_fields |= {"bf16": True, "pipeline_dtype": torch.bfloat16}
    model = random_model(PLAN, **config_fields)
    cache = state = 0
    for layer in model.decoder.layers:
        attention = layer.self_attention
        dim, weight = model.config.kv_channels, attention.in_proj.weight
        for group in attention.placement.owned_groups(0):
            for section in ("fa_key", "fa_value"):
                rows = weight[attention.layout.rows(section, group)]
                cache += rows.shape[0] * weight.element_size()
        for name, parameter in attention.named_parameters():
            if name.endswith("A_log"):
                state += parameter.numel() * dim * dim * 4
            if name.endswith("conv_weight"):
                state += parameter.shape[0] * (parameter.shape[1] - 1) * weight.element_size()
    assert cache > 0 and state > 0
    shape = ModelShape.from_config(model.config)
    dtype = "bf16" if fields.get("params_dtype") else "fp32"
    assert cache_bytes_per_token(shape, dtype).of(PLAN) == cache
    assert state_bytes(shape, dtype).of(PLAN) == state


def test_a_teacher_caches_every_group_and_has_no_state() -> None:
    shape = ModelShape.from_config(random_model(None).config)
    cache = cache_bytes_per_token(shape)
    assert cache.of(None) == 2 * 2 * 2 * 8 * 2  # layers, groups, k and v
    assert state_bytes(shape).of(None) == 0
    assert cache.of(all_fa(2, 4, 2)) == cache.of(None)
    fewer = replace(PLAN, layers=(PLAN.layers[1],) * 2)  # one head, so one group per layer
    assert cache.of(fewer) == cache.of(None) / 2


def test_command_writes_what_the_report_reads(
    folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "evaluation.json"
    command = [
        "evaluate", "--model", f"teacher={folder}", "--lengths", "200,300", "--tasks",
        "single,multi_key:2", "--training-length", "200", "--num-samples", "4", "--depths", "2",
        "--text", str(text_file), "--perplexity-tokens", "1200", "--out", str(out),
    ]  # fmt: skip
    assert main(command) == 0
    evaluation = read_evaluation(out)
    (teacher,) = evaluation.models
    assert evaluation.cells == tuple(
        (task, length) for task in ("single", "multi_key_2") for length in (200, 300)
    )
    assert list(teacher.loss_nats) == [200, 300]
    assert (teacher.grid.task, teacher.grid.lengths) == ("single", (200, 300))
    assert teacher.cache_bytes_per_token == 2 * 2 * 2 * 16 * 2
    assert evaluation.serve_dtype == "bf16" == json.loads(out.read_text())["serve_dtype"]
    assert evaluation.provenance["perplexity_tokens"] == 1200
    printed = capsys.readouterr().out
    assert "multi_key_2 300" in printed
    assert "cache B/token (bf16)" in printed and "state B (fp32, else bf16)" in printed
    assert "lengths: 200, 300 tokens (as asked for)" in printed
    assert "training length: 200 tokens, as asked for" in printed
    # The tiny teacher's config.json says 128 positions.
    assert "teacher is built for 128 tokens: its results at 200, 300 tokens are beyond" in printed

    before = out.read_bytes()
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main([*command, "--overwrite", "--seed", "1"]) == 0
    again = json.loads(out.read_bytes())
    assert again["models"] == json.loads(before)["models"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "b=missing"], "model folder missing does not exist"),
        (["--model", "b=."], r"\. is neither a checkpoint folder"),
        (["--model", "teacher=."], "names 'teacher' twice"),
        (["--model", "unnamed"], "must be NAME=FOLDER"),
        (["--num-samples", "7"], "a multiple of 5"),
        (["--depths", "0"], "at least 1 is needed"),
        (["--tasks", "single,double"], "unknown needle task 'double'"),
        (["--tasks", "single:3"], "'single:3' is not understood; write multi_key:N"),
        (["--tasks", "multi_key:1"], "'multi_key:1' is not understood; write multi_key:N"),
        (["--tasks", "multi_key:2,multi_key:02"], "the tasks name 'multi_key:02' twice"),
        (["--lengths", "40"], "no room for text"),
        (["--lengths", "9000"], r"9000 tokens needs 9001 .* ask for --lengths up to \d+, or give"),
        (["--perplexity-tokens", "99"], "ask for 200 or more, or for --lengths up to 99"),
        (["--perplexity-tokens", "0"], "the number of perplexity tokens is 0"),
        (["--text", "nowhere.txt"], "cannot read the text file nowhere.txt"),
        (["--training-length", "0"], "the training length is 0"),
        (["--overwrite", "--out", "TEXT"], "text.txt would replace the input"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    arguments: list[str],
    message: str,
    folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.json"
    arguments = [str(text_file) if word == "TEXT" else word for word in arguments]
    command = ["evaluate", "--model", f"teacher={folder}", "--out", str(out)]
    command += ["--lengths", "200", "--tasks", "single", "--text", str(text_file), *arguments]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("megatron-hydra: error: ") == 1
    assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["gemma", "no plan"])
def test_a_bad_model_folder_is_named_before_samples_are_built(
    damage: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = tmp_path / "bad"
    if damage == "gemma":
        shutil.copytree(folder, bad)
        (bad / "config.json").write_text('{"model_type": "gemma"}')
        message = "model_type 'gemma'"
    else:
        model = random_model(PLAN)
        save_checkpoint(bad, model, model.config, PLAN, folder, {})
        (bad / "plan.json").unlink()
        message = "cannot read .*plan.json"
    monkeypatch.setattr(evaluate, "read_text", lambda *_: pytest.fail("text was read first"))
    (tmp_path / "text.txt").write_text("some words\n")
    models = ["--model", f"good={folder}", "--model", f"bad={bad}"]
    command = ["evaluate", *models, "--text", str(tmp_path / "text.txt")]
    assert main([*command, "--out", str(tmp_path / "out.json")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_evaluation_writes_is_read(tmp_path):
    accuracy = {("single", 64): Accuracy(15, 20), ("multi_key", 64): Accuracy(3, 20)}
    grid = NeedleGrid("single", (64,), (0.0, 1.0), ((0.9, 0.6),))
    models = tuple(
        ModelResult("m" * n, "m", plan, "", 8, 1024, 9, accuracy, grid, {64: 3.5})
        for n, plan in enumerate([None, ((3,), ()), ((), (0, 2))])
    )
    written = Evaluation(models, 64, {"seed": 3})
    written.save(tmp_path / "evaluation.json")
    assert read_evaluation(tmp_path / "evaluation.json") == written


def test_a_folder_as_output_is_refused_before_anything_is_measured(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluate, "stand_in_text", lambda option: pytest.fail("the text was read"))
    command = ["evaluate", "--model", f"teacher={folder}", "--out", str(tmp_path), "--overwrite"]
    assert main(command) == 2
    assert "is a folder, and a file is to be written" in capsys.readouterr().err
