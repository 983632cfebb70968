"""A real Slurm over two hosts, which are network and process namespaces of this machine; root."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests/cluster"
HOSTS = ("node0", "node1")
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def call(*command: str, check: bool = True, cwd: Path = ROOT, **environment: str) -> str:
    """Run a command, from the root of the repository by default; return what it printed."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def running_cluster() -> Iterator[None]:
    """Hosts and Slurm, taken down at the end."""
    _take_down()  # what a killed test has left
    try:
        call(f"{HERE}/hosts.sh", "up", str(len(HOSTS)))
        call(f"{HERE}/slurm.sh", "up")
        yield
    finally:
        _take_down()


def _take_down() -> None:
    for script in ("slurm.sh", "hosts.sh"):
        call(f"{HERE}/{script}", "down", check=False)


def on(host: str, *command: str, check: bool = True) -> str:
    """Run a command on a host."""
    return call(f"{HERE}/hosts.sh", "on", host, *command, check=check)


def kill_rank(host: str) -> None:
    """End the training's process on a host as the kernel does where memory is out."""
    (pid,) = on(host, "pgrep", "-f", "python.* -u -m hydra_tools.train").split()
    on(host, "kill", "-9", pid)


def until(is_so: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for something."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"not in {seconds:g} s: {what}"
        time.sleep(0.5)


class Job:
    """A batch job of the shipped script with YAML files of the test's own, over both hosts.

    Args:
        folder: Of the stages' YAML files; logs go there too.
        options: Of sbatch.
        more: Arguments of the script.
        cwd: Where it is submitted.
        environment: Of the script.
    """

    def __init__(
        self, folder: Path, options: Sequence[str] = (), more: Sequence[str] = (),
        cwd: Path = ROOT, **environment: str,
    ) -> None:  # fmt: skip
        self.log = folder / "job-%j.log"
        given = {"CONFIGS": str(folder), "GPUS_PER_NODE": "1", "LOGS": f"{folder}/logs"}
        printed = call(
            "sbatch", "--parsable", "--cpus-per-task=2", "--gpus-per-node=1", "--time=20",
            f"--output={self.log}", *options, f"{ROOT}/examples/slurm/transfer.sbatch",
            *more, cwd=cwd, **{**given, **environment},
        )  # fmt: skip
        self.number = printed.strip()
        self.log = folder / f"job-{self.number}.log"

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def record(self, name: str) -> str:
        """What Slurm knows of it under a name."""
        # A busy machine's Slurm may not answer: whoever waits asks again.
        told = call("scontrol", "show", "job", self.number, check=False)
        found = re.search(rf"\b{name}=(\S+)", told)
        return found[1] if found else ""

    def wait_for_restart(self, number: int, seconds: float = 240) -> None:
        """Until it is queued again so many times; then without the two minutes that Slurm waits."""
        until(lambda: self.record("Restarts") == str(number), seconds, f"restart {number}")
        until(lambda: self.record("JobState") == "PENDING", seconds, "pending")
        # A node starts no job again in the second in which it has ended: Slurm would give it up.
        time.sleep(2)
        call("scontrol", "update", f"JobId={self.number}", "StartTime=now")

    def wait_for_end(self, seconds: float = 1200) -> tuple[str, str]:
        """State and exit code."""
        until(lambda: self.record("JobState") in _ENDED, seconds, "the job's end")
        return self.record("JobState"), self.record("ExitCode")
