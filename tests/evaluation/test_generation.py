"""Evaluation by generation: figures, a run that is killed, whose code runs, bad input."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from hydra_tools import cli  # noqa: E402
from kit.tiny_models import PLAN_OF_KINDS, write_models  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from megatron_hydra.api import generate as verb  # noqa: E402
from megatron_hydra.errors import UserError  # noqa: E402
from megatron_hydra.evaluation.generation import Answered, AtDepth, Generation  # noqa: E402
from megatron_hydra.export.code import brings_code  # noqa: E402
from megatron_hydra.export.generating import Generator  # noqa: E402
from megatron_hydra.tasks.generation import (  # noqa: E402
    GenerationSample,
    find_generation_tasks,
    make_generation_samples,
)
from megatron_hydra.tasks.text import split_held_out  # noqa: E402

LENGTHS = "400,500"
OPTIONS = ["--tasks", "niah_single_2,vt", "--lengths", LENGTHS, "--num-samples", "3"]
OPTIONS += ["--wording", "short", "--batch-size", "2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """`qwen3`, a teacher's folder, and `hf`, an exported hybrid; `text.txt`."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, PLAN_OF_KINDS, max_position_embeddings=450)
    assert cli.main(["export", "--model", f"{folder}/hybrid", "--out", f"{folder}/hf"]) == 0
    text = " ".join(f"Sentence {i} says that {i * i} is a square." for i in range(2000))
    (folder / "text.txt").write_text(text)
    return folder


def command(models: Path, *more: str) -> list[str]:
    named = ["--hf", f"teacher={models}/qwen3", "--hf", f"{models}/hf"]
    return ["evaluate", *named, "--text", f"{models}/text.txt", *OPTIONS, *more]


def by_hand(folder: Path, samples: list[dict]) -> list[int]:
    """Each prompt alone, token by token, by whole forward passes without a cache."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    found = []
    for sample in samples:
        tokens = tokenizer(sample["prompt"], return_tensors="pt").input_ids
        assert tokens.shape[1] + sample["max_new_tokens"] <= sample["length"]
        for _ in range(sample["max_new_tokens"]):
            with torch.no_grad():
                new = model(tokens, use_cache=False).logits[:, -1:].argmax(-1)
            if int(new) == tokenizer.eos_token_id:
                break
            tokens = torch.cat((tokens, new), dim=1)
        text = tokenizer.decode(tokens[0]).removeprefix(sample["prompt"])
        found.append(sum(answer.lower() in text.lower() for answer in sample["answers"]))
    return found


def test_the_verb_counts_what_greedy_decoding_gives(models, tmp_path, capsys, monkeypatch):
    """A random model finds nothing: the answers are made what each goes on with, for some."""
    real = verb.make_generation_samples

    def with_answers(num_tokens, *arguments):
        tokenizer = AutoTokenizer.from_pretrained(models / "hf")
        model = AutoModelForCausalLM.from_pretrained(models / "hf", trust_remote_code=True)
        changed = []
        for sample in real(num_tokens, *arguments):
            tokens = tokenizer(sample.prompt, return_tensors="pt").input_ids
            with torch.no_grad():
                first = int(model(tokens).logits[0, -1].argmax())
            answers = (tokenizer.decode([first]), "nowhere")[: 1 + sample.index % 2]
            changed.append(type(sample)(**{**vars(sample), "answers": answers}))
        return changed

    monkeypatch.setattr(verb, "make_generation_samples", with_answers)
    out, dump = tmp_path / "generation.json", tmp_path / "prompts.jsonl"
    assert cli.main(command(models, "--out", str(out), "--dump", str(dump))) == 0
    found = Generation.load(out)
    lines = dump.read_text("utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    assert found.prompts_hash == hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert found.cells == (*(("niah_single_2", n) for n in (400, 500)), ("vt", 400), ("vt", 500))
    for model, name in zip(found.models, ("qwen3", "hf"), strict=True):
        expected = by_hand(models / name, samples)
        for position, task in enumerate(model.tasks):
            there = expected[3 * position : 3 * position + 3]
            asked = [len(s["answers"]) for s in samples[3 * position : 3 * position + 3]]
            assert replace(task, by_depth=()) == Answered.count(task.cell, there, asked), name
    hybrid = found.models[1]
    assert {task.num_right for task in hybrid.tasks} == {2}
    assert {task.match_all for task in hybrid.tasks} == {2.5 / 3}
    assert {task.match_part for task in hybrid.tasks} == {1.0}
    assert (hybrid.name, hybrid.fa_heads, hybrid.total_heads) == ("hf", 2, 8)
    assert found.models[0].plan is None and hybrid.plan == ((1,), (3,))  # as PLAN_OF_KINDS has it
    # Two of four groups, key and value of 16 channels in bf16.
    assert (
        hybrid.cache_bytes_per_token == 2 * 2 * 16 * 2 == found.models[0].cache_bytes_per_token / 2
    )
    assert found.models[0].state_bytes == 0 < hybrid.state_bytes
    said = capsys.readouterr().out
    assert "not comparable with published RULER" in said and f"{models}/text.txt" in said
    assert "hf is built for 450 tokens: its results at 500 tokens are beyond" in said
    assert "67 [21, 94] 83" in said
    memory = [
        line.split()[-2:] for line in said[said.index("what a sequence keeps") :].splitlines()
    ]
    sizes = [
        f"{size:,}"
        for model in found.models
        for size in (model.cache_bytes_per_token, model.state_bytes)
    ]
    assert memory[2:5] == [["8/8", "2/8"], sizes[::2], sizes[1::2]]


def test_right_answers_are_those_that_greedy_decoding_gives(models):
    student = Generator(models / "hf", True)
    model = AutoModelForCausalLM.from_pretrained(models / "hf", trust_remote_code=True)
    samples, wanted = [], []
    for seed in range(5):
        prompt = torch.randint(0, 256, (1, 30), generator=torch.Generator().manual_seed(seed))
        found = model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        answer = found[0, 30:].tolist()
        answer[seed % 3] += seed % 2  # every other one is wrong, in one token
        samples.append((prompt[0].tolist(), answer))
        wanted.append(seed % 2 == 0)
    assert student.right_answers(samples, 2) == wanted


def test_the_divergence_is_that_of_the_two_distributions(models):
    teacher, student = Generator(models / "qwen3", False), Generator(models / "hf", True)
    tokens = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(0))
    found = student.divergence_from(teacher, tokens.tolist(), 2)
    theirs, ours = (
        AutoModelForCausalLM.from_pretrained(models / name, trust_remote_code=True)(tokens)
        .logits.double().softmax(-1).detach().numpy()
        for name in ("qwen3", "hf")
    )  # fmt: skip
    expected = (theirs * (np.log(theirs) - np.log(ours))).sum(-1).mean()
    assert expected > 0.1 and found == pytest.approx(expected, rel=1e-4)
    assert teacher.divergence_from(teacher, tokens.tolist(), 2) == 0.0


def test_weights_that_the_gpu_does_not_compute_are_refused(models, monkeypatch):
    """A GPU of before Ampere has bfloat16 by emulation alone, which does not count."""
    half = models / "half"
    export = ["export", "--model", f"{models}/hybrid", "--out", str(half), "--dtype", "bfloat16"]
    assert cli.main(export) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Quadro RTX 6000")
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    message = (
        f"the weights of {half} are bfloat16, which Quadro RTX 6000 does not compute: export them "
        "with --dtype float32"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        list(Generator(half, True).generate(["Once"], 1, 1))


def test_state_bytes_are_those_of_the_checkpoint(models, tmp_path):
    """Counted from config.json here, from Megatron's configuration when the card is written."""
    out = tmp_path / "generation.json"
    arguments = command(models, "--out", str(out), "--serve-dtype", "fp32")
    assert cli.main([*arguments, "--num-samples", "1", "--tasks", "vt", "--lengths", "400"]) == 0
    card = (models / "hf/README.md").read_text("utf-8")
    hybrid = Generation.load(out).models[1]
    assert f"whatever its length | {hybrid.state_bytes:,} bytes" in card
    assert f"float32 | {hybrid.cache_bytes_per_token:,} bytes" in card


def test_prompts_alone_are_the_same_bytes_each_time(models, tmp_path, monkeypatch):
    monkeypatch.setattr(Generator, "generate", lambda *_: pytest.fail("a model was asked"))
    for name in ("first", "second"):
        assert cli.main(command(models, "--dump", str(tmp_path / name))) == 0
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert len((tmp_path / "first").read_text().splitlines()) == 12
    assert cli.main(command(models, "--dump", str(tmp_path / "third"), "--seed", "2")) == 0
    assert (tmp_path / "first").read_bytes() != (tmp_path / "third").read_bytes()


def test_a_killed_run_goes_on_from_its_finished_cells(models, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole.json", tmp_path / "out.json"
    assert cli.main(command(models, "--out", str(whole))) == 0
    asked, real = [], Generator.generate

    def dies(self, prompts, *arguments):
        asked.append(prompts)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return real(self, prompts, *arguments)

    monkeypatch.setattr(Generator, "generate", dies)
    assert cli.main(command(models, "--out", str(out))) == 130
    assert not out.exists()
    other = command(models, "--out", str(out), "--seed", "2")
    assert cli.main(other) == 2
    assert "unfinished evaluation with another prompts" in capsys.readouterr().err
    assert cli.main(command(models, "--out", str(out))) == 0
    assert len(asked) == 9  # 3 finished, 1 killed, 5 of 8 left
    first, second = (json.loads(path.read_text()) for path in (whole, out))
    assert first["models"] == second["models"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "whole.json"]
    (tmp_path / "third.json.partial").mkdir()
    (tmp_path / "third.json.partial/mine.txt").write_text("")
    assert cli.main(command(models, "--out", str(tmp_path / "third.json"))) == 2
    assert "holds mine.txt, which no evaluation wrote" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["a line", "a file", "the map"])
def test_only_our_own_code_runs_unasked(models, tmp_path, capsys, change):
    folder = Path(shutil.copytree(models / "hf", tmp_path / "hf"))
    assert brings_code(folder) and not brings_code(models / "qwen3")
    if change == "a line":
        with (folder / "modeling_hydra.py").open("a") as file:
            file.write("\n# another line\n")
    elif change == "a file":
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate/generate.py").write_text("def generate(model): ...\n")
    else:
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"]["AutoModelForCausalLM"] = "someone/else--modeling.Model"
        (folder / "config.json").write_text(json.dumps(config))
    arguments = ["evaluate", "--hf", str(folder), "--out", f"{tmp_path}/out.json", *OPTIONS]
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "brings model code that is not what this release exports" in said
    assert "--trust-remote-code" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    if change == "a line":
        text = ["--text", f"{models}/text.txt", "--trust-remote-code"]
        assert cli.main([*arguments, *text]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--hf", "{}/gone"], "model folder .*gone does not exist"),
        (["--hf", "{}/hybrid"], "is a checkpoint folder: `export` makes a Hugging Face folder"),
        (["--hf", "a={}/hf", "--hf", "a={}/qwen3"], "--hf names 'a' twice"),
        (["--hf", "{}/hf", "--model", "a={}/qwen3"], "with --model, or with --hf"),
        ([], "with --model, or with --hf"),
        (["--hf", "{}/hf", "--depths", "3"], "--depths is for --model without --generate"),
        (["--model", "a={}/qwen3", "--batch-size", "3"], "--batch-size is for --generate or --hf"),
        (["--model", "a={}/qwen3", "--dump", "x"], "--dump is for --generate or --hf"),
        (["--hf", "{}/hf", "--tasks", "single"], "unknown generation task 'single'"),
        (["--hf", "{}/hf", "--batch-size", "0"], "the batch size is 0"),
        (["--hf", "{}/hf", "--num-samples", "0"], "the number of samples is 0"),
        (["--hf", "{}/hf", "--lengths", "30"], "does not fit into 30 tokens"),
        (["--hf", "{}/hf", "--text", "nowhere.txt"], "cannot read the text file nowhere.txt"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    models, tmp_path, capsys, arguments, sentence
):
    words = [word.format(models) for word in arguments]
    assert cli.main(["evaluate", "--out", f"{tmp_path}/out.json", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("megatron-hydra: error: ") == 1
    assert re.search(sentence, error.strip().splitlines()[-1]), error
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_said_before_pytorch_is_imported(tmp_path):
    import os
    import subprocess
    import sys

    code = (
        "import sys\nfrom hydra_tools import cli\n"
        "assert cli.main(sys.argv[1:]) == 2\n"
        "assert not {'torch', 'transformers'} & {*sys.modules}\n"
    )
    arguments = ["evaluate", "--hf", f"{tmp_path}/gone", "--out", f"{tmp_path}/out.json"]
    env = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=env)


def test_a_file_whose_figures_contradict_is_refused(tmp_path):
    from megatron_hydra.evaluation.generation import GeneratedResult

    cell = Answered.count(("vt", 512), [5, 3, 0, 5], [5, 5, 5, 5])
    assert (cell.num_right, cell.match_all, cell.match_part) == (2, 13 / 20, 3 / 4)
    assert cell.right == "1001"
    written = Generation(
        (GeneratedResult("a", "b", 2, 8, 64, 0, (cell,)),), "head", "bf16", "0", {"seed": 1}
    )
    written.save(tmp_path / "file.json")
    assert Generation.load(tmp_path / "file.json") == written
    data = json.loads((tmp_path / "file.json").read_text())
    data["models"][0]["plan"] = [[0], [1, 2]]
    (tmp_path / "file.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="model 'a': its plan has other than its 2 FA heads"):
        Generation.load(tmp_path / "file.json")
    del data["models"][0]["plan"]  # as earlier releases wrote it
    data["models"][0]["tasks"][0]["num_right"] = 3
    (tmp_path / "file.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"model 'a': task vt at 512 tokens: accuracy is 0.5"):
        Generation.load(tmp_path / "file.json")
    for right, message in (
        ("1011", "num_right is 2"),
        ("11", "2 of 4"),
        ("1x01", "num_right is 2"),
    ):
        data["models"][0]["tasks"][0] |= {"num_right": 2, "right": right}
        (tmp_path / "file.json").write_text(json.dumps(data))
        with pytest.raises(UserError, match=rf"right is .*{message}"):
            Generation.load(tmp_path / "file.json")


def test_haystacks_are_what_preprocess_holds_out(models, tmp_path):
    """Where characters and tokens lie unlike: held out by characters, most would be trained on."""
    words = [f"{'x' if i < 6000 else 'é' * 8}{i}" for i in range(9000)]
    (tmp_path / "text.txt").write_text(" ".join(words))
    tokenizer = AutoTokenizer.from_pretrained(models / "qwen3")
    training, _ = split_held_out(tokenizer(" ".join(words), add_special_tokens=False).input_ids)
    trained_on = {*tokenizer.decode(training).split()}
    out = ["--dump", str(tmp_path / "prompts"), "--text", f"{tmp_path}/text.txt"]
    assert cli.main(command(models, *out, "--tasks", "niah_single_2", "--num-samples", "20")) == 0
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "prompts").open()]
    hay = [
        word for prompt in prompts for word in prompt.split() if re.fullmatch(r"x\d+|é+\d+", word)
    ]
    # A word at a block's edge may stand in both parts, cut.
    assert len(hay) > 500 and len({*hay} & trained_on) < 0.02 * len({*hay})


def test_a_needle_is_counted_where_it_lies():
    samples = [
        GenerationSample("needle", 60, i, f"{'x' * before} 123 {'y' * (95 - before)}", ("123",), 5)
        for i, before in enumerate((0, 10, 19, 45, 90))
    ]
    depths = [sample.depth for sample in samples]
    assert depths == [0.01, 0.11, 0.2, 0.46, 0.91]
    cell = Answered.count(("niah_single_2", 60), [1, 0, 1, 0, 1], [1] * 5, depths)
    counted = ((0.0, 1, 2), (0.2, 1, 1), (0.4, 0, 1), (0.8, 1, 1))
    assert cell.by_depth == tuple(AtDepth(*each) for each in counted)
    twice = replace(samples[0], prompt="123 and 123")
    several = replace(samples[0], answers=("12", "23"))
    assert twice.depth is None and several.depth is None
    assert Answered.count(("vt", 60), [1, 0], [1, 2], [0.5, None]).by_depth == ()


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_3", "niah_multikey_2"])
def test_drawn_needles_have_depths_from_start_to_end(name):
    words = [f"word{i}." for i in range(500)]
    (task,) = find_generation_tasks([name])
    cell = make_generation_samples(len, words, task, 6000, 200, seed=1)
    depths = [sample.depth for sample in cell]
    assert None not in depths and min(depths) < 0.1 and max(depths) > 0.8
