"""Which heads keep full attention: the highest score that a budget and constraints allow.

Legend: l = layers, n = heads of a layer, c = choices in a table.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_hydra.selection.budget import Constraints, Limit, Problem
from megatron_hydra.selection.combination import Array
from megatron_hydra.selection.cost import PlanCost
from megatron_hydra.selection.shape import ModelShape

Head = tuple[int, int]
"""Layer and head, from 0."""
Solver = Literal["exact", "greedy"]
_Whole = NDArray[np.int64]


def choose_heads(
    problem: Problem, scores: Array, effect_size: Array, solver: Solver = "exact"
) -> frozenset[Head] | None:
    """The FA heads that keep most of the sum of scores.

    ``exact`` is exact: for a plain number of heads by taking the best (see :func:`_greedy`),
    under limits by a dynamic programme over the layers (see :func:`_solve`). ``greedy`` takes
    under limits, too, whatever head of the highest score still fits, as one would without a solver.

    Scores at or below 0 count as 0: they say that no effect was found. Among choices of equal
    score the one with fewer heads of score 0 wins under limits (where a group is stored anyway
    another FA head costs no cache, but FLOPs), then heads with larger effects, then earlier ones.

    Args:
        problem: Budget and constraints.
        scores: [l, n].
        effect_size: [l, n], orders heads of equal score.
        solver: `exact` or `greedy`.

    Returns:
        The heads; None if no choice (for ``greedy``: none that it finds) keeps to the limits.

    Raises:
        UserError: If the constraints leave a layer no number of FA heads.
    """
    evidence = np.maximum(scores, 0.0)
    if problem.limits and solver == "exact":
        return _solve(problem, evidence, effect_size)
    return _greedy(problem, evidence, effect_size)


def least_excess(problem: Problem, num_fa_heads: int = 0) -> float:
    """How many times its limits the cheapest plan costs that keeps to the constraints.

    Args:
        problem: With limits above 0.
        num_fa_heads: The plan has so many FA heads or more.

    Returns:
        The excess; infinite if the constraints allow no such plan.
    """
    shape = problem.shape
    counts = np.array(problem.constraints.layer_counts(shape))
    fewest = counts // -shape.heads_per_group  # groups, negated: the fewest are the cheapest
    totals = _Table.empty()
    for _ in range(shape.num_layers):
        totals = totals.join(0 * counts, counts, fewest[:, None], 0 * fewest[:, None])
    excess = [
        max(cost.at(heads, -score) / most for cost, most in problem.limits)
        for heads, score in zip(totals.heads.tolist(), totals.score.tolist())
        if heads >= num_fa_heads and problem.num_fa_heads in (None, heads)
    ]
    return min(excess, default=math.inf)


# --- dynamic programme ------------------------------------------------------------------------


class _Table(NamedTuple):
    """The best choice for each number of stored groups and of FA heads, of several layers at once.

    Scores are whole numbers, whose sums do not depend on the order: equal ones tie.
    """

    layer: _Whole  # [c]; 0 where the choices are for the model
    groups: _Whole  # [c]
    heads: _Whole  # [c]
    score: _Whole  # [c]
    tie: _Whole  # [c], the larger of equal scores is the better
    rows: _Whole  # [c, parts], which row of each part that was joined

    @classmethod
    def empty(cls, num_layers: int = 1) -> _Table:
        """No heads, of no parts."""
        none = np.zeros(num_layers, dtype=np.int64)
        return cls(np.arange(num_layers), none, none, none, none, none[:, None][:, :0])

    def where(self, good: NDArray[np.bool_]) -> _Table:
        """Some of the choices."""
        return _Table._make(column[good] for column in self)

    def join(self, groups: _Whole, heads: _Whole, score: _Whole, tie: _Whole) -> _Table:
        """The best of all choices here with all rows of one part more.

        Groups and heads of the part's rows are [rows], scores and ties [rows, layers].
        """
        width = int(self.heads.max(initial=0) + heads.max(initial=0)) + 1
        height = int(self.groups.max(initial=0) + groups.max(initial=0)) + 1
        lowest = np.iinfo(np.int64).min
        best, best_tie, source, taken = np.full((4, score.shape[1] * height * width), lowest)
        own = (self.layer * height + self.groups) * width + self.heads
        for row, step in enumerate((groups * width + heads).tolist()):
            cells = own + step
            sums, ties = self.score + score[row][self.layer], self.tie + tie[row][self.layer]
            known = best[cells]
            better = (sums > known) | ((sums == known) & (ties > best_tie[cells]))
            cells = cells[better]
            best[cells], best_tie[cells] = sums[better], ties[better]
            source[cells], taken[cells] = np.flatnonzero(better), row
        found = np.flatnonzero(best > lowest)
        layer, cell = np.divmod(found, height * width)
        rows = np.column_stack([self.rows[source[found]], taken[found]])
        return _Table(layer, cell // width, cell % width, best[found], best_tie[found], rows)

    def added(self, cost: PlanCost) -> Array:
        """What the choices add to a cost, [c]."""
        return np.asarray(cost.per_fa_head * self.heads + cost.per_group * self.groups)


def _solve(problem: Problem, evidence: Array, effect: Array) -> frozenset[Head] | None:
    """The best choice within limits, exactly.

    Constraints bind within a layer, and costs know only the model's numbers of stored groups and
    of FA heads. So of all choices for the first layers that agree in both numbers the best can
    take the place of the others, whatever is chosen for the layers that follow.
    """
    number, model = problem.num_fa_heads, problem.shape
    limits = list(problem.limits)
    if number is not None:
        limits += [Limit(PlanCost(0, sign, 0, 0), sign * number) for sign in (1, -1)]
    ranked, sizes, layers = _layer_tables(problem, limits, evidence, effect)
    costs = [[layer.added(cost) for cost, _ in limits] for layer in layers]
    least = np.array([[cost.min() for cost in of_layer] for of_layer in costs])
    most = np.array([[cost.max() for cost in of_layer] for of_layer in costs])
    table = _Table.empty()
    for i, layer in enumerate(layers):
        layer = _prune(layer, model, limits, least.sum(0) - least[i], most.sum(0) - most[i])
        layers[i] = layer
        table = table.join(layer.groups, layer.heads, layer.score[:, None], layer.tie[:, None])
        table = _prune(table, model, limits, least[i + 1 :].sum(0), most[i + 1 :].sum(0))
    for best in np.lexsort((table.tie, table.score))[::-1]:
        if _keeps_to(limits, int(table.heads[best]), int(table.groups[best])):
            return frozenset(
                (i, head)
                for i, row in enumerate(table.rows[best])
                for group, size in enumerate(layers[i].rows[row])
                for head in ranked[i, group, : sizes[size]].tolist()
            )
    return None


def _keeps_to(limits: list[Limit], num_heads: int, num_groups: int) -> bool:
    """Whether so many FA heads and groups keep to all limits, without rounding."""
    return all(
        Fraction(cost.fixed)
        + Fraction(cost.per_fa_head) * num_heads
        + Fraction(cost.per_group) * num_groups
        <= Fraction(most)
        for cost, most in limits
    )


def _prune(
    table: _Table, model: ModelShape, limits: list[Limit], least: Array, most: Array
) -> _Table:
    """Leave out what breaks a limit, or another choice can replace, whatever other layers add.

    Args:
        table: Choices for some layers.
        model: Of all layers.
        limits: Of the model.
        least: What the other layers add at least to the cost of each limit.
        most: The same at most.
    """
    fits = np.ones(len(table.score), dtype=bool)
    binding = []
    for (cost, limit), low, high in zip(limits, least, most):
        terms = (
            cost.fixed,
            cost.per_fa_head * model.total_heads,
            cost.per_group * model.total_groups,
        )
        slack = 1e-9 * sum(map(abs, (limit, *terms)))  # rounding is far below
        costs, room = table.added(cost), limit - cost.fixed
        fits &= costs + low <= room + slack
        free = room - slack - high  # up to here nothing that is added breaks the limit
        if (costs > free).any():
            binding.append((costs, np.maximum(costs - slack, free)))
    if len(binding) < 2:  # costs have an order: a choice must be cheaper than all better ones
        costs, enough = binding[0] if binding else np.zeros((2, len(fits)))
        best_first = np.lexsort((-table.tie, -table.score))
        cheapest = np.minimum.accumulate(costs[best_first])[:-1]
        fits[best_first[1:]] &= cheapest > enough[best_first[1:]]
    return table.where(fits)


def _layer_tables(
    problem: Problem, limits: list[Limit], evidence: Array, effect: Array
) -> tuple[_Whole, _Whole, list[_Table]]:
    """The table of each layer, whose rows say of each group which number of heads is FA.

    Returns:
        Heads of each group, the best first, [l, groups, n / groups]; the numbers; the tables.
    """
    shape, size = problem.shape, problem.shape.heads_per_group
    sizes = np.arange(0, size + 1, size if problem.constraints.whole_groups else 1)
    by_group = (shape.num_layers, shape.num_query_groups, size)
    score, tie = (x.reshape(by_group) for x in _in_whole_numbers(evidence, effect))
    order = np.lexsort((-tie, -score))
    score, tie = (np.take_along_axis(x, order, axis=2) for x in (score, tie))
    score, tie = (np.array([x[..., :k].sum(axis=2) for k in sizes]) for x in (score, tie))
    table = _Table.empty(shape.num_layers)
    for group in range(shape.num_query_groups):
        table = table.join(np.sign(sizes), sizes, score[..., group], tie[..., group])
    table = table.where(np.isin(table.heads, problem.constraints.layer_counts(shape)))
    # A number that costs nothing would only keep choices apart.
    table = table._replace(
        groups=table.groups * any(cost.per_group for cost, _ in limits),
        heads=table.heads * any(cost.per_fa_head for cost, _ in limits),
    )
    layers = [table.where(table.layer == layer) for layer in range(shape.num_layers)]
    return order + size * np.arange(shape.num_query_groups)[:, None], sizes, layers


def _in_whole_numbers(score: Array, effect: Array) -> tuple[_Whole, _Whole]:
    """Scores, and what decides among equal sums: fewer heads of score 0, then the effects' order.

    A score keeps 62 bits below the largest, less those that the sum of all may need: of 448 heads
    53, float64's own.
    """
    bits = 62 - score.size.bit_length() - math.frexp(score.max())[1]
    whole = np.rint(np.ldexp(score, bits)).astype(np.int64)
    tie = np.empty(score.size, dtype=np.int64)
    tie[np.lexsort((np.arange(score.size), -effect.ravel()))] = np.arange(score.size, 0, -1)
    # One head of score 0 less outweighs the places of all others.
    return whole, tie.reshape(score.shape) - (score == 0) * (tie.sum() + 1)


# --- greedy -----------------------------------------------------------------------------------


class _Unit(NamedTuple):
    """Heads of one layer that become FA together; sorts with the best first."""

    score: float  # negated
    effect: float  # negated
    layer: int
    heads: tuple[int, ...]


def _greedy(problem: Problem, evidence: Array, effect: Array) -> frozenset[Head] | None:
    """Take units, best first, each layer's least number before all.

    Without limits this is exact: all units have the same number of heads, within a layer the
    first have the highest sums, and a plan is any number of each layer's first units from its
    least to its largest, so an exchange of units cannot raise the sum.
    """
    shape, constraints = problem.shape, problem.constraints
    counts, step = constraints.layer_counts(shape), constraints.step(shape)
    layers = [_units(shape, constraints, layer, evidence, effect) for layer in range(len(evidence))]
    least, most = counts[0] // step, counts[-1] // step
    taken = {h for units in layers for h in _heads_of(units[:least])}
    groups = {_group_of(shape, head) for head in taken}
    for unit in sorted(unit for units in layers for unit in units[least:most]):
        heads = _heads_of([unit])
        with_unit = groups | {_group_of(shape, head) for head in heads}
        if problem.num_fa_heads is None:
            fits = unit.score < 0 and problem.allows(len(taken) + step, len(with_unit))
        else:
            fits = len(taken) + step <= problem.num_fa_heads
        if fits:
            taken |= heads
            groups = with_unit
    return frozenset(taken) if problem.allows(len(taken), len(groups)) else None


def _units(
    shape: ModelShape, constraints: Constraints, layer: int, evidence: Array, effect: Array
) -> list[_Unit]:
    """A layer's units, best first; heads that fill no whole unit are left out."""
    size = shape.heads_per_group if constraints.whole_groups else 1
    blocks = [range(first, first + size) for first in range(0, shape.num_heads, size)]
    blocks.sort(key=lambda block: _unit(layer, tuple(block), evidence, effect))
    per_unit = constraints.step(shape) // size
    return [
        _unit(layer, tuple(h for b in blocks[i : i + per_unit] for h in b), evidence, effect)
        for i in range(0, len(blocks) - per_unit + 1, per_unit)
    ]


def _unit(layer: int, heads: tuple[int, ...], evidence: Array, effect: Array) -> _Unit:
    score, size = (math.fsum(values[layer, h] for h in heads) for values in (evidence, effect))
    return _Unit(-score, -size, layer, heads)


def _heads_of(units: list[_Unit]) -> set[Head]:
    return {(unit.layer, head) for unit in units for head in unit.heads}


def _group_of(shape: ModelShape, head: Head) -> tuple[int, int]:
    return head[0], head[1] // shape.heads_per_group
