"""The environment with the packages that a training may use, and the tests' own does not have."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

_BIN = Path(sys.prefix) / "optional/bin"


def optional_program(name: str) -> str:
    """A program there; the test is skipped where nobody has made the environment."""
    if not (_BIN / name).exists():
        pytest.skip("no environment of optional packages: make test-slow makes it")
    return str(_BIN / name)
