"""`study --speeds`: an arm's whole way, what is kept, what fails, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra_tools import cli

from megatron_hydra.study.speeds import Speeds

ROOT = Path(__file__).parents[2]
Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The command on the miniature study at its smallest, with overrides and options."""
    study: dict[str, Any] = yaml.safe_load((ROOT / "examples/study/cpu.yaml").read_text())
    study["run"] |= {"folder": f"{tmp_path}/study", "results": f"{tmp_path}/results"}
    study["teachers"]["quickstart"]["folder"] = str(ROOT / "examples/quickstart/teacher")
    study["data"] |= {"documents": 8, "long_length": 512, "long_documents": 8}
    study["score"] = {
        "probes": {"names": ["niah_single_2"], "pairs": 2, "length": 256},
        "scorers": {"names": ["activation_patching", "every_nth"], "every": 4},
    }
    study["evaluation"] = {"times": [1, 2], "batch_tokens": 1024, "forward_tokens": 600}
    study["arms"]["broken"] = {"about": "too many heads", "constraints": {"per_layer": 9}}
    study["questions"]["which"] = {"title": "Which?", "arms": ["head", "broken"]}
    study["speeds"] = {"out": f"{tmp_path}/speeds.json", "arms": ["broken", "teacher", "head"],
                       "steps": 3, "warmup_steps": 1, "new_tokens": 4}  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))

    def call(*more: str) -> int:
        return cli.main(["study", "--config", f"{tmp_path}/study.yaml", "--speeds", *more])

    return call


@pytest.mark.slow
@pytest.mark.exhaustive  # converts and trains four times
def test_measured_once_kept_and_gone_on_with(run, tmp_path, capfd) -> None:
    out = tmp_path / "speeds.json"
    assert run("speeds.arms=[teacher]") == 0
    first = Speeds.load(out).speeds
    assert run() == 1, "one arm cannot be"
    said = capfd.readouterr().out
    assert "1-4.broken.quickstart.0: failed: 9 FA heads per layer asked for" in said
    assert "1.teacher.quickstart.0: measured already" in said
    speeds = Speeds.load(out)
    assert speeds.speeds[:1] == first and speeds.provenance["device"] == "CPU"
    assert speeds.provenance["command"].endswith(f"--config {tmp_path}/study.yaml --speeds")
    teacher, head = speeds.speeds
    assert (teacher.arm, teacher.budget, teacher.stands_for) == ("teacher", "1", ("recipe",))
    assert head.stands_for == ("calibrated", "no_align", "calibrated_no_align")
    assert (teacher.fa_heads, head.fa_heads) == (32, 8)
    for speed in speeds.speeds:
        assert (speed.step_tokens, len(speed.training_ms), len(speed.token_ms)) == (1024, 3, 3)
        assert speed.num_prompts == 2 and 900 < speed.prompt_tokens <= 1024
        assert min(*speed.training_ms, *speed.token_ms, speed.prompt_ms) > 0
    assert not list((tmp_path / "study/speeds").iterdir()), "models are removed"
    assert not (tmp_path / "results").exists()

    before = out.read_bytes()
    only = "speeds.arms=[head]"
    assert run(only) == 0 and out.read_bytes() == before
    assert run(only, "speeds.steps=2") == 0
    kept, again = Speeds.load(out).speeds
    assert kept == teacher and len(again.training_ms) == 2 and again.key == head.key

    stopped = run("--minutes", "1e-9", "speeds.steps=3")
    assert stopped == 75 and Speeds.load(out).speeds == (kept, again)
    assert "stopped; what is measured is kept" in capfd.readouterr().out
    data = json.loads(out.read_text())
    data["provenance"]["device"] = "another"
    out.write_text(json.dumps(data))
    assert run() == 2
    assert "speeds.json was measured with another device: name an" in capfd.readouterr().err


def test_a_dry_run_tells_what_is_timed(run, tmp_path, capfd) -> None:
    assert run("--dry-run") == 0
    assert capfd.readouterr().out.splitlines() == [
        "1-4.broken.quickstart.0",
        "1.teacher.quickstart.0, which stands for recipe",
        "1-4.head.quickstart.0, which stands for calibrated, no_align, calibrated_no_align",
    ]
    assert not (tmp_path / "study").exists()


def test_a_place_that_cannot_be_written_is_refused_first(run, tmp_path, capfd) -> None:
    assert run(f"speeds.out={tmp_path}") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f"output {tmp_path} is a folder" in line
    assert not (tmp_path / "study/teachers").exists()


@pytest.mark.parametrize("option", [["--workers", "2"], ["--questions", "which"]])
def test_what_runs_side_by_side_is_refused(run, capfd, option) -> None:
    assert run(*option) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "leave --workers and --questions out" in line
