"""A command that is killed by `kill -9` when it is about to write a file, or to move it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from kit import forks

_PROGRAM = """
import os, signal, sys
from pathlib import Path

place, *arguments = sys.argv[1:]
event_of_place = "os.rename" if place.startswith("moved ") else None
place = place.removeprefix("moved ")

def watch(event, details):
    written = {"open": 0, "os.rename": 1}.get(event)
    if written is None or event_of_place not in (None, event):
        return
    if isinstance(details[written], str | os.PathLike):
        is_read = event == "open" and details[1] in ("r", "rb")
        if Path(details[written]).name == place and not is_read:
            os.kill(os.getpid(), signal.SIGKILL)

from hydra_tools import cli
from megatron_hydra.cpu import install_if_needed

install_if_needed()
sys.addaudithook(watch)
sys.exit(cli.main(arguments))
"""


def kill_at(place: str, arguments: list[str], folder: Path) -> None:
    """Run a command of the package until it is killed.

    Args:
        place: Name of the file or folder that is about to be written, or to be given its name; with
            `moved` before it, only the latter.
        arguments: Of `megatron-hydra`.
        folder: For what is needed meanwhile.
    """
    (folder / "killed.py").write_text(_PROGRAM)
    program = [f"{folder}/killed.py", place, *arguments]
    code = forks.start(program, dict(os.environ), folder / "log").wait(600)
    assert code == -signal.SIGKILL, (folder / "log").read_text()
    for name in ("killed.py", "log"):
        (folder / name).unlink()
