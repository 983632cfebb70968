"""Signals to a training, on processes of their own: what the first, the next and an orphan do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra_tools import stops
from hydra_tools.stops import EXIT_CODE

ROOT = Path(__file__).parents[2]
# The main thread waits in C, where Python runs no handler.
PROGRAM = """
import os, sys, threading, time
from hydra_tools import stops

def say(sentence):
    print(sentence, flush=True)

with stops.listening(say) as asked:
    {before}
    print("ready", os.getpid(), flush=True)
    {work}
"""
WAIT_IN_C = "lock = threading.Lock(); lock.acquire(); lock.acquire()"
STEPS = """
    while not asked.is_asked():
        time.sleep(0.01)
    sys.exit(stops.EXIT_CODE)
"""


def _hears_hangups() -> None:
    """Where the tests run under nohup, too, which has their processes ignore them."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _start(
    before: str = "",
    work: str = STEPS,
    preexec: Callable[[], object] = _hears_hangups,
    **environment: str,
) -> subprocess.Popen:
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "tools"))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(before=before, work=work)],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        stdout=subprocess.PIPE, text=True, preexec_fn=preexec,
    )  # fmt: skip
    assert process.stdout.readline().startswith("ready")
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_before_a_step_is_finished_nothing_is_saved(number: signal.Signals) -> None:
    process = _start(work=WAIT_IN_C)
    process.send_signal(number)
    said, _ = process.communicate(timeout=10)
    assert process.returncode == EXIT_CODE == 75
    assert said == (
        f"{number.name} before a step was finished: nothing was saved; the same command begins "
        "again where this one began\n"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_the_first_asks_and_its_like_are_one(number: signal.Signals) -> None:
    """A scheduler, `timeout` and torchrun each hand the same signal on."""
    process = _start(before="asked.is_asked()", work=f"time.sleep(0.5)\n{STEPS}")
    for _ in range(3):
        process.send_signal(number)
    said, _ = process.communicate(timeout=10)
    assert process.returncode == EXIT_CODE
    assert said == f"{number.name}: saving after this step; a second signal ends at once\n"


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGHUP"])
def test_under_nohup_only_a_terminal_that_closes_is_not_heard(signal_name: str) -> None:
    process = _start(
        before="asked.is_asked()",
        work=f"""os.kill(os.getpid(), stops.signal.{signal_name}); time.sleep(0.5)
    assert bool(asked.name) is {signal_name != "SIGHUP"}""",
        preexec=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    process.communicate(timeout=10)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("name", "restarts", "ends"),
    [("SIGUSR1", "03", True), ("", "13", True), ("SIGTERM", "03", False), ("SIGUSR1", "33", False),
     ("SIGUSR1", "00", False)],
)  # fmt: skip
def test_torchrun_does_not_start_anew_what_has_stopped(
    monkeypatch: pytest.MonkeyPatch, name: str, restarts: str, ends: bool
) -> None:
    """Catches a run that goes on though it was asked to end, and a second signal in its end."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *call: sent.append(call))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts[0])
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts[1])
    stops.keep_from_restarting(name)
    assert sent == ([(os.getppid(), signal.SIGTERM)] if ends else [])


def test_a_later_one_ends_at_once() -> None:
    process = _start(before="asked.is_asked()", work=WAIT_IN_C)
    process.send_signal(signal.SIGTERM)
    time.sleep(2.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGINT


def test_a_process_that_loads_data_answers_for_itself() -> None:
    """Forked, it shares the pipe with its parent: Ctrl-C is the parent's, SIGTERM its own end."""
    fork = """child = os.fork()
    if child == 0:
        time.sleep(60)
    asked.is_asked()"""
    work = """time.sleep(0.5)
    os.kill(child, 2); time.sleep(0.3); assert os.waitpid(child, os.WNOHANG)[0] == 0
    os.kill(child, 15); assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -15
    time.sleep(0.3); assert not asked.is_asked()"""
    process = _start(before=fork, work=work)
    process.communicate(timeout=20)
    assert process.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for it")
def test_a_rank_does_not_outlive_its_launcher() -> None:
    launcher = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "tools"))
    program = PROGRAM.format(before="stops.end_with_launcher(); asked.is_asked()", work=STEPS)
    process = subprocess.Popen(
        [sys.executable, "-c", launcher, program],
        env={**os.environ, "PYTHONPATH": paths, "LOCAL_RANK": "0"},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    rank = int(process.stdout.readline().split()[1])
    process.kill()
    assert process.stdout.readline().startswith("SIGTERM: saving after this step")
    process.wait()
    assert process.stdout.read() == ""  # the rank has closed it too
    end = time.monotonic() + 10
    while Path(f"/proc/{rank}").exists() and "Z" not in _state(rank):
        assert time.monotonic() < end, "an orphan"
        time.sleep(0.01)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.exhaustive)]
)
def test_a_verb_that_a_signal_ends_leaves_no_half_output(
    tmp_path: Path, number: signal.Signals
) -> None:
    os.mkfifo(tmp_path / "text.txt")  # read when the output is begun
    command = ["preprocess", "--tokenizer", str(ROOT / "examples/quickstart/teacher")]
    command += ["--input", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out" / "data")]
    process = subprocess.Popen(
        [sys.executable, "-m", "hydra_tools.cli", *command],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        # What these tests themselves run under may have it ignored, as nohup has.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    with (tmp_path / "text.txt").open("w") as stream:
        stream.write("words " * 99)
        stream.flush()
        while not any((tmp_path / "out").glob(".data.bin.*.partial")):
            time.sleep(0.01)
        process.send_signal(number)
        assert process.stderr is not None
        assert f"megatron-hydra: ended by {number.name}\n" in process.stderr.read()
    assert process.wait() == 128 + number
    assert list((tmp_path / "out").iterdir()) == []
