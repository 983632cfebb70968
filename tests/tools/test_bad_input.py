"""Bad input to the command line: one clear sentence, exit code 2, nothing written or changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra_tools import cli
from kit.plans import all_fa
from kit.scores import make_scores
from kit.tiny_qwen3 import write_tiny_qwen3
from safetensors.torch import load_file, save_file

from megatron_hydra.head_plan import HeadPlan

ENOUGH_TEXT = "The quick brown fox jumps over the lazy dog.\n" * 1000


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("good") / "teacher")


@pytest.fixture
def inputs(tmp_path: Path, teacher: Path) -> Path:
    """A folder with one good input of each kind; a test spoils one of them."""
    folder = tmp_path / "inputs"
    shutil.copytree(teacher, folder / "teacher")
    HeadPlan.from_fa_heads({0: [1], 1: [2, 3]}, 2, 4, 2).save(folder / "plan.json")
    rows = [[0.0, 0.9, 0.0, 0.0], [0.4, 0.3, 0.0, 0.0]]
    make_scores(rows, num_query_groups=2).save(folder / "scores.json")
    (folder / "text.txt").write_text(ENOUGH_TEXT)
    (folder / "empty.txt").write_text(" \n")
    (folder / "lines.txt").write_text('{"text": "JSON lines by another name"}\n')
    (folder / "taken").write_text("an earlier result")
    return folder


def refuse(inputs: Path, capsys: pytest.CaptureFixture[str], command: str) -> str:
    """Run a command that must be refused; return its one sentence.

    ``IN`` in the command stands for the inputs' folder; ``OUT`` for a place beside it.
    """
    root = inputs.parent

    def snapshot() -> dict[str, bytes | None]:
        return {
            str(path): path.read_bytes() if path.is_file() else None
            for path in sorted(root.rglob("*"))
        }

    before = snapshot()
    words = command.replace("IN/", f"{inputs}/").replace("OUT", str(root / "out")).split()
    assert cli.main(words) == 2
    assert snapshot() == before, "something was written"
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    prefix = "megatron-hydra: error: "
    assert lines[-1].startswith(prefix)
    assert not any("Traceback" in line for line in lines)
    return lines[-1].removeprefix(prefix)


CONVERT = "convert --teacher IN/teacher --plan IN/plan.json --out OUT"
SCORE = (
    "score --teacher IN/teacher --out OUT probes.pairs=1 probes.length=120 probes.names=[single]"
)
PLAN = "plan --scores IN/scores.json --fa-ratio 1/4 --out OUT"
PARETO = "pareto --scores IN/scores.json --budgets 1/4,1/2 --out OUT"
INSPECT = "inspect IN/plan.json"
PREPROCESS = "preprocess --input IN/text.txt --tokenizer IN/teacher --out OUT"
EVALUATE = (
    "evaluate --model teacher=IN/teacher --out OUT --lengths 120 --num-samples 5 --tasks single"
)
VERBS = {"convert": CONVERT, "score": SCORE, "plan": PLAN, "pareto": PARETO,
         "preprocess": PREPROCESS, "evaluate": EVALUATE}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (CONVERT.replace("IN/teacher", "IN/nothing"), "inputs/nothing does not exist"),
        (SCORE.replace("IN/teacher", "IN/nothing"), "inputs/nothing does not exist"),
        (EVALUATE.replace("IN/teacher", "IN/nothing"), "inputs/nothing does not exist"),
        (PLAN.replace("scores.json", "nothing"), "cannot read"),
        (PREPROCESS.replace("text.txt", "nothing"), "cannot read"),
        (PREPROCESS.replace("IN/teacher", "IN/nothing"), "cannot load a tokenizer"),
        (CONVERT.replace("plan.json", "nothing"), "cannot read"),
        (CONVERT.replace("plan.json", "scores.json"), "kind 'head_plan' is needed"),
        (PLAN.replace("scores.json", "plan.json"), "kind 'head_scores' is needed"),
        (f"{CONVERT} --calibration-text IN/empty.txt", "empty.txt is empty"),
        (f"{SCORE} probes.text=IN/empty.txt", "empty.txt is empty"),
        (f"{EVALUATE} --text IN/empty.txt", "empty.txt is empty"),
        (PREPROCESS.replace("text.txt", "empty.txt"), "empty.txt is empty"),
        (f"{CONVERT} --calibration-text IN/lines.txt", "lines.txt starts with a JSON object"),
        (f"{SCORE} probes.text=IN/lines.txt", "lines.txt starts with a JSON object"),
        (f"{EVALUATE} --text IN/lines.txt", "lines.txt starts with a JSON object"),
        (f"{SCORE} probes.text=IN/nothing", "cannot read the text file"),
        (f"{EVALUATE} --text IN/text.txt IN/nothing", "cannot read the text file"),
        (f"{EVALUATE} --text IN/lines.txt --text-format jsonl --text-key no", 'has no "no", but'),
        (
            f"{CONVERT} --calibration-text IN/text.txt --calibration-tokens 99999",
            "has 45000 tokens, fewer than the calibration tokens, 99999",
        ),
        (f"{CONVERT} --calibration-length 9999", "allowed: 1 to the calibration tokens, 8192"),
        (
            f"{PREPROCESS} --retrieval-fraction 0 --seq-length 99999 --num-documents 1",
            "but 99999 are needed",
        ),
        (SCORE.replace("length=120", "length=500"), "built for 128 tokens at most"),
        (f"{CONVERT} fa_ropes=true", "unknown model option fa_ropes; did you mean fa_rope"),
        (f"{CONVERT} fa_rope", "override 'model.fa_rope' must read section.key=value"),
        (f"{CONVERT} fa_rope=true model.fa_rope=false", "option model.fa_rope is given twice"),
        (f"{CONVERT} data.seq_length=4", "options of the section model alone, not of data"),
        (f"{CONVERT} model.la_kind=kimi", "la_kind is 'kimi'; allowed: gated_delta_net, kda"),
        (f"{CONVERT} fa_rope=maybe", "fa_rope is 'maybe'; it must be a bool"),
        (f"{CONVERT} fusion=sum", "fusion is 'sum'; allowed"),
        (f"{CONVERT} num_layers=1", "given by the teacher"),
        (f"{CONVERT} placement=by_type", "does not store placement"),
        (PLAN.replace("1/4", "3"), "ratio of FA heads 3 must be above 0 and at most 1"),
        (f"{PLAN} --per-layer 2", "cannot give 2 to each of 2 layers: that takes 4"),
        (PLAN.replace("fa-ratio", "kv-cache-ratio") + " --per-layer 1", "least possible is 1/2"),
        (f"{PLAN} combine.scorers=nobody", "names scorer 'nobody'"),
        (PARETO.replace("scores.json", "plan.json"), "kind 'head_scores' is needed"),
        (PARETO.replace("1/2", "1/100"), "ratio 1/100 of 8 heads is less than half a head"),
        (INSPECT.replace("plan", "nothing"), "cannot read"),
        (INSPECT.replace("plan", "scores"), "kind 'head_plan' is needed"),
        (f"{INSPECT} --pictures OUT", "--pictures needs --scores"),
    ],
)
def test_bad_arguments(
    inputs: Path, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    assert message in refuse(inputs, capsys, command)


@pytest.mark.parametrize("verb", VERBS)
def test_existing_output_is_kept(
    inputs: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    suffixes = {"preprocess": ".idx"}  # its output is a prefix
    taken = inputs.parent / f"out{suffixes.get(verb, '')}"
    if verb == "convert":
        taken.mkdir()
    earlier = taken / "model.json" if verb == "convert" else taken
    earlier.write_text("an earlier result")
    message = refuse(inputs, capsys, VERBS[verb])
    assert f"{taken} exists" in message and "--overwrite" in message


@pytest.mark.parametrize("verb", VERBS)
def test_unwritable_output(inputs: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    command = VERBS[verb].replace("OUT", "IN/taken/out")  # a file stands where a folder must be
    assert "cannot write" in refuse(inputs, capsys, command)


def _edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(teacher: Path) -> None:
        path = teacher / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def _truncate(teacher: Path) -> None:
    path = teacher / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _integers(teacher: Path) -> None:
    path = teacher / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("verb", ["convert", "score", "evaluate"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_edit_config(model_type="gemma3"), "model_type 'gemma3'; supported: qwen3, qwen2"),
        (_integers, "dtype I32; allowed: F32, BF16, F16"),
        (_truncate, "truncated"),
        (lambda teacher: (teacher / "config.json").unlink(), "config.json"),
    ],
    ids=["not-qwen3", "dtype", "truncated", "no-config"],
)
def test_bad_teacher(
    inputs: Path,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    spoil(inputs / "teacher")
    assert message in refuse(inputs, capsys, VERBS[verb])


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (all_fa(3, 4, 2), "3 layers of 4 heads in 2 query groups, but the teacher has 2"),
        (all_fa(2, 4, 4), "in 4 query groups, but the teacher has"),
        (all_fa(2, 4, 2, "feed" * 16), "made for another teacher"),
    ],
    ids=["layers", "groups", "hash"],
)
def test_plan_of_another_teacher(
    inputs: Path, capsys: pytest.CaptureFixture[str], plan: HeadPlan, message: str
) -> None:
    plan.save(inputs / "plan.json", overwrite=True)
    assert message in refuse(inputs, capsys, CONVERT)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([{"layer": 0, "fa_heads": [4]}, {"layer": 1, "fa_heads": []}], "unknown head 4"),
        ([{"layer": 0, "fa_heads": []}, {"layer": 2, "fa_heads": []}], "unknown layer 2"),
        ([{"layer": 0, "fa_heads": []}], "layer 1 is missing"),
    ],
)
def test_broken_plan(
    inputs: Path, capsys: pytest.CaptureFixture[str], layers: list, message: str
) -> None:
    path = inputs / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layers": layers}))
    assert message in refuse(inputs, capsys, CONVERT)


def test_good_input_passes(inputs: Path) -> None:
    """Else every refusal above could be of something else."""
    for verb in ("convert", "plan", "pareto", "preprocess"):
        command = VERBS[verb].replace("IN/", f"{inputs}/").replace("OUT", f"{inputs}/{verb}")
        assert cli.main(command.split()) == 0, verb
    hybrid = f"hybrid={inputs}/convert"
    command = EVALUATE.replace("IN/", f"{inputs}/").replace("OUT", f"{inputs}/evaluation.json")
    assert cli.main([*command.split(), "--model", hybrid, "--perplexity-tokens", "241"]) == 0
