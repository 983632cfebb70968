"""`megatron-hydra transfer`: which steps run, told by what they read.

Commands are replaced by `kit.transfers`.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hydra_tools import cli, transfer
from hydra_tools.transfer_steps import check_evaluating, load_steps
from kit.transfers import (
    ROOT,
    STAGES,
    STEPS,
    command_of,
    environment,
    steps_run,
    write_text,
)

from megatron_hydra.training.config import load_config

ALL = ["teacher", "scores.json", "plan.json", "converted", *STAGES, "hydra-hf", "generation.json",
       "report.html"]  # fmt: skip


def _touch(path: str, text: str) -> Callable[[Path], None]:
    return lambda folder: write_text(folder / path, text)


@pytest.mark.parametrize(
    ("change", "more", "again"),
    [
        (None, [], []),
        (None, ["plan.fa_ratio=1/8"], ALL[2:]),
        (None, ["stage2_distill.optim.lr=5e-4"], ALL[5:]),
        (None, ["stage2_distill.trainer.max_steps=3"], ALL[5:]),
        (None, ["stage1_align.resume.keep=1", "stage1_align.log.every_n_steps=7"], []),
        (None, ["evaluate.num_samples=7"], ALL[8:]),
        (None, ["evaluate.wording=ruler"], ALL[8:]),
        (None, ["export.dtype=bfloat16"], ALL[7:]),
        (None, ["score.probes.seed=3"], ALL[1:]),
        (_touch("data.bin", "others"), [], ALL[4:]),
        (_touch("teacher/model.safetensors", "others"), [], ALL),
        (_touch("run/plan.json", "edited by hand"), [], ALL[3:]),
        (_touch("run/hydra-hf/model.safetensors", "others"), [], ALL[8:]),
        (lambda folder: (folder / "run/generation.json").unlink(), [], ["generation.json"]),
        (lambda folder: shutil.rmtree(folder / "run/converted"), [], ["converted"]),
    ],
)  # fmt: skip
def test_what_is_run_again_is_what_depends_on_a_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], object] | None, more: list[str], again: list[str],
) -> None:  # fmt: skip
    """Catches a step that is skipped though an input is another, and one that runs for nothing."""
    assert steps_run(monkeypatch, folder) == ALL
    if change is not None:
        change(folder)
    assert steps_run(monkeypatch, folder, *more) == again
    assert steps_run(monkeypatch, folder, *more) == []


@pytest.mark.parametrize("place", ["scores.json", "converted", "stage2_distill", "generation.json"])
def test_a_step_that_fails_is_gone_on_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    position = ALL.index(place)
    assert steps_run(monkeypatch, folder, fails_at=place) == ALL[: position + 1]
    if place == "stage2_distill":
        assert (folder / "run" / place / "metrics.jsonl").is_file()
    assert steps_run(monkeypatch, folder) == ALL[position:]


def test_what_goes_on_is_cleared_only_for_other_inputs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a long step that begins anew after a crash, or goes on with another's results."""
    run = folder / "run"
    steps_run(monkeypatch, folder)
    trained = run / "stage2_distill/hybrid/weights/__0_0.distcp"
    unfinished = run / "scores.json.partial/run.json"
    seen = []

    def look(self: object, command: Sequence[str]) -> int:
        seen.append((trained.exists(), (run / "scores.json").exists(), unfinished.exists()))
        return 3

    monkeypatch.setattr(transfer._Child, "run", look)
    assert cli.main(command_of(folder, "stage2_distill.trainer.max_steps=5")) == 3
    assert seen.pop() == (True, True, False), "longer: it goes on"
    assert cli.main(command_of(folder, "stage2_distill.optim.lr=5e-4")) == 3
    assert seen.pop() == (False, True, False), "another run"
    for change in ("convert.reuse=nothing", "score.probes.seed=3"):
        unfinished = run / f"{'converted' if 'reuse' in change else 'scores.json'}.partial/run.json"
        for is_kept in (False, True):
            write_text(unfinished, "{}")
            assert cli.main(command_of(folder, change)) == 3
            assert seen.pop() == (False, "reuse" in change, is_kept)


def test_a_dry_run_tells_and_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def said(*more: str) -> dict[str, str]:
        capsys.readouterr()
        assert cli.main([*command_of(folder, *more), "--dry-run"]) == 0
        lines = capsys.readouterr().out.splitlines()
        return dict(re.split(r"\s+", line, maxsplit=1) for line in lines)

    assert said() == dict.fromkeys(STEPS, "to run")
    assert not (folder / "run").exists()
    steps_run(monkeypatch, folder, fails_at="stage1_align")
    before = (folder / "run/transfer.json").read_bytes()
    rest = dict.fromkeys(STEPS[5:], "to run")
    assert said() == {**dict.fromkeys(STEPS[:4], "done"), "stage1_align": "to go on", **rest}
    assert (folder / "run/transfer.json").read_bytes() == before
    steps_run(monkeypatch, folder)
    assert said() == dict.fromkeys(STEPS, "done")
    found = said("plan.fa_ratio=1/8")
    assert [found[name] for name in STEPS[:4]] == [
        "done", "done", "to run again, as plan.fa_ratio changed",
        "to run again if plan.json will have changed",
    ]  # fmt: skip
    write_text(folder / "run/plan.json", "edited by hand")
    assert said()["convert"] == "to run again, as plan.json changed"
    (folder / "run/scores.json").unlink()
    assert said()["score"] == f"to run again, as {folder}/run/scores.json is missing"


def test_a_dry_run_tells_how_much_of_a_step_is_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """By this the Slurm script tells whether a job gets on."""

    def said(step: str) -> str:
        capsys.readouterr()
        assert cli.main([*command_of(folder), "--dry-run"]) == 0
        return dict(re.findall(r"^(\w+) +(.*)$", capsys.readouterr().out, re.M))[step]

    steps_run(monkeypatch, folder, fails_at="scores.json")
    assert said("score") == "to go on"
    for name in ("run.json", ".lock", "clean.npy", "swaps.npy", ".more.npy.7.partial"):
        write_text(folder / "run/scores.json.partial" / name, "")
    assert said("score") == "to go on with 2 measurements kept"
    shutil.rmtree(folder / "run/scores.json.partial")
    steps_run(monkeypatch, folder, fails_at="stage1_align")
    for step in (4, 10, 12):
        write_text(folder / f"run/stage1_align/checkpoints/step_{step}/weights/.metadata", "")
    assert said("stage1_align") == "to go on after step 12"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["plan.fa_ratoi=1/4"], r"step plan: unrecognized arguments: --fa-ratoi=1/4"),
        (["plan.window_ratio=1/4"], r"step plan: the plan needs mean_ablation and window_ablatio"),
        (["plan.fa_heads=4"], r"step plan: argument --fa-\w+: not allowed with argument"),
        (["plan.out=here"], r"plan\.out is not for a transfer\.yaml: its steps hand files on"),
        (["evaluate.generate=false"], r"evaluate\.generate is not for a transfer\.yaml"),
        (["evaluate.training_length=64"], r"step evaluate: --training-length is for --model with"),
        (["evaluate.tasks=single"], r"step evaluate: unknown generation task 'single'; known: ni"),
        (["evaluate.lengths=32768"], r"step evaluate: --perplexity-tokens is 16384, less than on"),
        (["evaluate.tp=2"], r"step evaluate: --tp 2 is for torchrun, and this step is one process"),
        (["report.generation=g.json"], r"report\.generation is not for a transfer\.yaml"),
        (["score.run.out=here"], r"score\.run\.out is not for a transfer\.yaml"),
        (["stage1_align.optim.rate=1"], r"step stage1_align: unknown config key optim\.rate"),
        (["stage1_align.steps=1"], r"stage1_align\.steps must be stage1_align\.section\.key"),
        (["stage4.optim.lr=1"], r"unknown config key stage4: did you mean"),
        (["run.launcher=srunn -n 2"], r"run\.launcher starts with srunn, which is no command here"),
        (["run.teacher=nowhere"], r"model folder nowhere does not exist"),
        (["stage2_distill.data.paths=[a/b]"], r"no indexed dataset a/b: a/b\.idx is missing"),
    ],
)  # fmt: skip
def test_bad_input_is_said_before_a_step_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, more: list[str],
    message: str) -> None:  # fmt: skip
    monkeypatch.setattr(transfer._Child, "run", None)
    assert cli.main(command_of(folder, *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^megatron-hydra: error: {message}", line), line


def test_results_of_unknown_origin_are_not_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(transfer._Child, "run", None)
    write_text(folder / "run/scores.json", "of hours")
    assert cli.main(command_of(folder)) == 2
    assert "scores.json exists, but" in capsys.readouterr().err
    assert (folder / "run/scores.json").read_text() == "of hours"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert cli.main(command_of(folder)) == 2
    assert "start transfer without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*/transfer.yaml")), ids=str)
def test_the_examples_hand_on_what_their_stages_name(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    own = load_config(path.parent / "stage1_align.yaml").folder.parent
    _, steps = load_steps(path, [f"run.folder={own}"])
    assert [step.name for step in steps] == list(STEPS)
    check_evaluating(next(step for step in steps if step.name == "evaluate"))
    for stage in STAGES:
        (step,) = (step for step in steps if step.name == stage)
        assert step.run == load_config(path.parent / f"{stage}.yaml")
        # A release that adds a key with a default must not have a stage train again.
        assert f"{stage}.optim.lr" in step.settings and f"{stage}.optim.beta1" not in step.settings


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_handed_on_as_one_that_torchrun_knows(number: signal.Signals) -> None:
    """Each of these ends with the code by which the job goes on; a step hears of SIGTERM alone."""
    step = (
        "import signal, sys\nsignal.signal(15, lambda *_: sys.exit(7))\n"
        "print('ready', flush=True)\nsignal.pause()"
    )
    program = f"""
import sys
from hydra_tools.transfer import _Child
with _Child.hears_signals() as child:
    code = child.run([sys.executable, "-c", {step!r}])
    print(code, child.stopped)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment(),
        # A shell has what it starts in the background ignore SIGINT.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == f"7 {number.name}\n"
