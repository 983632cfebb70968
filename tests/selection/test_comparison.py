"""Tests of the comparison of two plans: overlap, chance, rank correlation, costs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from kit.plans import all_fa
from kit.scores import make_scores

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.budget import Budget, Constraints
from megatron_hydra.selection.comparison import compare_plans
from megatron_hydra.selection.cost import costs_of
from megatron_hydra.selection.policy import plan_from_scores

FIRST = HeadPlan.from_fa_heads({0: [0, 1], 1: [2]}, 2, 4, 2)
SECOND = HeadPlan.from_fa_heads({0: [1], 1: [2, 3]}, 2, 4, 2)


def test_heads_that_differ_and_their_overlap() -> None:
    found = compare_plans(FIRST, SECOND, 100, "h100")
    assert found.shared == ((0, 1), (1, 2))
    assert found.only_first == ((0, 0),)
    assert found.only_second == ((1, 3),)
    assert found.jaccard == 2 / 4
    assert found.rank_correlation is None and found.costs is None, "written by hand"
    assert compare_plans(FIRST, FIRST, 100, "h100").jaccard == 1


def test_jaccard_by_chance_is_the_mean_over_all_choices() -> None:
    shares = []
    for other in itertools.combinations(range(8), 2):
        shared = len({0, 1, 6} & set(other))
        shares.append(shared / (5 - shared))
    pair = HeadPlan.from_fa_heads({0: [3], 1: [0]}, 2, 4, 2)
    found = compare_plans(FIRST, pair, 100, "h100")
    assert found.jaccard_by_chance == pytest.approx(np.mean(shares))
    nothing = HeadPlan.from_fa_heads({}, 2, 4, 2)
    assert compare_plans(nothing, nothing, 100, "h100").jaccard_by_chance == 1
    assert compare_plans(nothing, FIRST, 100, "h100").jaccard_by_chance == 0


def test_scores_and_costs_are_compared_where_the_files_carry_them() -> None:
    rows = np.array([[0.9, 0.8, 0.7, 0.6], [0.5, 0.4, 0.3, 0.2]])
    moved = rows.copy()
    moved[0, 0], moved[1, 3] = 0.2, 0.9  # the first and last of eight ranks change places
    first = plan_from_scores(make_scores(rows), Budget("fa_heads", 2), Constraints())
    second = plan_from_scores(make_scores(moved), Budget("fa_heads", 4), Constraints())
    found = compare_plans(first.plan, second.plan, 1000, "h200")
    assert found.rank_correlation == pytest.approx(1 - 6 * (7**2 + 7**2) / (8 * (64 - 1)))
    assert found.costs == tuple(
        costs_of(plan.shape, plan.plan, 1000, "h200") for plan in (first, second)
    )
    level = plan_from_scores(make_scores(np.ones((2, 4))), Budget("fa_heads", 2))
    found = compare_plans(first.plan, level.plan, 1000, "h200")
    assert found.rank_correlation is None, "equal scores have no ranks"


def test_costs_of_a_plan_by_hand_follow_the_others_shape() -> None:
    other = plan_from_scores(make_scores(np.eye(2, 4)), Budget("fa_heads", 2))
    by_hand = HeadPlan(FIRST.layers, FIRST.num_query_groups)
    found = compare_plans(by_hand, other.plan, 1000, "h100")
    assert found.costs is not None
    assert found.costs[0] == costs_of(other.shape, by_hand, 1000, "h100")


def test_plans_of_different_teachers_are_not_compared() -> None:
    with pytest.raises(UserError, match="2 layers of 4 heads .* has 1 layers"):
        compare_plans(FIRST, all_fa(1, 4, 2), 100, "h100")
    a, b = (HeadPlan(FIRST.layers, 2, name) for name in ("aaaa", "bbbb"))
    with pytest.raises(UserError, match="made for another teacher"):
        compare_plans(a, b, 100, "h100")
