"""The example that launches stages by NeMo-Run: two of them, one after the other, by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kit.tiny_models import PLAN
from test_training import write_inputs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_two_stages_train_from_a_folder_that_is_not_nemo_runs(tmp_path: Path) -> None:
    write_inputs(tmp_path, PLAN)
    (tmp_path / "configs").mkdir()
    for name, init_from in (("stage1_align", "hybrid"), ("stage2_distill", "first/hybrid")):
        (tmp_path / f"configs/{name}.yaml").write_text(
            f"defaults: ../run.yaml\n"
            f"transfer: {{stage: {name[7:]}, init_from: {init_from}, teacher: teacher}}\n"
        )
    environment = {
        **os.environ,
        "NEMORUN_HOME": str(tmp_path / "nemo_run"),
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tools")),
    }
    # A list, which NeMo-Run's local executor hands over in quotes.
    overrides = ["data.paths=[data]", "stage1_align.log.folder=first"]
    done = subprocess.run(
        [
            sys.executable, ROOT / "examples/nemo_run/local.py", "--ranks", "2",
            "--configs", "configs", "--stages", "stage1_align", "stage2_distill", "--",
            *overrides, "stage2_distill.log.folder=second",
        ],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for folder in ("first", "second"):
        assert (tmp_path / folder / "hybrid/model.json").is_file(), done.stdout + done.stderr
