"""`megatron-hydra transfer`: which steps run, told by what they read; the slow test runs them all.

In the fast ones a step's command is replaced by one that writes a file of everything it was given,
so that an output differs exactly if what it is made of does.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hydra_tools import cli, transfer
from hydra_tools.transfer_steps import load_steps

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.training.config import load_config
from megatron_hydra.training.run_files import HEADER

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/quickstart/transfer.yaml"
TEACHER = ROOT / "examples/quickstart/teacher"
STEPS = ("convert_teacher", "score", "plan", "convert", "stage1_align", "stage2_distill",
         "stage3_long_context", "evaluate", "export", "report")  # fmt: skip
STAGES = STEPS[4:7]


def _stand_in(ran: list[str], fails_at: str = "") -> Callable[..., int]:
    """A runner of commands that notes them and writes what they would, of what they read."""

    def run(self: object, command: Sequence[str]) -> int:
        given = dict(word.lstrip("-").split("=", 1) for word in command if "=" in word)
        train = "log.folder" in given
        out = Path(
            json.loads(given.get("log.folder") or given.get("run.out") or "0") or given["out"]
        )
        ran.append(out.name)
        if out.name == fails_at:
            out.parent.mkdir(exist_ok=True)
            if train:
                _write(out / "metrics.jsonl", '{"step": 1, "time": 0}\n')
                _write(out / "run_config.yaml", HEADER)
            return 137
        read = [value.split("=")[-1].strip('[]"') for value in given.values()]
        made_of = [Path(place) / "weights/__0_0.distcp" for place in read]
        made_of += [Path(f"{place}{ending}") for place in read for ending in ("", ".bin")]
        content = "".join(path.read_text() for path in made_of if path.is_file())
        content += " ".join(word for word in command if not word.startswith("--overwrite"))
        if not train and out.suffix:
            assert "--overwrite" in command or not out.exists()
            _write(out, content)
            return 0
        model = out / "hybrid" if train else out
        steps = int(given.get("trainer.max_steps", 0))
        _write(model / "model.json", json.dumps({"provenance": {"stage": "", "max_steps": steps}}))
        _write(model / "weights/__0_0.distcp", content)
        if not train:
            _write(model / "config.json", "{}")
        _write(model / "tokenizer/tokenizer.json", "{}")
        _write(out / "metrics.jsonl", '{"step": 1, "time": 0}\n')
        return 0

    return run


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _command(folder: Path, *more: str) -> list[str]:
    shrunk = [f"{stage}.trainer.max_steps=2" for stage in STAGES]
    data = [f"{stage}.data.paths=[{folder}/data]" for stage in STAGES]
    own = [f"run.folder={folder}/run", f"run.teacher={folder}/teacher", "run.launcher=null"]
    return ["transfer", "--config", str(EXAMPLE), *own, *shrunk, *data, *more]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a teacher and a dataset."""
    shutil.copytree(TEACHER, tmp_path / "teacher")
    _write(tmp_path / "data.idx", "index")
    _write(tmp_path / "data.bin", "tokens")
    return tmp_path


def _ran(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str, fails_at: str = ""
) -> list[str]:
    """The steps that a command runs, by their outputs' names."""
    ran: list[str] = []
    monkeypatch.setattr(transfer._Child, "run", _stand_in(ran, fails_at))
    assert cli.main(_command(folder, *more)) == (137 if fails_at else 0)
    return ran


ALL = ["teacher", "scores.json", "plan.json", "converted", *STAGES, "evaluation.json", "hydra-hf",
       "report.html"]  # fmt: skip


def _touch(path: str, text: str) -> Callable[[Path], None]:
    return lambda folder: _write(folder / path, text)


@pytest.mark.parametrize(
    ("change", "more", "again"),
    [
        (None, [], []),
        (None, ["plan.fa_ratio=1/8"], ALL[2:]),
        (None, ["stage2_distill.optim.lr=5e-4"], ALL[5:]),
        (None, ["stage2_distill.trainer.max_steps=3"], ALL[5:]),
        (None, ["stage1_align.resume.keep=1", "stage1_align.log.every_n_steps=7"], []),
        (None, ["evaluate.num_samples=7"], ["evaluation.json", "report.html"]),
        (None, ["export.dtype=bfloat16"], ["hydra-hf"]),
        (None, ["score.probes.seed=3"], ALL[1:]),
        (_touch("data.bin", "others"), [], ALL[4:]),
        (_touch("teacher/model.safetensors", "others"), [], ALL),
        (_touch("run/plan.json", "edited by hand"), [], ALL[3:]),
        (lambda folder: (folder / "run/evaluation.json").unlink(), [], ["evaluation.json"]),
        (lambda folder: shutil.rmtree(folder / "run/converted"), [], ["converted"]),
    ],
)  # fmt: skip
def test_what_is_run_again_is_what_depends_on_a_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], object] | None, more: list[str], again: list[str],
) -> None:  # fmt: skip
    """Catches a step that is skipped though an input is another, and one that runs for nothing."""
    assert _ran(monkeypatch, folder) == ALL
    if change is not None:
        change(folder)
    assert _ran(monkeypatch, folder, *more) == again
    assert _ran(monkeypatch, folder, *more) == []


@pytest.mark.parametrize("place", ["scores.json", "converted", "stage2_distill", "report.html"])
def test_a_step_that_fails_is_gone_on_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    position = ALL.index(place)
    assert _ran(monkeypatch, folder, fails_at=place) == ALL[: position + 1]
    if place == "stage2_distill":
        assert (folder / "run" / place / "metrics.jsonl").is_file()
    assert _ran(monkeypatch, folder) == ALL[position:]


def test_what_goes_on_is_cleared_only_for_other_inputs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a long step that begins anew after a crash, or goes on with another's results."""
    run = folder / "run"
    _ran(monkeypatch, folder)
    trained = run / "stage2_distill/hybrid/weights/__0_0.distcp"
    unfinished = run / "scores.json.partial/run.json"
    seen = []

    def look(self: object, command: Sequence[str]) -> int:
        seen.append((trained.exists(), (run / "scores.json").exists(), unfinished.exists()))
        return 3

    monkeypatch.setattr(transfer._Child, "run", look)
    assert cli.main(_command(folder, "stage2_distill.trainer.max_steps=5")) == 3
    assert seen.pop() == (True, True, False), "longer: it goes on"
    assert cli.main(_command(folder, "stage2_distill.optim.lr=5e-4")) == 3
    assert seen.pop() == (False, True, False), "another run"
    for change in ("convert.reuse=nothing", "score.probes.seed=3"):
        unfinished = run / f"{'converted' if 'reuse' in change else 'scores.json'}.partial/run.json"
        for is_kept in (False, True):
            _write(unfinished, "{}")
            assert cli.main(_command(folder, change)) == 3
            assert seen.pop() == (False, "reuse" in change, is_kept)


def test_a_dry_run_tells_and_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def said(*more: str) -> dict[str, str]:
        capsys.readouterr()
        assert cli.main([*_command(folder, *more), "--dry-run"]) == 0
        lines = capsys.readouterr().out.splitlines()
        return dict(re.split(r"\s+", line, maxsplit=1) for line in lines)

    assert said() == dict.fromkeys(STEPS, "to run")
    assert not (folder / "run").exists()
    _ran(monkeypatch, folder, fails_at="stage1_align")
    before = (folder / "run/transfer.json").read_bytes()
    rest = dict.fromkeys(STEPS[5:], "to run")
    assert said() == {**dict.fromkeys(STEPS[:4], "done"), "stage1_align": "to go on", **rest}
    assert (folder / "run/transfer.json").read_bytes() == before
    _ran(monkeypatch, folder)
    assert said() == dict.fromkeys(STEPS, "done")
    found = said("plan.fa_ratio=1/8")
    assert [found[name] for name in STEPS[:4]] == [
        "done", "done", "to run again, as plan.fa_ratio changed",
        "to run again if plan.json will have changed",
    ]  # fmt: skip
    _write(folder / "run/plan.json", "edited by hand")
    assert said()["convert"] == "to run again, as plan.json changed"
    (folder / "run/scores.json").unlink()
    assert said()["score"] == f"to run again, as {folder}/run/scores.json is missing"


def test_a_dry_run_tells_how_much_of_a_step_is_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """By this the Slurm script tells whether a job gets on."""

    def said(step: str) -> str:
        capsys.readouterr()
        assert cli.main([*_command(folder), "--dry-run"]) == 0
        return dict(re.findall(r"^(\w+) +(.*)$", capsys.readouterr().out, re.M))[step]

    _ran(monkeypatch, folder, fails_at="scores.json")
    assert said("score") == "to go on"
    for name in ("run.json", ".lock", "clean.npy", "swaps.npy", ".more.npy.7.partial"):
        _write(folder / "run/scores.json.partial" / name, "")
    assert said("score") == "to go on with 2 measurements kept"
    shutil.rmtree(folder / "run/scores.json.partial")
    _ran(monkeypatch, folder, fails_at="stage1_align")
    for step in (4, 10, 12):
        _write(folder / f"run/stage1_align/checkpoints/step_{step}/weights/.metadata", "")
    assert said("stage1_align") == "to go on after step 12"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["plan.fa_ratoi=1/4"], r"step plan: unrecognized arguments: --fa-ratoi=1/4"),
        (["plan.window_ratio=1/4"], r"step plan: the plan needs mean_ablation and window_ablatio"),
        (["plan.fa_heads=4"], r"step plan: argument --fa-\w+: not allowed with argument"),
        (["plan.out=here"], r"plan\.out is not for a transfer\.yaml: its steps hand files on"),
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
    assert cli.main(_command(folder, *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^megatron-hydra: error: {message}", line), line


def test_results_of_unknown_origin_are_not_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(transfer._Child, "run", None)
    _write(folder / "run/scores.json", "of hours")
    assert cli.main(_command(folder)) == 2
    assert "scores.json exists, but" in capsys.readouterr().err
    assert (folder / "run/scores.json").read_text() == "of hours"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert cli.main(_command(folder)) == 2
    assert "start transfer without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*/transfer.yaml")), ids=str)
def test_the_examples_hand_on_what_their_stages_name(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    own = load_config(path.parent / "stage1_align.yaml").folder.parent
    _, steps = load_steps(path, [f"run.folder={own}"])
    assert [step.name for step in steps] == list(STEPS)
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
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=_environment(),
        # A shell has what it starts in the background ignore SIGINT.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == f"7 {number.name}\n"


def _environment() -> dict[str, str]:
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tools"))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_whole_chain_killed_gone_on_with_and_changed(tmp_path: Path) -> None:
    """The real steps on the tiny teacher: what is finished stays, what a kill cut off goes on."""
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "docs/method.md").read_text() * 2)
    shutil.copytree(TEACHER, tmp_path / "teacher")
    from megatron_hydra.api.preprocess import Retrieval, preprocess

    preprocess(tmp_path / "teacher", tmp_path / "data", retrieval=Retrieval(0.5, 128, 64))
    small = ["data.seq_length=128", "data.micro_batch_size=1", "data.global_batch_size=1",
             "strategy.tensor_model_parallel_size=1", "trainer.max_steps=2"]  # fmt: skip
    of_stages = [f"{stage}.{each}" for stage in STAGES for each in small]
    more = [
        *of_stages, "stage1_align.trainer.max_steps=30", "stage1_align.resume.save_every_n_steps=1",
        "score.probes={names: [niah_single_1], pairs: 2, pairs_of: {}, length: 256}",
        f"score.probes.text={text}", "score.scorers.names=[activation_patching]",
        f"convert.calibration_text={text}", "convert.calibration_length=128",
        "convert.calibration_tokens=256", f"evaluate.text=[{text}]", "evaluate.lengths=128",
        "evaluate.tasks=single", "evaluate.num_samples=5", "evaluate.training_length=128",
        "evaluate.perplexity_tokens=256",
    ]  # fmt: skip
    run = tmp_path / "run"

    def start(*changed: str) -> subprocess.Popen:
        words = _command(tmp_path, *more, *changed)
        return subprocess.Popen(
            [sys.executable, "-m", "hydra_tools.transfer", *words[1:]], cwd=ROOT,
            env=_environment(), stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def state() -> dict[str, dict]:
        return json.loads((run / "transfer.json").read_text())["steps"]

    def saved() -> list[int]:
        steps = [path.parents[1] for path in run.glob("stage1_align/*/step_*[0-9]/*/.metadata")]
        whole = [step for step in steps if not Path(f"{step}-unfinished").exists()]
        return sorted(int(step.name.removeprefix("step_")) for step in whole)

    def wait_for_a_save(process: subprocess.Popen) -> None:
        while not saved():
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)

    # With -9, a step in the background; the driver is held, or it would end by itself.
    first = start()
    wait_for_a_save(first)
    first.send_signal(signal.SIGSTOP)
    (child,) = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    first.kill()
    first.communicate()
    begun, kept = state(), saved()[-1]
    assert list(begun) == list(STEPS[:5]) and begun["stage1_align"]["finished"] is None

    second = start()
    said = second.communicate()[0]
    assert second.returncode == 0, said
    ran = re.findall(r"^== (\w+): (.*)$", said, re.M)
    going_on = ("stage1_align", f"to go on after step {kept}")
    assert ran == [*((name, "done") for name in STEPS[:4]), going_on,
                   *((name, "to run") for name in STEPS[5:])]  # fmt: skip
    lines = (run / "stage1_align/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert len(steps) < 45, "it began anew"
    assert sorted({*steps}) == list(range(1, 31))
    assert "stage3_long_context" in (run / "report.html").read_text(encoding="utf-8")

    done, files = state(), {path: path.stat().st_mtime_ns for path in run.rglob("*.json")}
    third = start()
    assert third.communicate()[0].count(": done\n") == len(STEPS) and third.returncode == 0
    assert state() == done

    fourth = start("plan.fa_ratio=1/8", "stage1_align.trainer.max_steps=2000")
    while state()["stage1_align"]["finished"] is not None:
        assert fourth.poll() is None, fourth.communicate()
        time.sleep(0.1)
    wait_for_a_save(fourth)
    fourth.send_signal(signal.SIGUSR1)
    said = fourth.communicate()[0]
    assert fourth.returncode == 75, said
    again = [name for name, what in re.findall(r"^== (\w+): (.*)$", said, re.M) if what != "done"]
    assert again == ["plan", "convert", "stage1_align"]
    assert HeadPlan.load(run / "plan.json").num_fa_heads == 4
    assert (run / "scores.json").stat().st_mtime_ns == files[run / "scores.json"]
    assert state()["score"] == done["score"] and state()["stage2_distill"] == done["stage2_distill"]
