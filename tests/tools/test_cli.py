"""Tests of the command line: dispatch, exit codes, and the plan verb from end to end."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hydra_tools import cli
from kit.scores import make_scores

from megatron_hydra import __version__
from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.combination import Combination

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """Two layers of 4 heads in 2 groups; three heads have evidence."""
    rows = [[0.0, 0.9, 0.0, 0.0], [0.4, 0.3, 0.0, 0.0]]
    path = tmp_path / "scores.json"
    make_scores(rows, num_query_groups=2, teacher_config_hash="abc").save(path)
    return path


def plan_arguments(scores: Path, *more: str) -> list[str]:
    out = scores.with_name("plan.json")
    return ["plan", "--scores", str(scores), "--out", str(out), *more]


def install_verb(monkeypatch: pytest.MonkeyPatch, raises: BaseException) -> None:
    """Put a `score` verb in place that raises."""

    def run(args: object) -> int:
        raise raises

    module = types.SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setitem(sys.modules, "hydra_tools.score", module)  # type: ignore[arg-type]


def test_user_errors_are_one_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install_verb(monkeypatch, UserError("the cup is empty: fill it"))
    assert cli.main(["score"]) == 2
    assert capsys.readouterr().err == "megatron-hydra: error: the cup is empty: fill it\n"


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    install_verb(monkeypatch, ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["score"])


def test_interruption_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    install_verb(monkeypatch, KeyboardInterrupt())
    assert cli.main(["score"]) == 130


def test_a_reader_that_leaves_is_no_error(scores: Path) -> None:
    plan = subprocess.Popen(
        [sys.executable, "-m", "hydra_tools.cli", *plan_arguments(scores, "--fa-heads", "2")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert plan.stdout is not None
    assert plan.stderr is not None
    plan.stdout.close()
    assert plan.stderr.read() == ""
    assert plan.wait() == 141
    assert scores.with_name("plan.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--version"], 0, f"megatron-hydra {__version__}"),
        (["--help"], 0, "choose the heads that keep full attention"),
        ([], 2, "no verb given: use one of doctor, score, plan"),
        (["pln"], 2, "unknown verb 'pln': did you mean 'plan'?"),
        (["zzz"], 2, "unknown verb 'zzz': use one of doctor, score, plan"),
        (["plan"], 2, "the following arguments are required: --scores"),
        (["plan", "--scores", "s", "--out", "o", "--fa-ratio", "x"], 2, "'x' is no ratio"),
        (["plan", "--scores", "s", "--out", "o", "--fa-ratio", "1/0"], 2, "'1/0' is no ratio"),
        (["plan", "--scores", "s", "--out", "o", "--context", "0"], 2, "'0' is no number of tok"),
        (["plan", "--scores", "s", "--out", "o"], 2, "--fa-ratio --fa-heads --kv-cache-ratio"),
    ],
)
def test_help_and_usage_errors(
    arguments: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    captured = capsys.readouterr()
    assert exit_info.value.code == code
    assert text in (captured.err if code else captured.out)


def test_plan_writes_plan_and_picture_and_tells_what_it_chose(
    scores: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = plan_arguments(scores, "--fa-ratio", "1/2", "--min-fa-per-layer", "1")
    assert cli.main(arguments) == 0
    plan = HeadPlan.load(scores.with_name("plan.json"))
    assert [layer.fa_heads for layer in plan.layers] == [(0, 1), (0, 1)]
    assert plan.teacher_config_hash == "abc"
    assert plan.provenance["command"].startswith("megatron-hydra")
    png = scores.with_name("plan.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", png[16:24])
    assert width > 400
    assert height > 200
    out = capsys.readouterr().out
    assert "layer 0 │[·][9]│ ·  · │ 2 FA, 1 of 2 groups stored" in out
    assert "layer 1 │[4][3]│ ·  · │ 2 FA, 1 of 2 groups stored" in out
    assert (
        "4 of 8 heads keep full attention (FA), the others become LA heads (4 Gated DeltaNet)"
        in out
    )
    assert "KV cache: 50% of the teacher's (2 of 4 query groups are stored)" in out
    assert "ties: 1 FA heads won over a head of equal score" in out
    assert "no evidence: 1 FA heads" in out
    assert "\x1b" not in out, "no colours where there is no terminal"


@pytest.mark.parametrize(
    ("budget", "heads"),
    [
        (("--kv-cache-ratio", "1/4"), [(1,), ()]),
        (("--kv-cache-ratio", "0.5"), [(1,), (0, 1)]),
        (("--kv-cache-ratio", "1/2", "--whole-groups"), [(0, 1), (0, 1)]),
        (("--cache-gib", "8e-6", "--context", "128"), [(1,), ()]),
        (("--decode-ms", "1.4e-4", "--context", "4096", "--device", "h200"), [(1,), (0, 1)]),
        (("--fa-heads", "4", "--per-layer", "2"), [(0, 1), (0, 1)]),
        (("--fa-heads", "2", "--multiple-of", "2"), [(0, 1), ()]),
    ],
)
def test_plan_takes_every_budget_and_constraint(
    scores: Path, budget: tuple[str, ...], heads: list[tuple[int, ...]]
) -> None:
    assert cli.main(plan_arguments(scores, *budget)) == 0
    plan = HeadPlan.load(scores.with_name("plan.json"))
    assert [layer.fa_heads for layer in plan.layers] == heads


def test_plan_combines_the_effects_anew(tmp_path: Path) -> None:
    """Scorer a prefers head 0, b head 1; capability x head 0, y head 1."""
    a, b = np.array([[[0.9, 0.1]]]), np.array([[[0.1, 0.8]]])
    effects = {"a": {"x": a, "y": 0.5 * b}, "b": {"x": b}}
    path = tmp_path / "scores.json"
    make_scores(effects, capabilities={"x": "x", "y": "y"}, combination=Combination(("a",))).save(
        path
    )
    for overrides, head in (
        ([], 0),
        (["combine.weights.x=0.1"], 1),
        (["combine.scorers=b"], 1),
        (["combine.normalise=false", "combine.consistency=false"], 0),
        (["combine.scorers=[b,a]", "combine.weights.y=0.1", "combine.normalise=false"], 0),
    ):
        out = f"{tmp_path}/plan.json"
        command = ["plan", "--scores", str(path), "--fa-heads", "1", "--out", out, "--overwrite"]
        assert cli.main([*command, *overrides]) == 0
        plan = HeadPlan.load(out)
        assert plan.layers[0].fa_heads == (head,), overrides
        assert ("combine.scorers=b" in overrides) == (
            plan.provenance["combination"]["scorers"] == ["b"]
        )


def test_random_plan_keeps_the_budget_and_says_so(
    scores: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--fa-heads", "3", "--min-fa-per-layer", "1", "--random-seed", "7")
    assert cli.main(plan_arguments(scores, *more)) == 0
    plan = HeadPlan.load(scores.with_name("plan.json"))
    assert all(layer.fa_heads for layer in plan.layers)
    assert plan.num_fa_heads == 3
    assert (plan.provenance["policy"], plan.provenance["seed"]) == ("random", 7)
    out = capsys.readouterr().out
    assert "drawn at random with seed 7: the scores decided nothing" in out
    assert "ties" not in out


def test_rounded_budget_is_said(scores: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(plan_arguments(scores, "--fa-ratio", "1/3")) == 0
    assert "the ratio asks for 2.667 heads: rounded to 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("budget", "way_out"),
    [
        (["--fa-heads", "0"], r"the least budget that keeps one is 1 FA head"),
        (["--fa-heads", "0", "--whole-groups"], r"the least budget that keeps one is 2 FA heads"),
        (["--fa-heads", "0", "--per-layer", "0"], r"FA heads per layer: 0 allows none"),
        (["--cache-gib", "1.2e-5", "--context", "1024"], r"that keeps one is (\S+) GiB"),
        (["--decode-ms", "1e-4", "--context", "32768"], r"that keeps one is (\S+) ms"),
    ],
)
def test_a_plan_without_an_fa_head_says_so_and_names_the_way_out(
    scores: Path, capsys: pytest.CaptureFixture[str], budget: list[str], way_out: str
) -> None:
    assert cli.main(plan_arguments(scores, *budget)) == 0
    assert HeadPlan.load(scores.with_name("plan.json")).num_fa_heads == 0
    printed = capsys.readouterr().out
    assert cli.main(["inspect", str(scores.with_name("plan.json"))]) == 0
    for text in (printed, capsys.readouterr().out):
        (line,) = (line for line in text.splitlines() if line.startswith("WARNING: no head keeps"))
        found = re.search(way_out, line)
        assert found, line
    if not found.groups():
        return
    for share, number in ((1, 1), (0.98, 0)):  # just as much, and hardly less
        amount = str(share * float(found[1]))
        words = [budget[0], amount, *budget[2:], "--overwrite"]
        assert cli.main(plan_arguments(scores, *words)) == 0
        plan = HeadPlan.load(scores.with_name("plan.json"))
        assert min(plan.num_fa_heads, 1) == number


def test_without_evidence_no_larger_budget_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "scores.json"
    make_scores([[0.0, 0.0], [0.0, 0.0]], num_query_groups=1).save(path)
    assert cli.main(plan_arguments(path, "--kv-cache-ratio", "1/2")) == 0
    assert "no head has a score above 0, so only --fa-heads would" in capsys.readouterr().out


def test_a_budget_that_no_plan_keeps_to_names_the_least_with_an_fa_head(
    scores: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(plan_arguments(scores, "--cache-gib", "1e-9", "--context", "4096")) == 2
    error = capsys.readouterr().err
    least = re.search(r"possible is (\S+) GiB, and (\S+) GiB with a head on full attention", error)
    assert least is not None, error
    for amount, number in ((least[1], 0), (least[2], 1)):
        words = ["--cache-gib", amount, "--context", "4096", "--overwrite"]
        assert cli.main(plan_arguments(scores, *words)) == 0
        assert HeadPlan.load(scores.with_name("plan.json")).num_fa_heads == number


def test_a_cost_budget_without_a_length_is_counted_at_the_default_and_says_so(
    scores: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(plan_arguments(scores, "--cache-gib", "8")) == 0
    printed = capsys.readouterr().out
    assert "budget: 8 GiB of cache and state at 32,768 tokens (bf16)" in printed
    assert "budget and costs are told at 32,768 tokens, the default: --context names" in printed
    budget = HeadPlan.load(scores.with_name("plan.json")).provenance["budget"]
    assert budget["context_tokens"] == 32768
    assert (
        cli.main(plan_arguments(scores, "--cache-gib", "8", "--context", "9", "--overwrite")) == 0
    )
    assert "the default" not in capsys.readouterr().out


def test_colours_appear_on_a_terminal(
    scores: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert cli.main(plan_arguments(scores, "--fa-heads", "2")) == 0
    assert capsys.readouterr().out.count("●") == 1 + 2  # the legend and two heads
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.main(plan_arguments(scores, "--fa-heads", "2", "--overwrite")) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--fa-heads", "9"], "9 FA heads asked for, but the model has 8 heads"),
        (["--fa-heads", "1", "--min-fa-per-layer", "1"], "cannot give 1 to each of 2 layers"),
        (["--fa-heads", "1", "--min-fa-per-layer", "1", "--random-seed", "0"], "cannot give 1"),
        (["--fa-ratio", "2"], "ratio of FA heads 2 must be above 0 and at most 1"),
        (["--kv-cache-ratio", "1/4", "--min-fa-per-layer", "1"], "the least possible is 1/2"),
        (["--decode-ms", "1e-9", "--context", "64"], "the least possible is"),
        (["--fa-heads", "3", "--whole-groups"], "ask for 2 or 4"),
        (["--fa-heads", "2", "combine.consistancy=false"], "did you mean combine.consistency"),
        (["--fa-heads", "2", "combine.scorers=guess"], "names scorer 'guess'"),
        (["--fa-heads", "2", "combine.weights.poetry=1"], "capability 'poetry'"),
        (["--fa-heads", "2", "combine.normalise=maybe"], "combine.normalise is 'maybe'"),
        (["--fa-heads", "1", "--png", "/proc/plan.png"], "cannot write /proc/plan.png"),
        (["--fa-heads", "1", "--scores", "none.json"], "cannot read none.json"),
        (["--fa-heads", "1", "--out", "{folder}/plan.png"], "two outputs would be written to"),
        (["--fa-heads", "1", "--out", "{folder}/scores.json"], "would replace the input"),
        (
            ["--fa-heads", "1", "--overwrite", "--out", "{folder}/scores.json"],
            "would replace the input",
        ),
    ],
)
def test_bad_input_leaves_nothing_behind(
    scores: Path, more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [text.format(folder=scores.parent) for text in more]
    before = sorted(os.listdir(scores.parent))
    assert cli.main(plan_arguments(scores, *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("megatron-hydra: error: ")
    assert sentence in error
    assert error.count("\n") == 1
    assert sorted(os.listdir(scores.parent)) == before


def test_existing_outputs_need_overwrite(scores: Path) -> None:
    assert cli.main(plan_arguments(scores, "--fa-heads", "2")) == 0
    assert cli.main(plan_arguments(scores, "--fa-heads", "3")) == 2
    assert HeadPlan.load(scores.with_name("plan.json")).num_fa_heads == 2
    assert cli.main(plan_arguments(scores, "--fa-heads", "3", "--overwrite")) == 0
    assert HeadPlan.load(scores.with_name("plan.json")).num_fa_heads == 3


@pytest.mark.parametrize(
    ("verb", "others"),
    [
        ("plan", {"matplotlib"}),
        ("inspect", {"matplotlib"}),
        ("pareto", {"matplotlib"}),
        ("report", set()),
        ("evaluate", {"matplotlib"}),
    ],
)
def test_verbs_without_a_model_start_without_pytorch(verb: str, others: set[str]) -> None:
    """They are quick, so they must not wait for imports they do not need."""
    heavy = {"torch", "megatron", "nemo", "transformers"} | others
    code = (
        f"import sys; from hydra_tools import cli, {verb}; "
        f"heavy = {heavy} & sys.modules.keys(); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("environment", "start"),
    [
        ({}, "megatron-hydra train"),
        ({"WORLD_SIZE": "2"}, "torchrun --nproc-per-node 2 -m hydra_tools.train"),
        ({"WORLD_SIZE": "6"}, "torchrun --nnodes 3 --nproc-per-node 2 -m hydra_tools.train"),
    ],
)
def test_recorded_training_command_can_be_typed_again(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], start: str
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    words = ["--config", "a.yaml", "data.seed=4", "--overwrite"]
    assert cli.typed("train", words) == [*start.split(), *words]


_OTHER_RANK = """
from hydra_tools.cli import run_verb
from megatron_hydra.errors import UserError
try:
    run_verb("plan", ["--scores", "none", "--out", "plan.json", "--fa-heads", "1"], "plan")
except UserError:
    pass
from megatron_hydra.cpu import install_if_needed
install_if_needed()
import megatron.core.models.gpt.gpt_layer_specs
"""


def test_every_rank_is_quiet_about_optional_packages(tmp_path: Path) -> None:
    """Catches filters that rank 0 alone sets: three ranks said 21 times what is not installed."""
    run = subprocess.run(
        [sys.executable, "-c", _OTHER_RANK],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (run.returncode, run.stderr) == (0, "")
