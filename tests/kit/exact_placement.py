"""The cheapest placement that keeps query groups whole, exactly: what `balanced` is held to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from math import inf
from operator import mul, sub

from megatron_hydra.head_plan import LayerHeadPlan
from megatron_hydra.model.mixers.costs import CostModel


def cheapest_dearest_rank(
    plan: LayerHeadPlan, num_query_groups: int, tp_size: int, length: int, model: CostModel
) -> float:
    """FLOPs of the dearest rank in the best placement of whole groups; infinite if none has room.

    Groups of one size are alike, so a dynamic programme over the ranks needs to know only how
    many groups of each size are left.
    """
    heads_per_group, capacity = plan.num_heads // num_query_groups, plan.num_heads // tp_size
    sizes = Counter(Counter(head // heads_per_group for head in plan.fa_heads).values())
    kinds = tuple(sorted(sizes, reverse=True))

    @cache
    def solve(ranks_left: int, counts: tuple[int, ...]) -> float:
        if sum(map(mul, kinds, counts)) > ranks_left * capacity:
            return inf
        if ranks_left == 0:
            return -inf
        best = inf
        for taken in _takeable(kinds, counts, capacity):
            num_fa_heads = sum(map(mul, kinds, taken))
            cost = (
                num_fa_heads * model.head("fa", length)
                + (capacity - num_fa_heads) * model.head("la", length)
                + sum(taken) * model.fa_group(length)
            )
            if cost < best:
                rest = solve(ranks_left - 1, tuple(map(sub, counts, taken)))
                best = min(best, max(cost, rest))
        return best

    return solve(tp_size, tuple(sizes[kind] for kind in kinds))


def _takeable(
    kinds: tuple[int, ...], counts: tuple[int, ...], capacity: int
) -> Iterator[tuple[int, ...]]:
    """All ways to take groups, ``counts`` of each size in ``kinds``, into ``capacity`` heads."""
    if not kinds:
        yield ()
        return
    for num in range(min(counts[0], capacity // kinds[0]), -1, -1):
        for rest in _takeable(kinds[1:], counts[1:], capacity - num * kinds[0]):
            yield (num, *rest)
