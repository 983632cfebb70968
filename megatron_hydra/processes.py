"""What a process is to others: a rank of several, the child of one that may end first."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def is_first_rank() -> bool:
    """Whether this is the rank that speaks and writes: torchrun's first, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def end_with_parent(parent: int) -> None:
    """Ask Linux for SIGTERM when the process that started this one ends, however that ends.

    Elsewhere an orphan lives on.

    Args:
        parent: The process that started this one; it may have ended by now.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it ended just before
            os.kill(os.getpid(), signal.SIGTERM)
