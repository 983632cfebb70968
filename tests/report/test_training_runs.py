"""A run's curves from its event files, those of several lives and of skipped steps too."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.colors import to_hex
from test_report import write_events, write_run

from megatron_hydra.report.chart_style import chart_style
from megatron_hydra.report.charts import draw_curve, draw_losses
from megatron_hydra.report.rendering import render
from megatron_hydra.report.sections import training_section
from megatron_hydra.report.training_runs import RecordedRun, read_run


def section_of(run: RecordedRun) -> str:
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


def test_a_validation_loss_stands_beside_the_training_loss(tmp_path: Path) -> None:
    """Each point where it was measured, each part by its own curve, and in words."""
    total, kl, ce = (
        [5.0, 4.0, 3.0, 2.5, 2.0],
        [2.0, 1.5, 1.0, 0.75, 0.5],
        [3.0, 2.5, 2.0, 1.75, 1.5],
    )
    held_out = {
        "validation/loss": [None, 4.5, None, 3.5, math.nan],
        "validation/kl": [None, 1.75, None, 1.25, 1.0],
        "validation/ce": [None, 2.75, None, 2.25, 2.125],
    }
    write_run(tmp_path, {"train/kl": kl, "train/ce": ce, "train/loss": total, **held_out})
    run = read_run("stage2", tmp_path)
    assert (
        "validation on held-out samples (dashed): KL 1.75 → 1, cross entropy 2.75 → 2.125, "
        "total 4.5 → 3.5"
    ) in section_of(run)
    with chart_style():
        (ax,) = draw_losses(run).axes
    dashed = [line for line in ax.lines if line.is_dashed() and len(line.get_xdata())]
    drawn = {tuple(line.get_xydata().ravel()): line.get_color() for line in dashed}
    assert drawn.keys() == {
        (1, 1.75, 3, 1.25, 4, 1.0), (1, 2.75, 3, 2.25, 4, 2.125), (1, 4.5, 3, 3.5),
    }  # fmt: skip
    solid = {line.get_label(): line.get_color() for line in ax.lines if not line.is_dashed()}
    assert drawn[1, 1.75, 3, 1.25, 4, 1.0] == solid["KL"] != solid["cross entropy"]
    entries = [text.get_text() for text in ax.get_legend().get_texts()]
    assert entries == ["KL", "cross entropy", "total", "validation"]


def test_the_validation_of_an_alignment_is_seen_beside_its_layers(tmp_path: Path) -> None:
    layer, held_out = [1.0, 0.5], [None, 3.0]
    curves = {f"train/alignment/layer_0{index}": layer for index in range(2)}
    both = [2.0, 1.0]
    curves |= {"train/alignment": both, "train/loss": both, "validation/loss": held_out}
    write_run(tmp_path, curves)
    run = read_run("stage1", tmp_path)
    assert "(dashed): alignment 3 → 3" in section_of(run)
    with chart_style():
        (ax,) = draw_losses(run).axes
    (point,) = [line for line in ax.lines if line.is_dashed() and len(line.get_xdata())]
    others = {to_hex(line.get_color()) for line in ax.lines if not line.is_dashed()}
    assert to_hex(point.get_color()) not in others and point.get_marker() == "o"
    assert ax.get_ylim()[1] > 3, "within the axes"


def test_a_run_without_a_validation_says_nothing_of_one(tmp_path: Path) -> None:
    losses = [4.0, 3.0]
    write_run(tmp_path, {"train/loss": losses, "validation/loss": [math.nan, None]})
    assert "validation" not in section_of(read_run("stage1", tmp_path)).lower()


def test_a_run_of_one_step_is_a_dot(tmp_path: Path) -> None:
    write_run(tmp_path, {"train/loss": [1.5]})
    assert "total 1.5 → 1.5" in section_of(read_run("stage1", tmp_path))


def test_needles_found_while_training_are_a_curve_of_their_own(tmp_path: Path) -> None:
    shares = [None, 0.25, None, 0.75]  # at some steps alone
    write_run(tmp_path, {"train/loss": [4.0, 3.0, 2.0, 1.0], "needles/multi_key_2": shares})
    run = read_run("stage1", tmp_path)
    (curve,) = run.needles.values()
    assert curve.steps.tolist() == [1, 3] and curve.values.tolist() == [0.25, 0.75]
    assert "needles-multi_key_2 of stage1" in section_of(run) and "teacher" not in section_of(run)
    write_run(tmp_path / "other", {"train/loss": [1.5]})
    assert "needles" not in section_of(read_run("other", tmp_path / "other"))


def test_the_teacher_is_a_dashed_line_beside_the_needles_found(tmp_path: Path) -> None:
    shares = [None, 0.25, None, 0.5]
    of_teacher = [None, 0.75, None, 0.75]
    tags = {"needles/single": shares, "teacher_needles/single": of_teacher}
    write_run(tmp_path, {"train/loss": [4.0, 3.0, 2.0, 1.0], **tags})
    write_events(tmp_path, {"train/loss": [1.0, 0.5]}, first_step=4)  # it went on
    run = read_run("stage1", tmp_path)
    assert list(run.needles) == ["single"] and run.teacher_needles == {"single": 0.75}
    assert ">teacher<" in section_of(run)
    with chart_style():
        (ax,) = draw_curve(run.needles["single"], "needles", "share", True, 0.75).axes
    (line,) = (line for line in ax.lines if line.get_label() == "teacher")
    assert line.get_ydata() == [0.75, 0.75] and line.is_dashed()
    assert ax.get_ylim() == (0, 1.08 * 0.75), "above the curve's own values"
