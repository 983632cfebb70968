"""Uneven plans: the layers that every one has, and that they are what a top-K of scores gives."""

from __future__ import annotations

import numpy as np
import pytest
from kit.scores import make_scores
from uneven_plan import layers_by_count, uneven_plan, uneven_scores

from megatron_hydra import cpu
from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.placement import place_heads
from megatron_hydra.selection.budget import Budget, Constraints
from megatron_hydra.selection.policy import choose_plan

cpu.install_if_needed()

THREE_TO_ONE, SEVEN_TO_ONE = 112, 56
cases = pytest.mark.parametrize("num_fa_heads", [THREE_TO_ONE, SEVEN_TO_ONE])
seeds = pytest.mark.parametrize("seed", range(5))


def counts(plan: HeadPlan) -> np.ndarray:
    return np.array([len(layer.fa_heads) for layer in plan.layers])


@cases
@seeds
def test_every_plan_has_the_layers_that_it_is_made_for(num_fa_heads: int, seed: int) -> None:
    plan = uneven_plan(num_fa_heads, seed)
    assert (plan.num_layers, plan.num_heads, plan.num_query_groups) == (28, 16, 8)
    assert counts(plan).sum() == num_fa_heads
    assert {0, 1, 3, 5, 9, 16} <= {*counts(plan)}


@cases
@seeds
def test_it_is_the_plan_that_the_planner_makes_of_the_scores(num_fa_heads: int, seed: int) -> None:
    scores = make_scores(uneven_scores(num_fa_heads, seed), num_query_groups=8)
    expected = choose_plan(scores, Budget("fa_heads", num_fa_heads), Constraints())
    assert uneven_plan(num_fa_heads, seed).layers == expected.layers


@cases
@seeds
def test_a_few_layers_hold_most_fa_heads(num_fa_heads: int, seed: int) -> None:
    found = np.sort(counts(uneven_plan(num_fa_heads, seed)))
    assert found[-7:].sum() > num_fa_heads / 2
    assert np.median(found) < found.mean()


@cases
def test_layers_whose_counts_are_not_given_differ_more_than_by_lot(num_fa_heads: int) -> None:
    variances = []
    for seed in range(20):
        found = counts(uneven_plan(num_fa_heads, seed))
        for count in (0, 1, 3, 5, 9, 16):
            found = np.delete(found, np.flatnonzero(found == count)[0])
        share = found.mean() / 16
        variances.append(found.var() / (16 * share * (1 - share)))
    assert np.mean(variances) > 2  # heads drawn by lot: about 1


@cases
def test_a_seed_gives_one_plan_and_another_seed_another(num_fa_heads: int) -> None:
    plan = uneven_plan(num_fa_heads, 3)
    assert uneven_plan(num_fa_heads, 3) == plan
    assert uneven_plan(num_fa_heads, 4).layers != plan.layers
    # What is measured with the default seed is measured of this plan.
    expected = {
        THREE_TO_ONE: [
            5, 4, 8, 5, 0, 7, 10, 8, 2, 16, 1, 3, 0, 0, 1, 1, 1, 1, 2, 8, 9, 3, 0, 6, 6, 5, 0, 0,
        ],
        SEVEN_TO_ONE: [
            0, 0, 4, 1, 0, 0, 5, 1, 0, 16, 0, 2, 0, 0, 0, 1, 1, 0, 0, 2, 9, 3, 0, 2, 4, 5, 0, 0,
        ],
    }[num_fa_heads]  # fmt: skip
    assert counts(uneven_plan(num_fa_heads)).tolist() == expected


@pytest.mark.parametrize("num_fa_heads", [34, 387])
def test_a_number_that_the_given_layers_leave_no_room_for_is_refused(num_fa_heads: int) -> None:
    with pytest.raises(UserError, match=f"35 to 386 FA heads, not {num_fa_heads}"):
        uneven_plan(num_fa_heads)


def test_the_ends_are_possible() -> None:
    assert sorted(counts(uneven_plan(386)))[-23:] == [16] * 23
    assert counts(uneven_plan(35)).sum() == 35


def test_a_layer_of_each_count() -> None:
    plan = HeadPlan.from_fa_heads({0: [3], 1: [0, 1], 2: [2]}, 4, 4, 2)
    found = layers_by_count(plan)
    assert list(found) == [0, 1, 2]
    assert found[1].fa_heads == (3,)


@cases
def test_two_ranks_have_unequal_shares(num_fa_heads: int) -> None:
    """What a uniform plan's tests do not see: FA heads, groups and costs that differ by rank."""
    placed = [place_heads(x, 8, 2, "balanced", 16384) for x in uneven_plan(num_fa_heads).layers]
    assert any(len(x.fa_heads(0)) != len(x.fa_heads(1)) for x in placed)
    assert any(len(x.owned_groups(0)) != len(x.owned_groups(1)) for x in placed)
    assert any(bool(x.fa_heads(0)) != bool(x.fa_heads(1)) for x in placed)
    waits = sum(max(x.predicted_costs) - min(x.predicted_costs) for x in placed)
    assert waits > 0
