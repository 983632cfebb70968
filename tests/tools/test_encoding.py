"""Tests of printing where the terminal's encoding lacks what a table is drawn with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kit.scores import make_scores


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_plan_is_told_in_every_encoding(tmp_path: Path, encoding: str) -> None:
    make_scores([[0.0, 0.9], [0.4, 0.0]], num_query_groups=1).save(tmp_path / "scores.json")
    plan = ["plan", "--scores", "scores.json", "--fa-heads", "2", "--out", "plan.json"]
    finished = subprocess.run(
        [sys.executable, "-m", "hydra_tools.cli", *plan],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
            "PYTHONIOENCODING": encoding,
        },
        capture_output=True,
    )
    assert (finished.returncode, b"Traceback" in finished.stderr) == (0, False)
    assert ("│" if encoding == "utf-8" else "?") in finished.stdout.decode(encoding)
    assert "plan.json" in finished.stdout.decode(encoding)
