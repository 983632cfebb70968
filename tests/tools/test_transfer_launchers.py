"""What `megatron-hydra transfer` starts its steps with, of ranks and of others, and their end."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
from hydra_tools import cli, transfer
from kit.transfers import command_of, command_stand_in


def test_each_step_has_its_launcher(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are for score and the stages; another launcher is no reason to run a step again."""
    began: list[tuple[str, str]] = []
    stand_in = command_stand_in([])

    def run(self: object, command: Sequence[str]) -> int:
        words = shlex.join(command).partition(" -m hydra_tools.")
        began.append((words[0], words[2].split()[0]))
        return stand_in(self, command)

    monkeypatch.setattr(transfer._Child, "run", run)
    more = ["run.launcher=env RANKS='of all'", "run.single_launcher=env python"]
    assert cli.main(command_of(folder, *more)) == 0
    of_ranks = [("env 'RANKS=of all'", verb) for verb in ("score", "train", "train", "train")]
    alone = [("env python", "cli")] * 6
    assert sorted(began) == sorted(of_ranks + alone)
    began.clear()
    assert cli.main(command_of(folder)) == 0 and not began


def test_scores_that_were_written_before_a_rank_died_are_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a verb that refuses its own output: the chain would not go on."""
    ran: list[str] = []
    stand_in = command_stand_in(ran)

    def run(self: object, command: Sequence[str]) -> int:
        stand_in(self, command)
        return 1 if ran[-1] == "scores.json" else 0

    monkeypatch.setattr(transfer._Child, "run", run)
    assert cli.main(command_of(folder)) == 1
    assert cli.main(command_of(folder)) == 0
    assert ran.count("scores.json") == 1 and ran[-1] == "report.html"
    assert cli.main(command_of(folder)) == 0 and ran[-1] == "report.html"
    assert cli.main(command_of(folder, "score.probes.seed=3")) == 1
    assert ran.count("scores.json") == 2


def test_a_launcher_that_is_no_command_is_said_at_once(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(command_of(folder, "run.single_launcher=dokcer run")) == 2
    assert "run.single_launcher starts with dokcer, which is no command" in capsys.readouterr().err
