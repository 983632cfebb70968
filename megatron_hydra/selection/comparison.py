"""Two head plans compared: heads that differ, overlap, rank correlation, cost difference."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.cost import Costs, ServeDtype, costs_of
from megatron_hydra.selection.optimiser import Head
from megatron_hydra.selection.policy import read_explanation, read_shape


@dataclass(frozen=True)
class PlanComparison:
    """How one plan differs from another.

    Attributes:
        shared: FA heads of both.
        only_first: FA heads of the first alone.
        only_second: FA heads of the second alone.
        jaccard: Shared heads as a share of all heads that either keeps; 1 if neither keeps one.
        jaccard_by_chance: What it would be on average for heads drawn at random, as many as each
            has: with many heads in both, a high overlap says little.
        rank_correlation: Spearman's, of the scores of all heads; None where a plan carries none
            or one has equal scores everywhere.
        costs: Of the first and the second; None where neither carries the teacher's sizes.
    """

    shared: tuple[Head, ...]
    only_first: tuple[Head, ...]
    only_second: tuple[Head, ...]
    jaccard: float
    jaccard_by_chance: float
    rank_correlation: float | None
    costs: tuple[Costs, Costs] | None


def compare_plans(
    first: HeadPlan,
    second: HeadPlan,
    context_tokens: int,
    device: str,
    serve_dtype: ServeDtype = "bf16",
) -> PlanComparison:
    """Compare two plans for one teacher.

    Args:
        first: A plan.
        second: Another.
        context_tokens: Where costs are compared.
        device: Likewise.
        serve_dtype: Likewise.

    Raises:
        UserError: If they are for different teachers, or what a file says of its plan is malformed.
    """
    first.check_teacher(
        second.num_layers, second.num_heads, second.num_query_groups, second.teacher_config_hash
    )
    a, b = _fa_heads(first), _fa_heads(second)
    shape = read_shape(first) or read_shape(second)
    costs = None
    if shape is not None:
        costs = (
            costs_of(shape, first, context_tokens, device, serve_dtype),
            costs_of(shape, second, context_tokens, device, serve_dtype),
        )
    return PlanComparison(
        shared=_in_order(a & b),
        only_first=_in_order(a - b),
        only_second=_in_order(b - a),
        jaccard=len(a & b) / len(a | b) if a | b else 1.0,
        jaccard_by_chance=_jaccard_by_chance(len(a), len(b), first.num_layers * first.num_heads),
        rank_correlation=_rank_correlation(first, second),
        costs=costs,
    )


def _fa_heads(plan: HeadPlan) -> set[Head]:
    return {(index, head) for index, layer in enumerate(plan.layers) for head in layer.fa_heads}


def _in_order(heads: Iterable[Head]) -> tuple[Head, ...]:
    return tuple(sorted(heads))


def _jaccard_by_chance(num_first: int, num_second: int, num_heads: int) -> float:
    """The mean over random choices: the overlap is hypergeometric."""
    if num_first + num_second == 0:
        return 1.0
    overlap = np.arange(num_first + 1)
    chance = stats.hypergeom.pmf(overlap, num_heads, num_second, num_first)
    return float(chance @ (overlap / (num_first + num_second - overlap)))


def _rank_correlation(first: HeadPlan, second: HeadPlan) -> float | None:
    explained = [read_explanation(plan) for plan in (first, second)]
    scores = [np.ravel(found.scores) for found in explained if found is not None]
    if len(scores) < 2 or any(np.ptp(values) == 0 for values in scores):
        return None
    return float(stats.spearmanr(*scores).statistic)
