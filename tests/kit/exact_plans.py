"""Plans by mixed-integer programming (HiGHS, through SciPy): what the library's are held to.

Legend: t = heads, g = query groups, both of all layers.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from megatron_hydra.selection.budget import Limit, Problem
from megatron_hydra.selection.combination import Array
from megatron_hydra.selection.optimiser import Head

# The solver stops within 1e-6 of the best objective: with this for the highest score, that is
# 1e-9 of it.
_HIGHEST = 1e3
_INFEASIBLE = 2  # scipy.optimize.milp's status


def solve_exactly(problem: Problem, scores: Array, effect_size: Array) -> frozenset[Head] | None:
    """The FA heads of the highest score within limits; of equal scores as ``choose_heads``.

    Solved once for the highest score, then once more for the best of the choices that have as
    many heads of each score. Choices of equal sums but other scores are not told apart.
    """
    evidence, effect = np.maximum(scores, 0.0), effect_size
    rows = _Rows(problem)
    if not rows.add_limits():
        return None
    values = evidence.ravel()
    highest = values.max()
    objective = np.zeros(rows.num_columns)
    objective[: values.size] = -values * (_HIGHEST / highest if highest > 0 else 0.0)
    found = rows.solve(objective)
    if found is None:
        return None
    chosen = found[: values.size]
    if _has_ties(values, chosen):
        chosen = _break_ties(rows, values, effect.ravel(), chosen)
    layers, heads = np.unravel_index(np.flatnonzero(chosen), evidence.shape)
    return frozenset(zip(layers.tolist(), heads.tolist()))


def least_excess_exactly(problem: Problem, num_fa_heads: int = 0) -> float:
    """How many times its limits the cheapest plan costs, with so many FA heads or more."""
    rows = _Rows(problem)
    rows.add_counts(1.0, 0.0, 0.0, num_fa_heads, np.inf)
    for cost, most in problem.limits:
        # fixed + a x + b y <= most * excess
        per_head, per_group = cost.per_fa_head / most, cost.per_group / most
        rows.add_counts(per_head, per_group, -1.0, -np.inf, -cost.fixed / most)
    objective = np.zeros(rows.num_columns)
    objective[-1] = 1.0
    heads = rows.solve(objective, most_excess=np.inf)
    if heads is None:  # not for the limits: the excess may be as large as it takes
        return math.inf
    num_groups = heads.reshape(-1, problem.shape.heads_per_group).any(axis=1).sum()
    return max(cost.at(int(heads.sum()), int(num_groups)) / most for cost, most in problem.limits)


def _has_ties(values: Array, chosen: NDArray[np.bool_]) -> bool:
    """Whether another choice may have the same scores, or fewer heads of score 0."""
    left_out = np.isin(values[chosen], values[~chosen])
    return bool(left_out.any() or (values[chosen] == 0).any())


def _break_ties(
    rows: _Rows, values: Array, effect: Array, chosen: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """The best of the choices with as many heads of each score as ``chosen``, [t].

    Whole numbers throughout, so nothing is lost to rounding: heads are preferred by their place
    in the order of effects.
    """
    preference = np.empty(values.size)
    preference[np.lexsort((np.arange(values.size), -effect))] = np.arange(values.size, 0, -1)
    for value in np.unique(values[chosen]):
        alike = (values == value).astype(float)
        number = float(alike @ chosen)
        rows.add(np.pad(alike, (0, rows.num_columns - alike.size)), number if value else 0, number)
    objective = np.zeros(rows.num_columns)
    # One head of score 0 less outweighs every preference.
    objective[: values.size] = np.where(values == 0, preference.sum(), 0.0) - preference
    found = rows.solve(objective)
    assert found is not None  # ``chosen`` itself is a solution
    return found[: values.size]


class _Rows:
    """The linear constraints; columns: head is FA [t], group is stored [g], units [l], excess."""

    def __init__(self, problem: Problem) -> None:
        shape, constraints = problem.shape, problem.constraints
        self.problem = problem
        self.t, self.g, num_layers = shape.total_heads, shape.total_groups, shape.num_layers
        self.num_columns = self.t + self.g + num_layers + 1
        group_of = sparse.kron(sparse.eye(self.g), np.ones((shape.heads_per_group, 1)))
        in_layer = sparse.kron(sparse.eye(num_layers), np.ones((1, shape.num_heads)))
        counts, step = constraints.layer_counts(shape), constraints.step(shape)
        structure = sparse.bmat(
            [
                # An FA head's group is stored; of whole groups, all heads are FA then.
                [sparse.eye(self.t), -group_of, None, sparse.csr_matrix((self.t, 1))],
                [in_layer, None, -step * sparse.eye(num_layers), None],
            ]
        )
        lower = np.zeros(structure.shape[0])
        if not constraints.whole_groups:
            lower[: self.t] = -np.inf
        self.constraints = [LinearConstraint(structure.tocsr(), lower, 0.0)]
        # A layer has a whole number of units, from its least to its largest.
        self.first, self.last = np.zeros(self.num_columns), np.ones(self.num_columns)
        units = slice(self.t + self.g, -1)
        self.first[units], self.last[units] = counts[0] // step, counts[-1] // step
        if problem.num_fa_heads is not None:
            self.add_counts(1.0, 0.0, 0.0, problem.num_fa_heads, problem.num_fa_heads)

    def add(self, row: Array, lower: float, upper: float) -> None:
        """Ask for ``lower <= row @ columns <= upper``."""
        self.constraints.append(LinearConstraint(row[None], lower, upper))

    def add_counts(
        self, per_head: float, per_group: float, per_excess: float, lower: float, upper: float
    ) -> None:
        """The same for the numbers of FA heads and stored groups in the model, and the excess."""
        row = np.zeros(self.num_columns)
        row[: self.t], row[self.t : self.t + self.g] = per_head, per_group
        row[-1] = per_excess
        self.add(row, lower, upper)

    def add_limits(self) -> bool:
        """Keep to the problem's limits; False if no numbers of heads and groups can.

        What the limits allow is a set of points, number of groups by number of heads. Its convex
        hull, with whole numbers as coefficients, takes the place of the costs: with bytes or
        seconds the solver's tolerance would let a plan slip over its budget.
        """
        columns = {
            groups: heads
            for groups in range(self.g + 1)
            if (heads := _allowed_heads(self.problem.limits, groups, self.t))
        }
        if not columns:
            return False
        fewest = _lower_hull([(groups, heads[0]) for groups, heads in columns.items()])
        most = _lower_hull([(groups, -heads[-1]) for groups, heads in columns.items()])
        self.add_counts(0.0, 1.0, 0.0, min(columns), max(columns))
        self.add_counts(
            1.0, 0.0, 0.0, min(heads for _, heads in fewest), -min(heads for _, heads in most)
        )
        for hull, sign in ((fewest, 1), (most, -1)):
            for (g0, n0), (g1, n1) in pairwise(hull):
                # sign * n lies on or above the line through both points.
                upper = (n1 - n0) * g0 - (g1 - g0) * n0
                self.add_counts(-sign * (g1 - g0), n1 - n0, 0.0, -np.inf, upper)
        return True

    def solve(self, objective: Array, most_excess: float = 0.0) -> NDArray[np.bool_] | None:
        """Minimise; return the heads that are FA [t], or None if nothing is possible."""
        self.last[-1] = most_excess
        integrality = np.ones(self.num_columns)
        integrality[-1] = 0
        found = milp(
            objective,
            constraints=self.constraints,
            bounds=Bounds(self.first, self.last),
            integrality=integrality,
            options={"mip_rel_gap": 0.0},
        )
        if found.status == _INFEASIBLE:
            return None
        if found.status != 0:
            raise RuntimeError(f"the solver gave up: {found.message}")
        return np.asarray(found.x[: self.t] > 0.5)


def _allowed_heads(limits: tuple[Limit, ...], num_groups: int, num_heads: int) -> range:
    """The numbers of FA heads with which so many stored groups keep to all limits, exactly."""
    low, high = 0, num_heads
    for cost, most in limits:
        room = Fraction(most) - Fraction(cost.fixed) - Fraction(cost.per_group) * num_groups
        per_head = Fraction(cost.per_fa_head)
        if per_head > 0:
            high = min(high, math.floor(room / per_head))
        elif per_head < 0:
            low = max(low, math.ceil(room / per_head))
        elif room < 0:
            return range(0)
    return range(low, high + 1)


def _lower_hull(points: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Corners of the lower convex hull of points with ascending x (Andrew's monotone chain)."""
    hull: list[tuple[int, int]] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (x1 - x0) * (y - y0) > (y1 - y0) * (x - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull
