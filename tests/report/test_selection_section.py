"""Tests of the report's section on the head selection: it tells what plan and table say."""

from __future__ import annotations

import re

import numpy as np
import pytest
from kit.scores import make_scores

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.report.chart_style import chart_style
from megatron_hydra.report.rendering import render
from megatron_hydra.report.selection_section import selection_section
from megatron_hydra.report.units import format_time
from megatron_hydra.selection.budget import Budget, Constraints
from megatron_hydra.selection.combination import Combination
from megatron_hydra.selection.pareto import ParetoTable, pareto_table
from megatron_hydra.selection.policy import plan_from_scores, random_plan
from megatron_hydra.selection.scores import HeadScores

LAYERS, HEADS, GROUPS = 2, 4, 2
TWO_HEADS = Budget("fa_heads", 2)
ONE_A_LAYER = Constraints(min_fa_per_layer=1)


@pytest.fixture(scope="module")
def scores() -> HeadScores:
    """Head 3 of each layer matters for one capability; head 2 of layer 0 almost as much."""
    generator = np.random.default_rng(0)
    effects = {name: generator.normal(0, 0.001, (6, LAYERS, HEADS)) for name in ("needle", "text")}
    effects["needle"][:, 0, 3] += 0.8
    effects["text"][:, 1, 3] -= generator.normal(0.5, 0.01, 6)
    effects["needle"][:, 0, 2] += generator.normal(0.4, 0.01, 6)
    capabilities = {"needle": "retrieval", "text": "next_token"}
    return make_scores({"path_patching": effects}, GROUPS, capabilities)


def show(scores: HeadScores, plan: HeadPlan, pareto: ParetoTable | None = None) -> str:
    with chart_style():
        return render("selection.html", selection_section(scores, plan, pareto))


def text_of(page: str) -> str:
    return " ".join(re.sub("<[^>]*>", " ", page).split())


def rows_after(page: str, title: str) -> list[str]:
    """Text of each row of the first table after ``title``, cells parted by single spaces."""
    part = page[page.index(title) :]
    rows = part[part.index("<tbody>") : part.index("</tbody>")].split("</tr>")[:-1]
    return [text_of(row) for row in rows]


def test_an_explained_plan_shows_how_sure_it_is_and_why_each_head_is_there(scores) -> None:
    page = show(scores, plan_from_scores(scores, TWO_HEADS, ONE_A_LAYER).plan)
    text = text_of(page)
    assert "2 of 2 FA heads are chosen again in 95% of resamples no ties" in text
    assert "0 of 2 FA heads are below the noise floor" in text
    assert "rank correlation of split halves" in text and "3 pairs or more per half" in text
    first, second = rows_after(page, "Why each head is in the plan")
    assert first.startswith("0.3 1 0.500 0.500 to 0.500 100% above +0.800 path patching on needle")
    strongest = f"{scores.mean_effects('path_patching', 'text')[1, 3]:+.3f}"  # negative
    assert second.startswith("1.3 2 0.500") and f"{strongest} path patching on text" in second
    assert first.endswith(" score") and second.endswith(" score")
    for words in ("retrieval", "next token", "budget: 2 heads"):
        assert words in text
    assert "What a budget buys" not in text


def test_the_reason_of_a_head_that_the_scores_alone_would_not_choose_is_told(scores) -> None:
    weighted = scores.with_combination(Combination(("path_patching",), weights={"next_token": 0.1}))
    page = show(weighted, plan_from_scores(weighted, TWO_HEADS, ONE_A_LAYER).plan)
    _, second = rows_after(page, "Why each head is in the plan")
    assert second.startswith("1.3 3 ") and second.endswith("constraint")
    assert "full attention by a constraint (1)" in page


def test_a_random_plan_says_that_its_heads_were_drawn(scores) -> None:
    page = show(scores, random_plan(scores, TWO_HEADS, seed=3).plan)
    rows = rows_after(page, "Why each head is in the plan")
    assert len(rows) == 2 and all(row.endswith(" random") for row in rows)
    assert "chosen again in" not in text_of(page)


def test_a_plan_without_an_explanation_says_so() -> None:
    scores = make_scores(np.arange(8.0).reshape(2, 4), GROUPS)
    page = show(scores, HeadPlan.from_fa_heads({0: [1]}, LAYERS, HEADS, GROUPS))
    assert "does not say why its heads were chosen" in page
    assert "Why each head is in the plan" not in page and "resamples" not in page


def test_scores_of_one_pair_have_no_interval_anywhere() -> None:
    scores = make_scores(np.arange(8.0).reshape(2, 4), GROUPS)
    page = show(scores, plan_from_scores(scores, TWO_HEADS).plan)
    assert "one pair per sub-probe: no interval" in page
    first, second = rows_after(page, "Why each head is in the plan")
    assert first.startswith("1.3 1 7.000 – – below") and second.startswith("1.2 2 6.000 – – below")


def test_a_plan_of_other_scores_is_refused(scores) -> None:
    plan = plan_from_scores(scores, TWO_HEADS).plan
    weighted = scores.with_combination(Combination(("path_patching",), weights={"next_token": 3.0}))
    with pytest.raises(UserError, match="other head scores than these"):
        show(weighted, plan)


def test_a_pareto_table_stands_with_the_plan_and_the_teacher(scores) -> None:
    budgets = [Budget("fa_heads", number) for number in (1, 4)]
    table = pareto_table(scores, budgets, Constraints(), 64, "h100")
    plan = plan_from_scores(scores, TWO_HEADS).plan
    page = show(scores, plan, table)
    one, four, own, teacher = rows_after(page, "What a budget buys")
    # One of four query groups of 2 x 8 bf16 values, and seven states of 8 x 8 float32 values with
    # 3 x 8 x 3 bf16 ones.
    share = (2 * 8 * 2 * 64 + 7 * (8 * 8 * 4 + 3 * 8 * 3 * 2)) / (4 * 2 * 8 * 2 * 64)
    assert "weights and KV cache served in bf16" in text_of(page)
    assert one.startswith("1 FA heads 1 ") and f" {share:.0%} " in one
    assert four.startswith("4 FA heads 4 ")
    assert own.startswith("this plan 2 ")
    assert teacher.startswith("teacher 8 100.0%") and " 100% " in teacher
    assert "64 tokens" in page and "H100 SXM" in page
    # No time and no count of operations is left as a power of ten.
    assert not re.search(r"\de-\d", " ".join((one, four, own, teacher)))
    expected = format_time(table.teacher.decode_ms / 1000)
    assert f" {expected} " in teacher and expected.endswith(" ns")

    wider = make_scores(np.ones((2, 6)), 3)
    of_another = pareto_table(wider, budgets, Constraints(), 64, "h100")
    with pytest.raises(UserError, match="Pareto table is of another teacher"):
        show(scores, plan, of_another)


def test_the_dashed_line_and_the_noise_floor_are_named(scores) -> None:
    page = show(scores, plan_from_scores(scores, TWO_HEADS).plan)
    picture = page[page.index("<svg") : page.index("</svg>")]
    second = sorted(scores.scores.ravel())[-2]
    for words in ("lowest score within the budget", f"cut at score {second:.3g}", "below noise"):
        assert words in picture
    caption = text_of(page[page.index("<figcaption>") : page.index("</figcaption>")])
    assert "Dashed: the lowest score within the budget" in caption
    assert "Hollow: below the noise floor" in caption and "±0.01" in caption
