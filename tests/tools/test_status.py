"""`megatron-hydra status`: what it says of run folders in every state; no training runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra_tools import cli

from megatron_hydra.training.config import load_config
from megatron_hydra.training.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from megatron_hydra.files import lock
with lock(sys.argv[1], "it"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "run.yaml").write_text(
        "data: {paths: [data], seq_length: 2048, micro_batch_size: 1, global_batch_size: 1}\n"
        "trainer: {max_steps: 1000}\n"
        "optim: {lr: 1e-3}\n"
        "transfer: {stage: distill, init_from: model, teacher: model}\n"
        f"log: {{folder: {tmp_path}/run}}\n"
    )
    made = RunFolder(load_config(tmp_path / "run.yaml"))
    made.path.mkdir()
    made.write_config()
    return made


def _say(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert cli.main(["status", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def _record(folder: RunFolder, steps: range, last_ago: float, seconds: float = 2.0) -> None:
    now = time.time()
    with folder.metrics.open("a") as stream:
        for step in steps:
            moment = now - last_ago - seconds * (steps[-1] - step)
            stream.write(json.dumps({"step": step, "time": moment, "loss": step / 4}) + "\n")
        stream.write('{"step": 999')  # being written


def _save(folder: RunFolder, step: int, ago: float) -> None:
    weights = folder.checkpoints / f"step_{step:08d}/weights"
    weights.mkdir(parents=True)
    os.utime(weights, (time.time() - ago,) * 2)


def _held(folder: RunFolder) -> subprocess.Popen:
    """Another process that holds the folder's lock until its input ends."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.lock_file)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_run_is_alive_silent_or_dead(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a look that takes the lock itself, or that ends a process's own."""
    assert _say(capsys, str(folder.path)) == [
        f"{folder.path}: distill, not running",
        "  nothing is saved yet",
    ]
    _record(folder, range(101, 151), last_ago=3)
    _save(folder, 100, ago=7290)
    _save(folder, 20, ago=1)
    with _held(folder) as holder:
        who = f"process {holder.pid} on {os.uname().nodename}"
        first, steps, tokens, rate, saved = _say(capsys, str(folder.path))
        assert first == f"{folder.path}: distill, running ({who})"
        assert re.fullmatch(r"  step 150 of 1,000, \d+ s ago; loss 37.5", steps)
        assert tokens == "  307,200 of 2,048,000 tokens"
        end = time.strftime("%Y-%m-%d %H:", time.localtime(time.time() + 850 * 2))
        assert rate.startswith(f"  2 s per step, 28 min 20 s left, done about {end}")
        assert saved == "  saved at step 100, 2 h 1 min ago"
        folder.metrics.unlink()
        _record(folder, range(101, 151), last_ago=90)
        assert f"SILENT, though {who} is alive" in _say(capsys, str(folder.path))[0]
        holder.stdin.close()
    first, _, _, rate, _ = _say(capsys, str(folder.path))
    assert first.endswith("not running: the same command goes on") and "done about" not in rate
    assert _say(capsys, "--steps", str(folder.path), str(folder.path)) == ["100", "100"]


def test_what_a_gpu_took_is_told_as_far_as_it_is_known(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"step": 3, "time": time.time(), "loss": None, "peak_memory_gib": 71.25}
    for more, told in (({}, ""), ({"mfu": 0.4123}, ", MFU 41.2%")):
        folder.metrics.write_text(json.dumps({**known, **more}) + "\n")
        _, step, line, *_ = _say(capsys, str(folder.path))
        assert step.endswith("; loss no number")  # of a step that was skipped
        assert line == f"  6,144 of 2,048,000 tokens, 71.2 GiB of memory at the peak{told}"


def test_the_newest_measurements_are_found_far_above_the_end(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a look at the newest step alone, which seldom has one."""
    filler = "x" * 2000
    with folder.metrics.open("w") as stream:
        for step in range(1, 101):
            record = {"step": step, "time": 1.0, "loss": 1.0, "filler": filler}
            record |= {"validation/loss": step / 8} if step in (10, 20) else {}
            record |= {"needles/multi_key_8": step / 40} if step in (10, 30) else {}
            record |= {"teacher_needles/multi_key_8": 0.8} if step == 10 else {}
            stream.write(json.dumps(record) + "\n")
        stream.write('{"step": 101, "validation/loss": 9')  # being written
    said = _say(capsys, str(folder.path))
    assert "  validation loss 2.5 at step 20" in said
    assert "  75% of the needles found (multi_key_8) at step 30, its teacher finds 80%" in said
    folder.metrics.write_text("")
    said = "".join(_say(capsys, str(folder.path)))
    assert "validation loss" not in said and "needles" not in said


def test_a_configuration_names_a_run_that_has_not_begun(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = ["--config", str(tmp_path / "run.yaml")]
    _save(folder, 40, ago=1)
    assert _say(capsys, *config, "--steps") == ["40"]
    assert _say(capsys, *config, "--steps", f"log.folder={tmp_path}/other") == ["0"]
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "no run is named: give the folders of runs, or --config"),
        (("IN",), "IN has no run_config.yaml, so no training has begun there"),
        (("IN/run",), "IN/run/metrics.jsonl is damaged: "),
    ],
)
def test_what_is_no_run_is_refused(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    arguments: tuple[str, ...], sentence: str,
) -> None:  # fmt: skip
    folder.metrics.write_text("{\n")
    given = [word.replace("IN", str(tmp_path)) for word in arguments]
    assert cli.main(["status", *given]) == 2
    assert sentence.replace("IN", str(tmp_path)) in capsys.readouterr().err


def test_the_look_imports_nothing_slow(folder: RunFolder) -> None:
    _record(folder, range(1, 3), last_ago=0)
    program = (
        "import sys; from hydra_tools import cli; cli.main(sys.argv[1:]); "
        "print({'torch', 'megatron', 'nemo', 'numpy', 'tensorboard'} & set(sys.modules))"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, "status", str(folder.path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert said.splitlines()[-1] == "set()"
