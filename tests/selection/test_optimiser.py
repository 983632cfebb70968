"""Tests of the optimiser: against all subsets of heads of small models, against mixed-integer
programming, and greedy beside it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.exact_plans import least_excess_exactly, solve_exactly

from megatron_hydra.errors import UserError
from megatron_hydra.selection.budget import Budget, Constraints, Limit, Problem
from megatron_hydra.selection.cost import PlanCost
from megatron_hydra.selection.optimiser import Head, Solver, choose_heads, least_excess
from megatron_hydra.selection.shape import ModelShape

CONSTRAINTS = [
    Constraints(),
    Constraints(min_fa_per_layer=1),
    Constraints(per_layer=2),
    Constraints(whole_groups=True),
    Constraints(multiple_of=2),
    Constraints(min_fa_per_layer=1, whole_groups=True, multiple_of=2),
    Constraints(min_fa_per_layer=1, multiple_of=3),
    Constraints(max_fa_per_layer=3),
    Constraints(max_fa_per_layer=3, whole_groups=True),
]
BUDGETS = [
    Budget("fa_heads", 6),
    Budget("fa_ratio", Fraction(1, 2)),
    Budget("kv_cache_ratio", Fraction(1, 2)),
    Budget("cache_gib", 5.8e-6, 20),  # 6,227 bytes: state is half of it
    Budget("cache_gib", 5.4e-5, 200),
    Budget("decode_ms", 1.51e-5, 100),
    Budget("decode_ms", 2.4e-5, 1000, "h200"),
]
SHAPES = [
    ModelShape(3, 4, 2, 8, 32, 64, 64, True),
    ModelShape(2, 6, 2, 8, 32, 64, 64, True),
    ModelShape(3, 4, 4, 8, 32, 64, 64, True),
]


class Choices(NamedTuple):
    """All subsets of a small model's heads that keep to a problem."""

    heads: np.ndarray  # bool [choices, layers * heads]
    excess: np.ndarray  # [choices], cost over limit, the largest, of all that keep constraints


def all_choices(shape: ModelShape, constraints: Constraints, budget: Budget) -> Choices:
    """Enumerate subsets, each checked by its own arithmetic."""
    heads = np.array(list(itertools.product([False, True], repeat=shape.total_heads)))
    layers = heads.reshape(len(heads), shape.num_layers, shape.num_heads)
    groups = layers.reshape(len(heads), shape.num_layers, shape.num_query_groups, -1)
    counts, num_fa, stored = layers.sum(2), heads.sum(1), groups.any(3).sum((1, 2))
    good = (counts >= constraints.min_fa_per_layer).all(1)
    if constraints.max_fa_per_layer is not None:
        good &= (counts <= constraints.max_fa_per_layer).all(1)
    good &= (counts % constraints.multiple_of == 0).all(1)
    if constraints.per_layer is not None:
        good &= (counts == constraints.per_layer).all(1)
    if constraints.whole_groups:
        good &= (groups.all(3) == groups.any(3)).all((1, 2))
    problem = budget.problem(shape, constraints)
    excess = np.zeros(len(heads))
    if budget.kind in ("fa_heads", "fa_ratio"):
        good &= num_fa == 6
    for cost, most in problem.limits:
        values = cost.fixed + cost.per_fa_head * num_fa + cost.per_group * stored
        excess = np.maximum(excess, values / most)
    return Choices(heads[good & (excess <= 1)], excess[good])


def cases() -> Iterator[tuple[ModelShape, Constraints, Budget]]:
    """What can be asked of each shape: a contradiction within a layer is another test's."""
    for shape, constraints, budget in itertools.product(SHAPES, CONSTRAINTS, BUDGETS):
        try:
            budget.problem(shape, constraints)
        except UserError:
            continue
        yield shape, constraints, budget


def total(values: np.ndarray, chosen: frozenset[Head]) -> float:
    return sum(float(values[head]) for head in chosen)


def order_of(effects: np.ndarray) -> np.ndarray:
    """Each head's place by effect from 1, the largest last."""
    return np.argsort(np.argsort(effects.ravel())).reshape(effects.shape) + 1


def solve(
    shape: ModelShape, constraints: Constraints, budget: Budget, values: np.ndarray, solver: Solver
) -> frozenset[Head] | None:
    return choose_heads(budget.problem(shape, constraints), values, np.zeros_like(values), solver)


@pytest.mark.parametrize(("shape", "constraints", "budget"), list(cases()))
def test_no_choice_that_is_allowed_keeps_more(
    shape: ModelShape, constraints: Constraints, budget: Budget
) -> None:
    choices = all_choices(shape, constraints, budget)
    for seed in range(3):
        generator = np.random.default_rng(seed)
        values = generator.random((shape.num_layers, shape.num_heads)) ** 3
        values[values < 0.05] = 0.0
        found = solve(shape, constraints, budget, values, "exact")
        greedy = solve(shape, constraints, budget, values, "greedy")
        if not len(choices.heads):
            assert found is None and greedy is None
            problem = budget.problem(shape, constraints)
            assert least_excess(problem) == pytest.approx(choices.excess.min())
            assert choices.excess.min() > 1
            continue
        assert found is not None
        mask = np.zeros(values.shape, dtype=bool)
        mask[tuple(zip(*found, strict=True))] = bool(found)
        assert (choices.heads == mask.ravel()).all(1).any(), "the choice must be allowed"
        best = (choices.heads @ values.ravel()).max()
        assert total(values, found) == pytest.approx(best, abs=1e-9)
        if greedy is not None:
            assert total(values, greedy) <= best + 1e-12


@pytest.mark.parametrize("seed", range(40))
def test_any_two_linear_limits_are_kept_to_the_last_unit(seed: int) -> None:
    """Costs that rise or fall with heads, and limits that some choice meets exactly."""
    shape, generator = SHAPES[0], np.random.default_rng(seed)
    values = generator.random((3, 4)) ** 3
    heads = np.array(list(itertools.product([False, True], repeat=12)))
    num_fa, stored = heads.sum(1), heads.reshape(-1, 6, 2).any(2).sum(1)
    good, limits = np.ones(len(heads), dtype=bool), []
    for _ in range(2):
        cost = PlanCost(*generator.integers([0, -7, 0], [40, 8, 12]).tolist(), 0)
        costs = cost.fixed + cost.per_fa_head * num_fa + cost.per_group * stored
        limits.append(Limit(cost, int(generator.choice(costs))))
        good &= costs <= limits[-1].most
    problem = Problem(shape, Constraints(), limits=tuple(limits))
    found = choose_heads(problem, values, np.zeros_like(values))
    if not good.any():
        assert found is None
        return
    assert found is not None
    groups = {(layer, head // 2) for layer, head in found}
    assert problem.allows(len(found), len(groups))
    best = (heads[good] @ values.ravel()).max()
    assert total(values, found) == pytest.approx(best, abs=1e-9)


def test_the_cases_hold_every_kind_of_end() -> None:
    """Else the test above could be of feasible budgets alone, or of binding ones alone."""
    sizes = [len(all_choices(*case).heads) for case in cases()]
    assert min(sizes) == 0 and max(sizes) > 1000 and len(sizes) > 80


def numbers() -> Iterator[tuple[Constraints, int]]:
    """The numbers of FA heads that each of the constraints allows."""
    for constraints, number in itertools.product(CONSTRAINTS, range(13)):
        try:
            Budget("fa_heads", number).problem(SHAPES[0], constraints)
        except UserError:
            continue
        yield constraints, number


@pytest.mark.parametrize(("constraints", "number"), list(numbers()))
def test_greedy_is_exact_for_a_number_of_heads(constraints: Constraints, number: int) -> None:
    """A limit that nothing exceeds sends the exact one through the solver."""
    shape = SHAPES[0]
    problem = Budget("fa_heads", number).problem(shape, constraints)
    nothing = Limit(PlanCost(0, 1, 1, 0), 10**6)
    solved = Problem(shape, constraints, problem.num_fa_heads, (nothing,))
    for seed in range(4):
        generator = np.random.default_rng(seed)
        values, effects = generator.random((2, 3, 4))
        greedy = choose_heads(problem, values, effects, "greedy")
        assert choose_heads(problem, values, effects) == greedy
        assert choose_heads(solved, values, effects) == greedy
        assert greedy is not None and len(greedy) == number


def test_greedy_is_worse_where_a_group_is_shared() -> None:
    """One group may be stored: two middling heads in one are worth more than the best head."""
    shape = ModelShape(1, 4, 2, 8, 32, 64, 64, True)
    values = np.array([[0.9, 0.0, 0.6, 0.6]])
    budget = Budget("kv_cache_ratio", Fraction(1, 2))
    assert solve(shape, Constraints(), budget, values, "exact") == {(0, 2), (0, 3)}
    assert solve(shape, Constraints(), budget, values, "greedy") == {(0, 0)}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("seed", range(3))
def test_ties_fall_to_fewer_idle_heads_then_larger_effects(budget: Budget, seed: int) -> None:
    """Scores whose sums tie only if the same number of heads of each score is chosen."""
    shape, constraints = SHAPES[0], Constraints(min_fa_per_layer=1)
    generator = np.random.default_rng(seed)
    values = generator.choice([0.0, 0.0, 1.0, 20.0], size=(3, 4))
    effects = generator.random((3, 4))
    problem = budget.problem(shape, constraints)
    heads = all_choices(shape, constraints, budget).heads
    if not len(heads):
        assert choose_heads(problem, values, effects) is None
        return
    preference = np.argsort(np.argsort(effects.ravel()))
    idle = heads[:, values.ravel() == 0].sum(1)
    keys = np.stack([heads @ values.ravel(), -idle, heads @ preference], axis=1)
    found = choose_heads(problem, values, effects)
    assert found is not None
    mask = np.zeros((3, 4), dtype=bool)
    mask[tuple(zip(*found, strict=True))] = True
    key = [mask.ravel() @ values.ravel(), -mask[values == 0].sum(), mask.ravel() @ preference]
    assert key == max(keys.tolist())
    assert choose_heads(problem, values, effects) == found, "the same again"


@pytest.mark.parametrize("budget", BUDGETS[2:])
@pytest.mark.parametrize("seed", range(6))
def test_sums_that_tie_by_other_scores_fall_to_fewer_idle_heads_too(
    budget: Budget, seed: int
) -> None:
    """1 and 3 are worth as much as 2 and 2, exactly; the effects' order decides last."""
    shape, generator = SHAPES[seed % 2], np.random.default_rng(seed)
    values = generator.choice([0.0, 1.0, 2.0, 3.0], size=(shape.num_layers, shape.num_heads)) / 4
    effects = generator.random(values.shape)
    heads = all_choices(shape, Constraints(), budget).heads
    found = choose_heads(budget.problem(shape, Constraints()), values, effects)
    if not len(heads):
        assert found is None
        return
    assert found is not None
    weights = np.stack([4 * values, -1.0 * (values == 0), order_of(effects)]).reshape(3, -1)
    best = max((heads @ weights.T).round().tolist())
    assert [round(sum(row[i * shape.num_heads + h] for i, h in found)) for row in weights] == best


class Drawn(NamedTuple):
    """A problem with limits, and scores with ties."""

    problem: Problem
    values: np.ndarray
    effects: np.ndarray


@st.composite
def problems(draw: st.DrawFn) -> Drawn:
    """Costs of bytes or of seconds that rise or fall with heads, one or two, loose or tight."""
    layers, groups, size = (draw(st.integers(1, most)) for most in (4, 3, 4))
    shape = ModelShape(layers, groups * size, groups, 8, 32, 64, 64, True)
    constraints = Constraints(
        draw(st.integers(0, 2)), None, draw(st.booleans()), draw(st.sampled_from([1, 1, 2, 3]))
    )
    unit = draw(st.sampled_from([1, 512, 1 / 3.35e12]))
    limits = []
    for _ in range(draw(st.integers(1, 2))):
        fixed, head, group = draw(st.tuples(*map(st.integers, (0, -7, 0), (90, 8, 12))))
        fixed += max(0, -head) * shape.total_heads  # no cost is below 0
        cost = PlanCost(fixed * unit, head * unit, group * unit, 0)
        heads = draw(st.integers(0, shape.total_heads))
        limits.append(
            Limit(cost, cost.at(heads, draw(st.integers(0, min(heads, layers * groups)))))
        )
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    few = [0.0, 0.0, 0.1, 0.35, 1.0]  # no two sets of them have the same sum unless they are alike
    values = generator.choice(few, size=(layers, shape.num_heads))
    if draw(st.booleans()):
        values = generator.random(values.shape) ** 4
    return Drawn(
        Problem(shape, constraints, None, tuple(limits)), values, generator.random(values.shape)
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(problems())
def test_mixed_integer_programming_finds_no_other_plan(drawn: Drawn) -> None:
    problem, values, effects = drawn
    try:
        expected = solve_exactly(*drawn)
    except UserError as error:
        with pytest.raises(UserError, match=re.escape(str(error))):
            choose_heads(*drawn)
        return
    found = choose_heads(*drawn)
    assert (found is None) == (expected is None)
    if all(limit.most > 0 for limit in problem.limits):
        for least in (0, 1):
            excess = least_excess_exactly(problem, least)
            assert least_excess(problem, least) == pytest.approx(excess, rel=1e-6)
    if found is None or expected is None or found == expected:
        return
    # Equally good in every respect: both have as many heads of each score, of the same places.
    assert sorted(values[head] for head in found) == sorted(values[head] for head in expected)
    order = order_of(effects)
    assert total(order, found) == total(order, expected)


def test_a_plan_of_the_papers_size_is_solved_in_a_moment() -> None:
    shape = ModelShape(28, 16, 8, 128, 2048, 6144, 151936, True)
    values = np.random.default_rng(0).random((28, 16)) ** 8
    problem = Budget("cache_gib", 8, 524288).problem(shape, Constraints(min_fa_per_layer=1))
    found = choose_heads(problem, values, np.zeros_like(values))
    greedy = choose_heads(problem, values, np.zeros_like(values), "greedy")
    assert found is not None and greedy is not None
    groups = {(layer, head // 2) for layer, head in found}
    nbytes = len(groups) * 2 * 128 * 2 * 524288 + (448 - len(found)) * (128 * 128 * 4 + 3 * 128 * 6)
    assert nbytes <= 8 * 2**30 < nbytes + 2 * 128 * 2 * 524288
    assert len({layer for layer, _ in found}) == 28
    assert total(values, found) > total(values, greedy)
