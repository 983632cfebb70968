"""The policy: head scores and a budget of FA heads become a head plan."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_hydra.errors import UserError
from megatron_hydra.files import versions
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.scores import HeadScores

_Head = tuple[int, int]  # layer, head


@dataclass(frozen=True)
class Budget:
    """How many heads keep full attention.

    Attributes:
        num_fa_heads: In the whole model.
        min_fa_per_layer: In each layer at least.
        asked_for: The exact number that a ratio stands for, when it was rounded.
    """

    num_fa_heads: int
    min_fa_per_layer: int = 0
    asked_for: Fraction | None = None


@dataclass(frozen=True)
class PlanSummary:
    """What a reader should know of a plan beside its heads.

    Attributes:
        plan: The plan.
        budget: The budget that it meets.
        num_tie_filled: FA heads that won over a head of the same score, by effect size or order.
        num_without_evidence: FA heads whose score is not above 0.
        num_for_layer_minimum: FA heads that the scores alone would not have chosen.
    """

    plan: HeadPlan
    budget: Budget
    num_tie_filled: int = 0
    num_without_evidence: int = 0
    num_for_layer_minimum: int = 0

    @property
    def num_la_heads(self) -> int:
        """Heads that become linear attention, in the whole model."""
        return self.plan.num_layers * self.plan.num_heads - self.plan.num_fa_heads

    @property
    def fa_heads_per_layer(self) -> tuple[int, ...]:
        """Number of FA heads of each layer."""
        return tuple(len(layer.fa_heads) for layer in self.plan.layers)

    @property
    def kv_cache_share(self) -> Fraction:
        """Query groups whose keys and values are stored, as a share of all groups."""
        stored = sum(len(self.plan.fa_groups(layer)) for layer in range(self.plan.num_layers))
        return Fraction(stored, self.plan.num_layers * self.plan.num_query_groups)


def make_budget(
    num_layers: int,
    num_heads: int,
    *,
    fa_ratio: Fraction | None = None,
    num_fa_heads: int | None = None,
    min_fa_per_layer: int = 0,
) -> Budget:
    """Turn a ratio or a number of FA heads into a budget that the model can meet.

    A ratio that is no whole number of heads is rounded to the nearest, halves up.

    Raises:
        UserError: If not exactly one of ``fa_ratio`` and ``num_fa_heads`` is given, or the
            budget cannot be met.
    """
    total = num_layers * num_heads
    asked_for = None
    if (fa_ratio is None) == (num_fa_heads is None):
        raise UserError("give the budget either as a ratio of FA heads or as their number")
    if fa_ratio is not None:
        if not 0 < fa_ratio <= 1:
            raise UserError(f"ratio of FA heads {fa_ratio} must be above 0 and at most 1")
        exact = fa_ratio * total
        num_fa_heads = math.floor(exact + Fraction(1, 2))
        if num_fa_heads == 0:
            raise UserError(f"ratio {fa_ratio} of {total} heads is less than half a head")
        asked_for = exact if exact != num_fa_heads else None
    assert num_fa_heads is not None
    if not 0 <= num_fa_heads <= total:
        raise UserError(f"{num_fa_heads} FA heads asked for, but the model has {total} heads")
    if not 0 <= min_fa_per_layer <= num_heads:
        raise UserError(
            f"at least {min_fa_per_layer} FA heads a layer asked for, but a layer has {num_heads}"
        )
    if min_fa_per_layer * num_layers > num_fa_heads:
        raise UserError(
            f"a budget of {num_fa_heads} FA heads cannot give {min_fa_per_layer} to each of "
            f"{num_layers} layers: that takes {min_fa_per_layer * num_layers}"
        )
    return Budget(num_fa_heads, min_fa_per_layer, asked_for)


def plan_from_scores(
    scores: HeadScores,
    *,
    fa_ratio: Fraction | None = None,
    num_fa_heads: int | None = None,
    min_fa_per_layer: int = 0,
) -> tuple[HeadPlan, PlanSummary]:
    """Keep full attention in the heads with the highest scores of the whole model.

    With ``min_fa_per_layer`` each layer first gets its best heads (the paper's Global-Interp-C).
    Scores at or below 0 count as equal: they say that no effect was found. Equal scores are
    ordered by the size of the indirect effect, then by layer and head.

    Raises:
        UserError: As :func:`make_budget`.
    """
    budget = make_budget(
        scores.num_layers,
        scores.num_heads,
        fa_ratio=fa_ratio,
        num_fa_heads=num_fa_heads,
        min_fa_per_layer=min_fa_per_layer,
    )

    def rank(head: _Head) -> tuple[float, float, _Head]:
        return -_evidence(scores, head), -scores.effect_size(*head), head

    chosen = _choose(scores.num_layers, scores.num_heads, budget, rank)
    by_score = _choose(scores.num_layers, scores.num_heads, Budget(budget.num_fa_heads), rank)
    num_tie_filled = _count_tie_filled(scores, chosen, budget)
    num_without_evidence = sum(_evidence(scores, head) == 0 for head in chosen)
    plan = HeadPlan.from_fa_heads(
        _by_layer(chosen),
        scores.num_layers,
        scores.num_heads,
        scores.num_query_groups,
        scores.teacher_config_hash,
        {
            "policy": "highest_scores",
            "min_fa_per_layer": min_fa_per_layer,
            "num_tie_filled": num_tie_filled,
            "num_without_evidence": num_without_evidence,
            "scorer": scores.scorer,
            "scores": dict(scores.provenance),
            "versions": versions(),
        },
    )
    summary = PlanSummary(
        plan,
        budget,
        num_tie_filled=num_tie_filled,
        num_without_evidence=num_without_evidence,
        num_for_layer_minimum=len(chosen - by_score),
    )
    return plan, summary


def random_plan(
    num_layers: int,
    num_heads: int,
    num_query_groups: int,
    num_fa_heads: int,
    min_fa_per_layer: int,
    seed: int,
    teacher_config_hash: str = "",
) -> HeadPlan:
    """Choose the FA heads at random under the same constraint: the control for a scorer.

    Raises:
        UserError: As :func:`make_budget`.
    """
    budget = make_budget(
        num_layers, num_heads, num_fa_heads=num_fa_heads, min_fa_per_layer=min_fa_per_layer
    )
    draw = random.Random(seed)
    order = {head: draw.random() for head in _heads(num_layers, num_heads)}
    chosen = _choose(num_layers, num_heads, budget, order.__getitem__)
    return HeadPlan.from_fa_heads(
        _by_layer(chosen),
        num_layers,
        num_heads,
        num_query_groups,
        teacher_config_hash,
        {
            "policy": "random",
            "min_fa_per_layer": min_fa_per_layer,
            "seed": seed,
            "versions": versions(),
        },
    )


def _heads(num_layers: int, num_heads: int) -> list[_Head]:
    return [(layer, head) for layer in range(num_layers) for head in range(num_heads)]


def _choose(
    num_layers: int, num_heads: int, budget: Budget, rank: Callable[[_Head], Any]
) -> set[_Head]:
    """The first heads of each layer up to its minimum, then the first of all that are left."""
    order = sorted(_heads(num_layers, num_heads), key=rank)
    chosen: set[_Head] = set()
    for layer in range(num_layers):
        in_layer = [head for head in order if head[0] == layer]
        chosen.update(in_layer[: budget.min_fa_per_layer])
    left = [head for head in order if head not in chosen]
    chosen.update(left[: budget.num_fa_heads - len(chosen)])
    return chosen


def _by_layer(heads: set[_Head]) -> dict[int, list[int]]:
    layers: dict[int, list[int]] = {}
    for layer, head in sorted(heads):
        layers.setdefault(layer, []).append(head)
    return layers


def _evidence(scores: HeadScores, head: _Head) -> float:
    return max(0.0, scores.scores[head[0]][head[1]])


def _count_tie_filled(scores: HeadScores, chosen: set[_Head], budget: Budget) -> int:
    """Chosen heads that another choice of equal score could have replaced.

    A head left out could stand for a chosen one of equal score if the chosen one's layer does
    not need it for its minimum, or both are of one layer.
    """
    left_out = set(_heads(scores.num_layers, scores.num_heads)) - chosen
    num_in_layer = {layer: len(heads) for layer, heads in _by_layer(chosen).items()}

    def replaceable(head: _Head) -> bool:
        spare = num_in_layer[head[0]] > budget.min_fa_per_layer
        return any(
            _evidence(scores, other) == _evidence(scores, head) and (spare or other[0] == head[0])
            for other in left_out
        )

    return sum(replaceable(head) for head in chosen)
