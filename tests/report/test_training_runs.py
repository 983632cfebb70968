"""A run's curves from its event files, those of several lives and of skipped steps too."""

from __future__ import annotations

import math
from pathlib import Path

from test_report import write_events, write_run

from megatron_hydra.report.chart_style import chart_style
from megatron_hydra.report.rendering import render
from megatron_hydra.report.sections import training_section
from megatron_hydra.report.training_runs import TrainingRun, read_run


def section_of(run: TrainingRun) -> str:
    with chart_style():
        return render("training.html", training_section([run]))


def test_resumed_run_keeps_the_last_value_of_a_step(tmp_path: Path) -> None:
    write_run(tmp_path, {"train/loss": [5.0, 4.0, 3.0, 2.0]})
    write_events(tmp_path, {"train/loss": [2.5, 1.5, 0.5]}, first_step=2)
    curve = read_run("stage1", tmp_path).curves["train/loss"]
    assert curve.steps.tolist() == [0, 1, 2, 3, 4]
    assert curve.values.tolist() == [5.0, 4.0, 2.5, 1.5, 0.5]


def test_steps_that_a_later_life_did_again_are_its_own(tmp_path: Path) -> None:
    """A step skipped in the first life and not in the second was not skipped."""
    write_events(tmp_path, {"train/loss": [5.0, 4.0, math.nan], "train/skipped_steps": [0.0] * 3})
    write_run(tmp_path, {"train/loss": [1.0]})  # from the start again, one step alone
    run = read_run("stage1", tmp_path)
    assert run.skipped_steps == [] and run.curves["train/loss"].values.tolist() == [1.0]


def test_skipped_steps_are_gaps_and_are_told(tmp_path: Path) -> None:
    losses = [4.0, 3.0, math.nan, math.inf, 2.0, 1.0]
    skipped = [None, None, 1.0, 2.0]  # at those steps alone, as a run writes it
    curves = {"train/ce": losses, "train/loss": losses, "train/skipped_steps": skipped}
    write_run(tmp_path, curves)
    run = read_run("stage1", tmp_path)
    assert run.skipped_steps == [2, 3]
    section = section_of(run)
    assert "cross entropy 4 → 1; 2 steps skipped for NaN or Inf (2, 3), marked by br" in section


def test_a_single_spike_is_no_reason_to_refuse_a_run(tmp_path: Path) -> None:
    losses = [4.0, 3.0, 9.0, 2.0]
    write_run(tmp_path, {"train/loss": losses, "train/loss_spike": [None, None, 3.0]})
    assert "total 4 → 2" in section_of(read_run("stage1", tmp_path))


def test_a_run_of_one_step_is_a_dot(tmp_path: Path) -> None:
    write_run(tmp_path, {"train/loss": [1.5]})
    assert "total 1.5 → 1.5" in section_of(read_run("stage1", tmp_path))


def test_needles_found_while_training_are_a_curve_of_their_own(tmp_path: Path) -> None:
    shares = [None, 0.25, None, 0.75]  # at some steps alone
    write_run(tmp_path, {"train/loss": [4.0, 3.0, 2.0, 1.0], "needles/multi_key_2": shares})
    run = read_run("stage1", tmp_path)
    (curve,) = run.needles.values()
    assert curve.steps.tolist() == [1, 3] and curve.values.tolist() == [0.25, 0.75]
    assert "needles-multi_key_2 of stage1" in section_of(run)
    write_run(tmp_path / "other", {"train/loss": [1.5]})
    assert "needles" not in section_of(read_run("other", tmp_path / "other"))
