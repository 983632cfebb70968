"""Programs as forks of the server that has imported Megatron and NeMo, which takes 13 s otherwise.

torchrun's own agent runs; its ranks alone are forks too, in place of new Python processes. As in
those, nothing of an earlier program is left, and each draws random numbers of its own.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from kit.distributed import start_fork_server


class Fork:
    """A forked process, with what is used of `subprocess.Popen`'s interface."""

    def __init__(self, start_method: str, function: Any, *args: Any) -> None:
        self._process = multiprocessing.get_context(start_method).Process(
            target=function, args=args
        )
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def start(program: Sequence[str], environment: dict[str, str], log: Path, ranks: int = 0) -> Fork:
    """Run a program by itself, or under torchrun on so many ranks.

    It starts in the working directory of the caller.

    Args:
        program: What follows `python`: a file or `-m` and a module, then arguments.
        environment: All of it.
        log: Replaced by what is printed.
        ranks: 0 to do without torchrun.
    """
    start_fork_server()
    return Fork("forkserver", _launch, Path.cwd(), list(program), environment, log, ranks)


def _launch(
    folder: Path, program: list[str], environment: dict[str, str], log: Path, ranks: int
) -> None:
    os.chdir(folder)
    with log.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    if not ranks:
        _run(program, environment)
        return
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    SubprocessHandler._popen = lambda self, args, env: Fork("fork", _run_rank, args, env)
    _replace_environment(environment)
    run.main(["--standalone", "--nproc-per-node", str(ranks), *program])


def _run_rank(args: Sequence[str], environment: dict[str, str]) -> None:
    """As `Popen` with `start_new_session` does: none of the agent's signal handlers is left."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    python, unbuffered, *program = args
    assert (python, unbuffered) == (sys.executable, "-u"), args
    _run(program, environment)


def _run(program: list[str], environment: dict[str, str]) -> None:
    _replace_environment(environment)
    gc.freeze()  # what is imported never becomes garbage, and takes long to walk through
    random.seed()
    np.random.seed()
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        runpy.run_path(program[0], run_name="__main__")


def _replace_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
