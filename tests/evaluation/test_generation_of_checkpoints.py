"""Checkpoints that answer by generation under Megatron, held to what transformers makes of them.

Catches: other prompts, another tokenizer or other ends of a text than the exported folder's; texts
in the order of their lengths; answers or losses of one rank, of another rank's heads or of padding;
a cell that a run which goes on asks again, or a replica for itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from hydra_tools import cli  # noqa: E402
from kit.distributed import run_distributed  # noqa: E402
from kit.forks import start  # noqa: E402
from kit.tiny_models import PLAN_OF_KINDS, write_models  # noqa: E402

from megatron_hydra.api import generate as verb  # noqa: E402
from megatron_hydra.errors import UserError  # noqa: E402
from megatron_hydra.evaluation.checkpoint_generator import CheckpointGenerator  # noqa: E402
from megatron_hydra.evaluation.generation import Generation  # noqa: E402
from megatron_hydra.export.generating import Generator  # noqa: E402
from megatron_hydra.tasks.text_files import TextOptions  # noqa: E402

ROOT = Path(__file__).parents[2]
OPTIONS = ["--tasks", "niah_single_2,vt", "--lengths", "400,500", "--num-samples", "5"]
OPTIONS += ["--wording", "short", "--batch-size", "2", "--perplexity-tokens", "1500"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hybrid`, a checkpoint whose texts end by either of two tokens, `hf`, its export, `text.txt`.

    And what the export answers: `expected.json`, `prompts.jsonl` and `texts.json`.
    """
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, PLAN_OF_KINDS, max_position_embeddings=450)
    text = " ".join(f"Sentence {i} says that {i * i} is a square." for i in range(2000))
    (folder / "text.txt").write_text(text)
    export = ["export", "--model", f"{folder}/hybrid", "--out", f"{folder}/hf"]
    assert cli.main(export) == 0
    tokenizer = folder / "hybrid/tokenizer/tokenizer_config.json"
    settings = json.loads(tokenizer.read_text())
    # The most usual character of generated texts becomes what ends a turn.
    settings["eos_token"] = _usual_character(folder)
    tokenizer.write_text(json.dumps(settings))
    assert cli.main([*export, "--overwrite"]) == 0
    assert len(json.loads((folder / "hf/generation_config.json").read_text())["eos_token_id"]) == 2
    with pytest.MonkeyPatch.context() as patch:
        texts = _scored_by_text(patch)
        assert cli.main(_of_folder(folder, "expected.json", "prompts.jsonl")) == 0
    (folder / "texts.json").write_text(json.dumps(texts))
    return folder


def _usual_character(folder: Path) -> str:
    assert cli.main(_of_folder(folder, "first.json", "first.jsonl")) == 0
    lines = (folder / "first.jsonl").read_text("utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    texts = Generator(folder / "hf", True).generate(prompts, 16, 5)
    usual = Counter("".join(text[1:] for text in texts)).most_common()
    return next(x for x, _ in usual if x.isascii() and x.isprintable())


def _of_folder(folder: Path, out: str, dump: str) -> list[str]:
    places = ["--out", f"{folder}/{out}", "--dump", f"{folder}/{dump}"]
    return ["evaluate", "--hf", f"{folder}/hf", "--text", f"{folder}/text.txt", *OPTIONS, *places]


def _of_checkpoint(models: Path, out: Path, *more: str) -> list[str]:
    named = ["--generate", "--model", f"hf={models}/hybrid", "--text", f"{models}/text.txt"]
    return ["evaluate", *named, *OPTIONS, "--out", str(out), *more]


def _scored_by_text(patch: pytest.MonkeyPatch) -> list[str]:
    """A random model finds nothing: what counts as found follows from the text; lists all texts."""
    texts: list[str] = []

    def found(text: str, answers: Any) -> int:
        texts.append(text)
        return zlib.crc32(text.encode()) % (len(answers) + 1)

    patch.setattr(verb, "answers_found", found)
    return texts


@pytest.mark.parametrize(("folder", "has_code"), [("hf", True), ("qwen3", False)])
@pytest.mark.parametrize("most", [pytest.param(300, marks=pytest.mark.exhaustive), 5])
def test_prompts_that_are_read_in_pieces_are_answered_alike(
    models: Path, folder: str, has_code: bool, most: int
) -> None:
    """With more padding in a batch than a piece is long, and answers that end at once or not."""
    lines = (models / "prompts.jsonl").read_text("utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines][:6]
    prompts = [prompt[-(60 + 70 * i) :] for i, prompt in enumerate(prompts)]
    generator = Generator(models / folder, has_code, most)
    sizes = []
    model = generator._load()
    model.register_forward_pre_hook(
        lambda _, args, options: sizes.append((args or (options["input_ids"],))[0].numel()),
        with_kwargs=True,
    )
    in_pieces = list(generator.generate(prompts, 12, 3))
    assert max(sizes) <= max(most, 3) and sizes.count(max(sizes)) > 1
    assert in_pieces == list(Generator(models / folder, has_code).generate(prompts, 12, 3))
    assert len({*in_pieces}) > 3, "too dull to compare"


@pytest.mark.parametrize(("folder", "has_code"), [("hf", True), ("qwen3", False)])
@pytest.mark.parametrize("most", [300, None])
def test_each_new_token_is_timed_and_no_answer_ends_early(
    models: Path, folder: str, has_code: bool, most: int | None
) -> None:
    """A forward pass's time is in that of its own token, that of the prompts in the first's."""
    lines = (models / "prompts.jsonl").read_text("utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines][:3]
    generator = Generator(models / folder, has_code, most)
    widths: list[int] = []
    # In pieces, the prompts' last token is read by itself, and the first new one follows from it.
    slow = 8 if most else 7

    def wait(_: Any, args: Any, options: Any) -> None:
        widths.append((args or (options["input_ids"],))[0].shape[1])
        time.sleep(0.5 if widths.count(1) == slow else 0.02 if widths[-1] > 1 else 0)

    model = generator._load()
    model.register_forward_pre_hook(wait, with_kwargs=True)
    model.generation_config.eos_token_id = list(range(1, model.config.vocab_size))
    seconds = generator.step_seconds(prompts, 40)
    assert len(seconds) == 40 and seconds[7] >= 0.5 and min(seconds) > 0
    assert widths.count(1) == 39 + (most is not None), "one pass a token, to the last"
    pieces = len(widths) - widths.count(1)
    assert (pieces > 1) == (most is not None) and seconds[0] >= 0.02 * pieces
    widths.clear()
    list(generator.generate(prompts, 100, 3))
    assert widths.count(1) < 39, "all tokens but one end an answer"


def _check(models: Path, out: Path) -> None:
    """All of the file is what the export's says, but for the folder and rounding."""
    expected, found = (Generation.load(path) for path in (models / "expected.json", out))
    assert found.prompts_hash == expected.prompts_hash and found.head == expected.head
    (of_export,), (of_checkpoint,) = expected.models, found.models
    assert of_checkpoint.tasks == of_export.tasks
    assert 0 < sum(task.num_right for task in of_export.tasks) < 20, "too dull to compare"
    for name in ("name", "fa_heads", "total_heads", "cache_bytes_per_token", "state_bytes"):
        assert getattr(of_checkpoint, name) == getattr(of_export, name), name
    assert of_checkpoint.buckets == of_export.buckets and len(of_export.buckets) == 4
    losses = [[each.loss_nats for each in x.loss_by_position] for x in (of_checkpoint, of_export)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_checkpoint_answers_as_its_export_does(models, tmp_path, monkeypatch, capsys):
    texts, dump = _scored_by_text(monkeypatch), tmp_path / "prompts.jsonl"
    assert cli.main(_of_checkpoint(models, tmp_path / "out.json", "--dump", str(dump))) == 0
    assert dump.read_bytes() == (models / "prompts.jsonl").read_bytes()
    expected = json.loads((models / "texts.json").read_text())
    assert texts == expected
    assert len(set(map(len, texts))) > 3, "some must end early"
    _check(models, tmp_path / "out.json")
    said = capsys.readouterr().out
    assert "hf is built for 450 tokens: its results at 500 tokens are beyond" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "prompts.jsonl"]


def test_checkpoint_and_folders_stand_in_one_table(models, tmp_path, capsys):
    out = tmp_path / "out.json"
    more = ["--hf", f"teacher={models}/qwen3", "--model", f"again={models}/hf"]
    few = ["--tasks", "vt", "--lengths", "400", "--num-samples", "2"]
    assert cli.main([*_of_checkpoint(models, out, *more), *few]) == 0
    generation = Generation.load(out)
    found, origins = generation.models, generation.provenance["models"]
    assert [model.name for model in found] == ["teacher", "hf", "again"]
    assert [model.fa_heads for model in found] == [8, 2, 2]
    assert [model.plan for model in found] == [None, ((1,), (3,)), ((1,), (3,))]
    made = json.loads((models / "hybrid/model.json").read_text())["provenance"]
    assert origins["hf"]["weights"] == made and "plan" in origins["hf"]
    assert origins["again"] == {"path": f"{models}/hf"}
    assert found[1].loss_by_position != found[0].loss_by_position
    losses = [[each.loss_nats for each in x.loss_by_position] for x in found[1:]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.dist
def test_a_teachers_checkpoint_answers_beside_its_hybrid_as_its_folder_does(
    models, tmp_path, monkeypatch
):
    texts, out = _scored_by_text(monkeypatch), tmp_path / "out.json"
    named = ["--model", f"teacher={models}/teacher", "--hf", f"folder={models}/qwen3"]
    assert cli.main([*_of_checkpoint(models, out), *named]) == 0
    found = {model.name: model for model in Generation.load(out).models}
    _check_teacher(found["teacher"], found["folder"])
    assert found["teacher"].tasks != found["hf"].tasks
    by_model = {name: texts[20 * i : 20 * (i + 1)] for i, name in enumerate(found)}
    assert len(texts) == 60
    assert by_model["teacher"] == by_model["folder"] != by_model["hf"]
    run_distributed(_ask_teacher_on_ranks, 2, models, tmp_path)
    (of_ranks,) = Generation.load(tmp_path / "ranks.json").models
    _check_teacher(of_ranks, found["folder"])


def _check_teacher(of_checkpoint: Any, of_folder: Any) -> None:
    assert of_checkpoint.tasks == of_folder.tasks
    assert 0 < sum(task.num_right for task in of_folder.tasks) < 20, "too dull to compare"
    for name in ("fa_heads", "total_heads", "cache_bytes_per_token", "state_bytes"):
        assert getattr(of_checkpoint, name) == getattr(of_folder, name), name
    losses = [[each.loss_nats for each in x.loss_by_position] for x in (of_checkpoint, of_folder)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0]


def _ask_teacher_on_ranks(models: Path, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        _scored_by_text(patch)
        named, out = {"teacher": models / "teacher"}, folder / "ranks.json"
        verb.generate(named, out, _prompts(models), batch_size=2, tensor_parallel=2)


@pytest.mark.dist
@pytest.mark.parametrize(
    "tensor",
    [pytest.param(2, id="tensor"), pytest.param(1, id="replicas", marks=pytest.mark.exhaustive)],
)
def test_two_ranks_go_on_where_one_was_killed(models, tmp_path, tensor):
    """The first two cells are one rank's, of which the third was killed.

    With another seed all ranks refuse, though the first alone has looked.
    """
    real, asked = CheckpointGenerator.generate, []

    def dies(self: Any, prompts: Any, *arguments: Any) -> Any:
        asked.append(prompts)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(self, prompts, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        _scored_by_text(patch)
        patch.setattr(CheckpointGenerator, "generate", dies)
        assert cli.main(_of_checkpoint(models, tmp_path / "out.json")) == 130
    run_distributed(_go_on, 2, models, tmp_path, tensor)
    _check(models, tmp_path / "out.json")
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def _prompts(models: Path) -> verb.Prompts:
    """Those of the options."""
    return verb.Prompts(
        ("niah_single_2", "vt"), (400, 500), 5, 1500, 1, "short", (f"{models}/text.txt",),
        TextOptions(),
    )  # fmt: skip


def _go_on(models: Path, folder: Path, tensor: int) -> None:
    prompts = _prompts(models)
    with pytest.MonkeyPatch.context() as patch:
        texts = _scored_by_text(patch)
        out, named = folder / "out.json", {"hf": models / "hybrid"}
        with pytest.raises(UserError, match="unfinished evaluation with another prompts"):
            verb.generate(named, out, replace(prompts, seed=2), tensor_parallel=tensor)
        verb.generate(named, out, prompts, batch_size=2, tensor_parallel=tensor)
    assert texts == json.loads((models / "texts.json").read_text())[10:]


@pytest.mark.dist
@pytest.mark.slow
def test_torchrun_starts_it(models, tmp_path):
    command = _of_checkpoint(models, tmp_path / "out.json", "--num-samples", "1")[1:]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    program = ["-m", "hydra_tools.evaluate", *command]
    done = start(program, environment, tmp_path / "log", ranks=2)
    assert done.wait(300) == 0, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert said.count("perplexity of held-out text by position") == 1
    found = Generation.load(tmp_path / "out.json")
    assert found.provenance["command"].startswith(
        "torchrun --nproc-per-node 2 -m hydra_tools.evaluate --generate --model hf="
    )
    folders = [*program, "--hf", f"other={models}/hf", "--overwrite"]
    assert start(folders, environment, tmp_path / "log", ranks=2).wait(300) != 0
    assert (
        "hf is a Hugging Face folder, which answers on one rank" in (tmp_path / "log").read_text()
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--generate"], "name the models with --model, or with --hf"),
        (["--hf", "{}/hf", "--model", "a={}/hybrid"], "; --generate takes both"),
        (["--generate", "--model", "a={}/gone"], "model folder .*gone does not exist"),
        (["--generate", "--hf", "{}/hybrid"], "or name it with --model and --generate"),
        (
            ["--generate", "--hf", "a={}/hf", "--model", "a={}/hybrid"],
            "--hf and --model both name 'a'",
        ),
        (["--generate", "--model", "a={}/hybrid", "--depths", "3"], "--depths is for --model wi"),
        (["--generate", "--model", "a={}/hybrid", "--tp", "2"], "number of ranks, 1, is not div"),
        (["--generate", "--model", "a={}/hybrid", "--tp", "0"], "the tensor-parallel size 0"),
        (["--model", "a={}/hybrid", "--tp", "1"], "--tp is for --generate or --hf"),
        (["--generate", "--model", "a={}/damaged"], "config does not match its teacher_config_"),
        (["--generate", "--model", "a={}/unplanned"], "cannot read .*plan.json"),
    ],
)
def test_bad_input_is_one_sentence(models, tmp_path, capsys, arguments, sentence):
    for name in ("damaged", "unplanned"):
        if not (models / name).exists():
            shutil.copytree(models / "hybrid", models / name)
    meta = json.loads((models / "hybrid/model.json").read_text())
    meta["config"]["num_layers"] = 3
    (models / "damaged/model.json").write_text(json.dumps(meta))
    (models / "unplanned/plan.json").unlink(missing_ok=True)
    words = [word.format(models) for word in arguments]
    assert cli.main(["evaluate", "--out", f"{tmp_path}/out.json", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("megatron-hydra: error: ") == 1
    assert re.search(sentence, error.strip().splitlines()[-1]), error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_on_a_gpu_whole_checkpoints_answer_as_their_folders_do(tmp_path, dtype):
    """The quickstart's teacher, which finds all needles at its length, and a hybrid of it."""
    teacher, plan = ROOT / "examples/quickstart/teacher", tmp_path / "plan.json"
    scores = ["--scores", f"{ROOT}/examples/quickstart/scores.json", "--fa-ratio", "1/4"]
    assert cli.main(["plan", *scores, "--out", str(plan)]) == 0
    convert = ["convert", "--teacher", str(teacher), "--out"]
    assert cli.main([*convert, f"{tmp_path}/teacher"]) == 0
    assert cli.main([*convert, f"{tmp_path}/hybrid", "--plan", str(plan)]) == 0
    export = ["export", "--model", f"{tmp_path}/hybrid", "--out", f"{tmp_path}/hf"]
    assert cli.main(export) == 0
    named = ["--hf", f"teacher_hf={teacher}", "--model", f"teacher={tmp_path}/teacher"]
    named += ["--hf", f"hybrid_hf={tmp_path}/hf", "--model", f"hybrid={tmp_path}/hybrid"]
    asked = ["--tasks", "niah_single_2,niah_multikey_1", "--lengths", "256", "--num-samples", "20"]
    asked += ["--wording", "short", "--perplexity-tokens", "4096", "--serve-dtype", dtype]
    out = tmp_path / "out.json"
    assert cli.main(["evaluate", "--generate", *named, *asked, "--out", str(out)]) == 0
    found = {model.name: model for model in Generation.load(out).models}
    for folder, checkpoint in (("teacher_hf", "teacher"), ("hybrid_hf", "hybrid")):
        right = [[task.num_right for task in found[name].tasks] for name in (folder, checkpoint)]
        assert right[0] == right[1] and (folder != "teacher_hf" or min(right[0]) == 20)
        losses = [
            [each.loss_nats for each in found[name].loss_by_position]
            for name in (folder, checkpoint)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3 if dtype == "fp32" else 1e-2)
