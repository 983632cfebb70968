"""Speeds of a study: what is timed, what one figure stands for, and what the page makes of them.

Catches: one figure for arms that compute differently; two for arms that differ in weights alone; a
mean in place of a median; a ratio to another arm than the teacher; figures of other settings; a
step's time without what lies between it and the one before.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_hydra.api import train as training
from megatron_hydra.errors import UserError
from megatron_hydra.study import measure_speeds
from megatron_hydra.study.config import Run, StudyConfig, load_study
from megatron_hydra.study.page import write_page
from megatron_hydra.study.results import ArmResult
from megatron_hydra.study.speeds import Speed, Speeds, load_speeds, timed_arms
from megatron_hydra.study.watch import StoppedError, Watch

ROOT = Path(__file__).parents[2]
# What of an arm may differ where its computation is the same: weights, tokens, rates, words.
ALIKE = {"about", "tokens", "stages", "replicates", "budgets", "calibration_tokens",
         "calibrates_recurrence", "reuse"}  # fmt: skip


@pytest.fixture
def study(tmp_path: Path) -> StudyConfig:
    places = [f"run.results={tmp_path}/results", f"speeds.out={tmp_path}/speeds.json"]
    return load_study(ROOT / "examples/study/cpu.yaml", places)


def made(study: StudyConfig, arm: str, budget: str, step_ms: float) -> Speed:
    """Every other step takes ten times as long as the median, which no mean survives."""
    run = Run(arm, budget, "quickstart", 0)
    steps = (step_ms, step_ms / 2, 10 * step_ms)
    return Speed(arm, budget, (), study.speed_inputs(run), 8, 2048, steps, 8, 16000, 100.0,
                 tuple(each / 10 for each in steps))  # fmt: skip


def saved(study: StudyConfig, *speeds: Speed) -> None:
    assert study.speeds is not None
    Speeds({"device": "some GPU", "versions": {"torch": "9.9"}}, speeds).save(
        Path(study.speeds.out)
    )


def page_of(study: StudyConfig, tmp_path: Path) -> str:
    failed = [ArmResult(r.arm, r.budget, r.teacher, r.seed, {}, "failed") for r in study.runs()]
    results = {result.run: result for result in failed}
    first = failed[0].run
    results[first] = dataclasses.replace(
        results[first], status="finished", provenance={"device": "CPU"}
    )
    write_page(study, results, tmp_path / "page.md", load_speeds(study))
    return (tmp_path / "page.md").read_text()


def test_one_of_the_arms_that_compute_alike_is_timed() -> None:
    study = load_study(ROOT / "examples/study/study.yaml")
    assert study.speeds is not None
    timed = {(each.run.arm, each.run.budget): each.stands_for for each in timed_arms(study)}
    assert next(iter(timed.items())) == (("teacher", "1"), ("recipe",))
    assert [arm for arm, _ in timed if arm in study.speeds.arms] == [arm for arm, _ in timed]
    assert {arm for arm, _ in timed} == {*study.speeds.arms}
    assert {"no_align", "half", "from_scratch", "head_faster"} <= {*timed["head", "1/8"]}
    assert "head_early" in timed["head", "1/8"] and "head_early" not in timed["head", "1/4"]
    assert timed["kda", "1/8"] == ("kda_early",) and timed["kda", "1/4"] == ()
    for (arm, _), others in timed.items():
        own = dataclasses.asdict(study.arms[arm])
        for other in others:
            theirs = dataclasses.asdict(study.arms[other])
            assert {key for key in own if own[key] != theirs[key]} <= ALIKE
    of_teacher = study.arms["kl_to_the_end"].stages["long_context"]["transfer"]["kl_weight"]
    assert of_teacher and timed["kl_to_the_end", "1/8"] == (), "it runs its teacher in stage 3"


def test_the_page_has_medians_and_their_ratios_to_the_teacher(study, tmp_path):
    saved(study, made(study, "head", "1/4", 50.0), made(study, "teacher", "1", 100.0))
    page = page_of(study, tmp_path)
    assert "speeds are measured apart" in page and "nothing is said of speed" not in page
    assert "2 of 4 arms are timed" in page and "some GPU; torch 9.9" in page
    _, _, table = page.partition("## How fast?")
    rows = [line.split(" | ")[2:] for line in table.splitlines() if " | " in line][1:]
    # 2048 tokens in 100 ms and in 50; 16000 in 100 ms; 8 in 10 ms and in 5.
    assert rows == [
        ["1", "8", "20,480", "1.00", "160,000", "1.00", "800", "1.00",
         "100.0 (50.0 to 1000.0)", "10.0 (5.0 to 100.0)", "recipe |"],
        ["1/4", "8", "40,960", "2.00", "160,000", "1.00", "1,600", "2.00",
         "50.0 (25.0 to 500.0)", "5.0 (2.5 to 50.0)",
         "calibrated, no_align, calibrated_no_align |"],
    ]  # fmt: skip


def test_without_the_teacher_there_is_no_ratio_and_without_speeds_no_word(study, tmp_path):
    assert "so that nothing is said of speed." in page_of(study, tmp_path)
    assert "How fast?" not in page_of(study, tmp_path)
    saved(study, made(study, "head", "1/4", 50.0))
    assert "| 40,960 |  | 160,000 |  | 1,600 |  | 50.0 (" in page_of(study, tmp_path)


def test_speeds_of_other_settings_are_not_told(study):
    speed = made(study, "head", "1/4", 50.0)
    other = dataclasses.replace(speed, inputs={**speed.inputs, "training": "[]"})
    saved(study, other)
    with pytest.raises(UserError, match=r"speeds.json has head at 1/4 with another training: meas"):
        load_speeds(study)
    study.speeds = None
    assert load_speeds(study) is None
    with pytest.raises(UserError, match="the study has no section speeds"):
        timed_arms(study)


def test_a_step_lasts_from_the_end_of_the_one_before(study, monkeypatch):
    """With what lies between; steps before those that are timed count nowhere."""
    clock, stops = [0.0], [False]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def train(config: Any, on_step: Any, asks_to_stop: Any) -> Any:
        assert (config.trainer.max_steps, config.data.seq_length) == (5, 1024)
        assert config.transfer.stage == "long_context"
        for step in range(1, 6):
            clock[0] += step  # the whole of it
            on_step(step, {"step_s": 0.001})
        folder = SimpleNamespace(hybrid=Path("trained"))
        return SimpleNamespace(is_complete=not stops[0], folder=folder)

    monkeypatch.setattr(training, "train", train)
    there = Path("there")
    config = study.stage_config(study.runs()[0], "long_context", there, there, there, there)
    found = measure_speeds._train(config, 2, 3, Watch())
    assert found == (Path("trained"), [3.0, 4.0, 5.0])
    stops[0] = True
    with pytest.raises(StoppedError):
        measure_speeds._train(config, 2, 3, Watch())


def test_a_gpu_that_others_use_is_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (95 * 2**30, 100 * 2**30))
    measure_speeds._check_alone()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 * 2**30, 100 * 2**30))
    with pytest.raises(UserError, match=r"20\.0 of the GPU's 100\.0 GiB are in use: speeds are"):
        measure_speeds._check_alone()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("speeds.arms=[heads]", r"speeds\.arms, which are those of questions, names 'heads'"),
        ("speeds.arms=[]", r"speeds\.arms is empty"),
        ("speeds.new_tokens=1", r"speeds\.new_tokens is 1; it must be 2 or more"),
    ],
)
def test_a_section_that_cannot_be_measured_is_refused(override, message):
    with pytest.raises(UserError, match=message):
        load_study(ROOT / "examples/study/cpu.yaml", [override])
