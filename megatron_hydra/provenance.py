"""What each output records of how it came to be: the command that made it, and the versions."""

from __future__ import annotations

import shlex
import sys
from contextvars import ContextVar
from typing import Any

from megatron_hydra.files import versions

COMMAND: ContextVar[str | None] = ContextVar("COMMAND", default=None)
"""What a user typed, where that is known better than by `sys.argv`."""


def command_line() -> str:
    """The command that is run."""
    return COMMAND.get() or shlex.join(sys.argv)


def origin(**more: Any) -> dict[str, Any]:
    """A provenance record: the command that is run, ``more`` (JSON values), and the versions."""
    return {"command": command_line(), **more, "versions": versions()}
