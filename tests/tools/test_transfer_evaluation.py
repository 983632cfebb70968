"""How `megatron-hydra transfer` evaluates: by generated text, going on, and after earlier releases.

A step's command is replaced by one that writes a file of everything it was given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hydra_tools import cli, transfer, transfer_steps
from kit.transfers import command_of, steps_run, write_text


def _said(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, str]:
    """What a dry run says of each step."""
    capsys.readouterr()
    assert cli.main([*command_of(folder, *more), "--dry-run"]) == 0
    return dict(re.findall(r"^(\w+) +(.*)$", capsys.readouterr().out, re.M))


def _begin_measuring(run: Path) -> Path:
    """What a killed evaluation leaves behind: a record, and two finished cells."""
    work = run / "generation.json.partial"
    for name in ("run.json", "0.json", "positions_0.json", ".lock"):
        write_text(work / name, "{}")
    return work


def test_a_killed_evaluation_goes_on_from_its_finished_cells(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where it measures anew: an earlier result in its place must not have it start anew."""
    run = folder / "run"
    steps_run(monkeypatch, folder)
    seen: list[tuple[bool, bool]] = []

    def look(self: object, command: Sequence[str]) -> int:
        record = run / "generation.json.partial/run.json"
        seen.append((record.exists(), "--overwrite" in command))
        return 137

    monkeypatch.setattr(transfer._Child, "run", look)
    _begin_measuring(run)
    assert cli.main(command_of(folder, "evaluate.seed=5")) == 137
    assert seen.pop() == (False, False) and not (run / "generation.json").exists()
    _begin_measuring(run)
    assert _said(folder, capsys, "evaluate.seed=5")["evaluate"] == (
        "to go on with 2 measurements kept"
    )
    # The remedy where memory ends: it changes no answer, so that what is measured stays.
    assert cli.main(command_of(folder, "evaluate.seed=5", "evaluate.batch_size=1")) == 137
    assert seen.pop() == (True, False)
    assert steps_run(monkeypatch, folder, "evaluate.seed=5") == ["generation.json", "report.html"]


def _as_an_earlier_release(run: Path) -> None:
    """Have evaluated the checkpoints by log-likelihood before the export, and reported that."""
    path = run / "transfer.json"
    state = json.loads(path.read_text())
    evaluated, reported = (state["steps"][name]["inputs"] for name in ("evaluate", "report"))
    del state["steps"]["export"]["inputs"]["model code"]
    for name in [name for name in evaluated if name.endswith("/teacher") or name == "hydra-hf"]:
        del evaluated[name]
    evaluated |= {"teacher": "0", "stage3_long_context/hybrid": "0"}
    reported["evaluation.json"] = reported.pop("generation.json")
    path.write_text(json.dumps(state))
    (run / "generation.json").rename(run / "evaluation.json")


def test_a_folder_of_an_earlier_release_is_evaluated_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is trained again, and neither its results nor ones made by hand are replaced."""
    run = folder / "run"
    steps_run(monkeypatch, folder)
    _as_an_earlier_release(run)
    earlier = (run / "evaluation.json").read_text()
    assert {name: said for name, said in _said(folder, capsys).items() if said != "done"} == {
        "export": "to run again, as model code changed",
        "evaluate": "to run, by generated text; the evaluation.json of an earlier release stays",
        "report": "to run again, as evaluation.json changed",
    }
    write_text(run / "generation.json", "by hand")
    assert cli.main(command_of(folder)) == 2
    assert "generation.json exists, but" in capsys.readouterr().err
    assert (run / "generation.json").read_text() == "by hand"
    (run / "generation.json").unlink()
    assert steps_run(monkeypatch, folder) == ["hydra-hf", "generation.json", "report.html"]
    assert (run / "evaluation.json").read_text() == earlier
    assert set(_said(folder, capsys).values()) == {"done"}


def test_a_folder_with_the_model_code_of_another_release_is_exported_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`evaluate` would refuse to run that code; the trained hybrid is as it was."""
    steps_run(monkeypatch, folder)
    monkeypatch.setattr(transfer_steps, "code_hash", lambda: "of another release")
    said = _said(folder, capsys)
    assert said["export"] == "to run again, as model code changed"
    assert said["stage3_long_context"] == "done"
    assert "hydra-hf" in steps_run(monkeypatch, folder)
    assert set(_said(folder, capsys).values()) == {"done"}


def test_log_likelihoods_can_stand_on_the_page_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`evaluate --model` measures them; the page is made again when they change."""
    steps_run(monkeypatch, folder)
    write_text(folder / "mine.json", "likely")
    more = f"report.evaluation={folder}/mine.json"
    assert steps_run(monkeypatch, folder, more) == ["report.html"]
    assert steps_run(monkeypatch, folder, more) == []
    write_text(folder / "mine.json", "less likely")
    assert _said(folder, capsys, more)["report"] == f"to run again, as {folder}/mine.json changed"
