"""The report's memory: one number format, named; files of earlier releases; names in the legend."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit.scores import make_scores
from matplotlib.figure import Figure

from megatron_hydra.evaluation.reading import in_one_format, read_evaluation
from megatron_hydra.evaluation.results import Accuracy, Evaluation, ModelResult, NeedleGrid
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.report.chart_style import chart_style, plain_text
from megatron_hydra.report.charts import draw_cache
from megatron_hydra.report.measured import Measured
from megatron_hydra.report.page import render_report
from megatron_hydra.report.rendering import render
from megatron_hydra.report.sections import memory_section
from megatron_hydra.selection.cost import ServeDtype, cache_bytes_per_token, state_bytes
from megatron_hydra.selection.scores import HeadScores
from megatron_hydra.selection.shape import ModelShape

LAYERS, HEADS, GROUPS = 3, 6, 3
FA_HEADS: dict[int, list[int]] = {0: [0, 1], 1: [2], 2: [0, 4]}  # four of nine groups stored


@pytest.fixture
def scores() -> HeadScores:
    return make_scores(np.arange(18.0).reshape(LAYERS, HEADS), GROUPS, head_dim=16)


def head_plan(fa_heads: dict[int, list[int]] = FA_HEADS) -> HeadPlan:
    return HeadPlan.from_fa_heads(fa_heads, LAYERS, HEADS, GROUPS, "0" * 16)


def model(name: str, plan: HeadPlan | None, shape: ModelShape, dtype: ServeDtype) -> ModelResult:
    """As ``evaluate`` of an earlier release counted a model whose weights have a format."""
    return ModelResult(
        name=name,
        path=name,
        plan=None if plan is None else tuple(layer.fa_heads for layer in plan.layers),
        plan_name="",
        num_heads=LAYERS * HEADS,
        cache_bytes_per_token=int(cache_bytes_per_token(shape, dtype).of(plan)),
        state_bytes=int(state_bytes(shape, dtype).of(plan)),
        accuracy={("single", 64): Accuracy(15, 20)},
        grid=NeedleGrid("single", (64,), (0.0,), ((0.75,),)),
        loss_nats={64: 2.0},
    )


@pytest.fixture
def mixed(scores: HeadScores, tmp_path: Path) -> Evaluation:
    """A float32 teacher, a float32 untrained hybrid and the bf16 trained one of the same plan."""
    plan, path = head_plan(), tmp_path / "evaluation.json"
    models = (
        model("teacher", None, scores.shape, "fp32"),
        model("untrained", plan, scores.shape, "fp32"),
        model("trained", plan, scores.shape, "bf16"),
        model("all linear", head_plan({}), scores.shape, "fp32"),
    )
    Evaluation(models, 64, {}).save(path)
    data = json.loads(path.read_text())
    del data["serve_dtype"]
    path.write_text(json.dumps(data))
    return read_evaluation(path)


def rows(html: str) -> dict[str, list[str]]:
    """The cells of the memory table by model."""
    found = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', html)
    return {name: re.findall("<td>(.*?)</td>", cells) for name, cells in found}


def test_one_plan_has_one_share_whatever_its_weights_are(
    mixed: Evaluation, scores: HeadScores
) -> None:
    assert mixed.serve_dtype is None
    with chart_style():
        measured = Measured.of(in_one_format(mixed, scores.shape))
        html = render("memory.html", memory_section(measured))
    found = rows(html)
    assert [cells[2] for cells in found.values()] == ["100%", "44%", "44%", "0%"]
    assert found["untrained"] == found["trained"]
    # Nine groups of key and value, 16 channels each, two bytes.
    assert found["teacher"][1] == f"{9 * 2 * 16 * 2:,}"
    assert "Cache, bytes per token (bf16)" in html and "(fp32, else bf16)" in html
    assert "cache (bf16) and state of one sequence" in html


def test_the_page_of_an_earlier_evaluation_is_in_one_format(
    mixed: Evaluation, scores: HeadScores
) -> None:
    page = " ".join(render_report(scores, head_plan(), mixed, []).split())
    assert page.count("<td>44%</td>") == 2 and "<td>22%</td>" not in page
    assert "stores 44% of the teacher's cache per token" in page


def test_what_cannot_be_counted_anew_is_said_and_not_shown(
    mixed: Evaluation, scores: HeadScores
) -> None:
    odd = dataclasses.replace(mixed.models[1], state_bytes=12345)
    evaluation = dataclasses.replace(mixed, models=(mixed.models[0], odd, *mixed.models[2:]))
    assert in_one_format(evaluation, scores.shape) is evaluation
    page = " ".join(render_report(scores, head_plan(), evaluation, []).split())
    assert "megatron-hydra evaluate</code> counts all models in one format" in page
    assert "12,345" not in page and "<td>22%</td>" not in page
    assert "stores 44% of the teacher's cache per token" in page, "of groups, not of bytes"


def test_a_named_format_is_left_as_it_is(mixed: Evaluation, scores: HeadScores) -> None:
    named = dataclasses.replace(mixed, serve_dtype="fp32")
    assert in_one_format(named, scores.shape) is named


def _legend(figure: Figure) -> list[str]:
    (legend,) = (ax.get_legend() for ax in figure.axes)
    return [text.get_text() for text in legend.get_texts()]


def test_every_model_keeps_its_entry_and_its_line() -> None:
    """Names that matplotlib leaves out or reads as formulas, and more models than colours."""
    names = ["_mine", "__", "$x$", "plain", *(f"model {index}" for index in range(5))]
    lines = [(name, 100.0 + index, 5.0) for index, name in enumerate(names)]
    figure = draw_cache(lines, (8, 4096), "bf16", 64)
    entries = _legend(figure)
    assert [entry.removeprefix("\u200b").replace("\\", "") for entry in entries] == names
    (ax,) = figure.axes
    looks: set[Any] = {
        (line.get_color(), str(line._dash_pattern))
        for line in ax.lines
        if len(line.get_xdata()) > 2
    }
    assert len(looks) == len(names), "no two lines look alike"


def test_a_name_in_the_middle_of_a_text_is_not_changed() -> None:
    assert plain_text("a_b") == "a_b"
