"""Tests of the policy: the chosen heads against brute force, ties, budgets, the random control."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations

import pytest

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.policy import make_budget, plan_from_scores, random_plan
from megatron_hydra.selection.scores import HeadScores


def make_scores(
    rows: Sequence[Sequence[float]], effects: Sequence[Sequence[float]] | None = None
) -> HeadScores:
    return HeadScores(
        len(rows),
        len(rows[0]),
        1,
        "abc",
        "hand",
        rows,
        {} if effects is None else {"probe": effects},
        rows,
        {"seed": 4},
    )


def chosen(plan: HeadPlan) -> list[tuple[int, int]]:
    return [(index, head) for index, layer in enumerate(plan.layers) for head in layer.fa_heads]


@pytest.mark.parametrize("minimum", [0, 1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_no_other_plan_within_the_budget_has_a_higher_total(seed: int, minimum: int) -> None:
    draw = random.Random(seed)
    rows = [[draw.random() ** 3 for _ in range(4)] for _ in range(3)]
    plan, _ = plan_from_scores(make_scores(rows), num_fa_heads=6, min_fa_per_layer=minimum)
    heads = [(layer, head) for layer in range(3) for head in range(4)]
    best = max(
        sum(rows[layer][head] for layer, head in subset)
        for subset in combinations(heads, 6)
        if all(sum(layer == i for layer, _ in subset) >= minimum for i in range(3))
    )
    plan.check(minimum)
    assert plan.num_fa_heads == 6
    assert sum(rows[layer][head] for layer, head in chosen(plan)) == pytest.approx(best)


def test_layer_minimum_displaces_the_weakest_of_other_layers() -> None:
    scores = make_scores([[0.9, 0.8, 0.7, 0.6], [0.3, 0.2, 0.1, 0.05]])
    plan, summary = plan_from_scores(scores, num_fa_heads=3)
    assert chosen(plan) == [(0, 0), (0, 1), (0, 2)]
    assert summary.num_for_layer_minimum == 0
    plan, summary = plan_from_scores(scores, num_fa_heads=3, min_fa_per_layer=1)
    assert chosen(plan) == [(0, 0), (0, 1), (1, 0)]
    assert summary.num_for_layer_minimum == 1
    assert summary.num_tie_filled == 0


def test_heads_without_evidence_are_ordered_by_effect_size_then_index() -> None:
    """Scores of 0 and below count as equal: a negative one does not lose to a zero."""
    scores = make_scores([[0.0, 0.5, -0.4, 0.0]], effects=[[0.01, 0.5, -0.3, 0.01]])
    plan, summary = plan_from_scores(scores, num_fa_heads=3)
    assert chosen(plan) == [(0, 0), (0, 1), (0, 2)]
    assert summary.num_without_evidence == 2
    assert summary.num_tie_filled == 2
    assert plan.provenance["num_tie_filled"] == 2
    plan, _ = plan_from_scores(scores, num_fa_heads=2)
    assert chosen(plan) == [(0, 1), (0, 2)]


def test_ties_above_zero_are_counted_too() -> None:
    scores = make_scores([[0.9, 0.5, 0.5, 0.5]])
    plan, summary = plan_from_scores(scores, num_fa_heads=3)
    assert chosen(plan) == [(0, 0), (0, 1), (0, 2)]
    assert (summary.num_tie_filled, summary.num_without_evidence) == (2, 0)
    _, summary = plan_from_scores(scores, num_fa_heads=4)
    assert summary.num_tie_filled == 0


def test_a_head_held_by_its_layer_is_no_tie_with_another_layer() -> None:
    scores = make_scores([[0.9, 0.8], [0.8, 0.1]])
    _, summary = plan_from_scores(scores, num_fa_heads=2, min_fa_per_layer=1)
    assert summary.num_tie_filled == 0
    _, summary = plan_from_scores(scores, num_fa_heads=2)
    assert summary.num_tie_filled == 1


def test_plan_carries_its_origin() -> None:
    plan, _ = plan_from_scores(make_scores([[0.1, 0.2]]), num_fa_heads=1, min_fa_per_layer=1)
    assert plan.teacher_config_hash == "abc"
    assert plan.provenance["policy"] == "highest_scores"
    assert plan.provenance["scorer"] == "hand"
    assert plan.provenance["scores"] == {"seed": 4}


def test_summary_counts_heads_and_stored_groups() -> None:
    scores = HeadScores(
        2, 4, 2, "", "hand", [[1, 1, 0, 0], [1, 0, 1, 0]], {}, [[0] * 4, [0] * 4], {}
    )
    _, summary = plan_from_scores(scores, fa_ratio=Fraction(1, 2))
    assert summary.fa_heads_per_layer == (2, 2)
    assert summary.num_la_heads == 4
    assert summary.kv_cache_share == Fraction(3, 4)


@pytest.mark.parametrize(
    ("ratio", "num_heads", "expected", "asked_for"),
    [
        (Fraction(1, 4), 8, 4, None),
        (Fraction(1, 3), 8, 5, Fraction(16, 3)),
        (Fraction(1, 32), 8, 1, Fraction(1, 2)),
        (Fraction(1), 8, 16, None),
    ],
)
def test_ratio_is_rounded_to_whole_heads_and_says_so(
    ratio: Fraction, num_heads: int, expected: int, asked_for: Fraction | None
) -> None:
    budget = make_budget(2, num_heads, fa_ratio=ratio)
    assert (budget.num_fa_heads, budget.asked_for) == (expected, asked_for)


@pytest.mark.parametrize(
    ("budget", "sentence"),
    [
        ({}, "either as a ratio of FA heads or as their number"),
        ({"fa_ratio": Fraction(1, 2), "num_fa_heads": 2}, "either as a ratio"),
        ({"fa_ratio": Fraction(0)}, "ratio of FA heads 0 must be above 0 and at most 1"),
        ({"fa_ratio": Fraction(3, 2)}, "ratio of FA heads 3/2 must be above 0 and at most 1"),
        ({"fa_ratio": Fraction(1, 100)}, "ratio 1/100 of 12 heads is less than half a head"),
        ({"num_fa_heads": 13}, "13 FA heads asked for, but the model has 12 heads"),
        ({"num_fa_heads": -1}, "-1 FA heads asked for"),
        ({"num_fa_heads": 2, "min_fa_per_layer": 1}, "cannot give 1 to each of 3 layers"),
        ({"num_fa_heads": 12, "min_fa_per_layer": 5}, "but a layer has 4"),
        ({"num_fa_heads": 12, "min_fa_per_layer": -1}, "at least -1 FA heads a layer"),
    ],
)
def test_budgets_that_cannot_be_met_are_explained(
    budget: dict[str, Fraction | int], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        plan_from_scores(make_scores([[0.0] * 4] * 3), **budget)  # type: ignore[arg-type]


def test_random_plan_keeps_the_budget_and_follows_the_seed() -> None:
    plans = [random_plan(3, 8, 4, 6, 1, seed, "abc") for seed in range(20)]
    for plan in plans:
        plan.check(min_fa_per_layer=1)
        plan.check_teacher(3, 8, 4, "abc")
        assert plan.num_fa_heads == 6
        assert plan.teacher_config_hash == "abc"
    assert random_plan(3, 8, 4, 6, 1, 7, "abc").layers == plans[7].layers
    assert len({plan.layers for plan in plans}) == 20
    counts = [sum((0, head) in chosen(plan) for plan in plans) for head in range(8)]
    assert min(counts) > 0, "each head must have its chance"


def test_random_plan_refuses_a_budget_that_cannot_be_met() -> None:
    with pytest.raises(UserError, match="cannot give 3 to each of 3 layers"):
        random_plan(3, 8, 4, 6, 3, 0)
