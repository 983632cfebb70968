"""What several files on one verb start from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from kit.transfers import TEACHER, write_text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a teacher and a dataset."""
    shutil.copytree(TEACHER, tmp_path / "teacher")
    write_text(tmp_path / "data.idx", "index")
    write_text(tmp_path / "data.bin", "tokens")
    return tmp_path
