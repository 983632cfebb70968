"""Files that version 0.1.0 wrote are read by every command that reads such files.

Catches: a reader that no longer takes what an earlier version wrote, a plan that comes out another
from the same scores, a checkpoint whose tensors have other names, a training that does not go on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from hydra_tools import cli
from kit import forks
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

FILES = Path(__file__).parent / "golden" / "version_0_1.tar.xz"


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the files, which is the working directory: they name one another by it."""
    with tarfile.open(FILES) as archive:
        # Python before 3.11.4 has no filters.
        archive.extractall(
            tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> None:
    assert cli.main(arguments) == 0


def plan_of(path: str) -> dict[int, list[int]]:
    return {row["layer"]: row["fa_heads"] for row in json.loads(Path(path).read_text())["layers"]}


@pytest.mark.parametrize(
    ("earlier", "options"), [("plan.json", []), ("random_plan.json", ["--random-seed", "0"])]
)
def test_the_same_plan_comes_of_the_scores(golden: Path, earlier: str, options: list[str]) -> None:
    run("plan", "--scores", "scores.json", "--fa-ratio", "1/4", "--out", "new.json", *options)
    assert plan_of("new.json") == plan_of(earlier)


def test_the_same_front_comes_of_the_scores(golden: Path) -> None:
    budgets = ["--budgets", "1/4,1/2", "--context", "1024"]
    run("pareto", "--scores", "scores.json", *budgets, "--out", "new.json")
    assert rows_of("new.json") == rows_of("pareto.json")


def rows_of(path: str) -> list[dict]:
    return json.loads(Path(path).read_text())["rows"]


def test_plan_scores_and_front_are_shown(golden: Path, capsys: pytest.CaptureFixture) -> None:
    run("inspect", "plan.json", "--scores", "scores.json", "--pareto", "pareto.json")
    assert "2 of 8" in capsys.readouterr().out


def test_teacher_and_hybrid_are_evaluated_as_before(golden: Path) -> None:
    text = "".join(f"Line {i} of {i * i} says {chr(97 + i % 26) * (i % 7)}.\n" for i in range(999))
    Path("text.txt").write_text(text)
    run(
        "evaluate", "--model", "teacher=converted_teacher", "--model", "hybrid=converted",
        "--model", "trained=run_complete/hybrid", "--num-samples", "5", "--lengths", "512,1024",
        "--training-length", "512", "--text", "text.txt", "--out", "new.json",
    )  # fmt: skip
    loss = {
        model["name"]: model["loss_nats"]["512"]
        for model in json.loads(Path("new.json").read_text())["models"]
    }
    earlier = {"teacher": 5.904858227, "hybrid": 5.942126858, "trained": 5.954084588}
    assert loss == pytest.approx(earlier, rel=1e-5)


def test_all_is_reported(golden: Path) -> None:
    run(
        "report", "--scores", "scores.json", "--plan", "plan.json", "--pareto", "pareto.json",
        "--evaluation", "evaluation.json", "--teacher", "teacher",
        "--run", "stage1=run_complete", "--out", "report.html",
    )  # fmt: skip
    assert "activation_patching" in Path("report.html").read_text()


@pytest.mark.slow
def test_the_training_goes_on_to_the_same_weights(golden: Path) -> None:
    command = [sys.executable, "-m", "hydra_tools.train", "--config", "stage1.yaml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on from run/checkpoints/step_00000001" in done.stderr
    assert_same_weights(golden / "run/hybrid", golden / "run_complete/hybrid")


@pytest.mark.slow
def test_training_starts_from_the_converted_models(golden: Path) -> None:
    shutil.rmtree("run")
    program = ["-m", "hydra_tools.train", "--config", "stage1.yaml"]
    log = golden / "printed.log"
    assert forks.start(program, dict(os.environ), log).wait() == 0, log.read_text()
    assert_same_weights(golden / "run/hybrid", golden / "run_complete/hybrid")


def assert_same_weights(new: Path, earlier: Path) -> None:
    """But for what another processor's order of additions may change in two steps."""
    new_weights, weights = tensors_of(new), tensors_of(earlier)
    assert new_weights.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(new_weights[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """By PyTorch's own reader, which knows no model."""
    whole = checkpoint / "whole.pt"
    dcp_to_torch_save(checkpoint / "weights", whole)
    stored = torch.load(whole, weights_only=False)
    return {name: value for name, value in stored.items() if isinstance(value, torch.Tensor)}
