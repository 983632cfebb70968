"""Placement: which tensor-parallel rank holds which heads of a layer, and what that costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, combinations, islice, product
from math import inf
from typing import Literal

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadKind, LayerHeadPlan
from megatron_hydra.model.mixers.costs import CostModel
from megatron_hydra.model.parallel_sizes import divisors

PlacementPolicy = Literal["balanced", "by_type"]


@dataclass(frozen=True)
class LayerPlacement:
    """The heads of one layer on each tensor-parallel rank.

    Every rank holds as many heads as any other; how many of them are FA may differ.

    Attributes:
        heads_per_rank: Teacher head indices of each rank, ascending.
        layer_plan: The kinds of the heads.
        num_query_groups: Query groups of the layer.
        predicted_costs: FLOPs of one sequence on each rank, by the :class:`CostModel`.
    """

    heads_per_rank: tuple[tuple[int, ...], ...]
    layer_plan: LayerHeadPlan
    num_query_groups: int
    predicted_costs: tuple[float, ...]

    @property
    def tp_size(self) -> int:
        """Number of tensor-parallel ranks."""
        return len(self.heads_per_rank)

    def fa_heads(self, rank: int) -> tuple[int, ...]:
        """FA heads of ``rank``, ascending."""
        return self.heads_of(rank, "fa")

    def la_heads(self, rank: int) -> tuple[int, ...]:
        """Heads of ``rank`` that are not FA, ascending."""
        return tuple(h for h in self.heads_per_rank[rank] if self.layer_plan.kinds[h] != "fa")

    def used_groups(self, rank: int) -> tuple[int, ...]:
        """Query groups that the FA heads of ``rank`` read, ascending."""
        return tuple(sorted({self._group(head) for head in self.fa_heads(rank)}))

    def group_owner(self, group: int) -> int:
        """The rank that projects and stores this group's k and v: the lowest that uses it.

        Raises:
            UserError: If no FA head uses the group.
        """
        for rank in range(self.tp_size):
            if group in self.used_groups(rank):
                return rank
        raise UserError(f"query group {group} has no FA head, so no rank owns it")

    def owned_groups(self, rank: int) -> tuple[int, ...]:
        """Query groups that ``rank`` owns, ascending."""
        return tuple(g for g in self.used_groups(rank) if self.group_owner(g) == rank)

    @property
    def shares_groups(self) -> bool:
        """True when some rank reads a query group that another rank owns."""
        return any(
            self.used_groups(rank) != self.owned_groups(rank) for rank in range(self.tp_size)
        )

    def heads_of(self, rank: int, kind: HeadKind) -> tuple[int, ...]:
        """Heads of a kind on ``rank``, ascending."""
        return tuple(h for h in self.heads_per_rank[rank] if self.layer_plan.kinds[h] == kind)

    def _group(self, head: int) -> int:
        return head * self.num_query_groups // self.layer_plan.num_heads


def place_heads(
    layer_plan: LayerHeadPlan,
    num_query_groups: int,
    tp_size: int,
    policy: PlacementPolicy,
    sequence_length: int,
    cost_model: CostModel = CostModel(),
) -> LayerPlacement:
    """Deal the heads of one layer out to the tensor-parallel ranks.

    ``by_type`` puts the FA heads first, then the others, both in order, and cuts equal parts.
    ``balanced`` makes the dearest rank cheap for ``sequence_length``. When ``tp_size <=
    num_query_groups`` the FA heads of a query group lie on one rank, by a greedy rule (see
    :func:`_whole_groups`); where that finds no room (possible only if the groups are not
    divisible by ``tp_size``), groups are split as for a larger ``tp_size``: as cheaply as possible,
    exactly.

    Raises:
        UserError: If the heads are not divisible by the ranks or by the groups, or a value is not
            allowed.
    """
    _check_arguments(layer_plan, num_query_groups, tp_size, policy, sequence_length)
    ranks: Sequence[Sequence[int]]
    if policy == "by_type":
        order = layer_plan.fa_heads + layer_plan.la_heads
        size = layer_plan.num_heads // tp_size
        ranks = [order[rank * size : (rank + 1) * size] for rank in range(tp_size)]
    else:
        ranks = _balance(layer_plan, num_query_groups, tp_size, sequence_length, cost_model)
    heads_per_rank = tuple(tuple(sorted(heads)) for heads in ranks)
    uncosted = LayerPlacement(heads_per_rank, layer_plan, num_query_groups, ())
    counts = [Counter(layer_plan.kinds[head] for head in heads) for heads in heads_per_rank]
    costs = tuple(
        sum(n * cost_model.head(kind, sequence_length) for kind, n in of_rank.items())
        + len(uncosted.owned_groups(rank)) * cost_model.fa_group(sequence_length)
        for rank, of_rank in enumerate(counts)
    )
    return LayerPlacement(heads_per_rank, layer_plan, num_query_groups, costs)


def _check_arguments(
    layer_plan: LayerHeadPlan, num_query_groups: int, tp_size: int, policy: str, length: int
) -> None:
    num_heads = layer_plan.num_heads
    if policy not in ("by_type", "balanced"):
        raise UserError(f"unknown placement {policy!r}: use 'by_type' or 'balanced'")
    if tp_size < 1 or num_heads % tp_size:
        raise UserError(
            f"{num_heads} heads are not divisible by tensor parallel size {tp_size}: "
            f"use one of {', '.join(str(n) for n in divisors(num_heads))}"
        )
    if num_query_groups < 1 or num_heads % num_query_groups:
        raise UserError(f"{num_heads} heads are not divisible by {num_query_groups} query groups")
    if length < 1:
        raise UserError(f"sequence length {length} must be positive")


# --- balanced ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Share:
    """What one rank takes: the query groups it opens, and so owns, and its number of FA heads."""

    groups: tuple[int, ...]
    num_fa_heads: int


# A rank's cost by its number of FA heads and of owned groups.
_RankCost = Callable[[int, int], float]


def _balance(
    layer_plan: LayerHeadPlan,
    num_query_groups: int,
    tp_size: int,
    sequence_length: int,
    cost_model: CostModel,
) -> list[list[int]]:
    heads_per_group = layer_plan.num_heads // num_query_groups
    sizes = Counter(head // heads_per_group for head in layer_plan.fa_heads)
    capacity = layer_plan.num_heads // tp_size

    # Of several LA kinds a rank takes what makes it as dear as the others: here the average.
    others = Counter(layer_plan.kinds[head] for head in layer_plan.la_heads)
    of_kinds = {kind: cost_model.head(kind, sequence_length) for kind in others}
    fa_head, la_head = cost_model.head("fa", sequence_length), max(of_kinds.values(), default=0.0)
    if len(others) > 1:
        la_head = sum(of_kinds[kind] * n for kind, n in others.items()) / others.total()

    @cache
    def rank_cost(num_fa_heads: int, num_groups: int) -> float:
        return (
            num_fa_heads * fa_head
            + (capacity - num_fa_heads) * la_head
            + num_groups * cost_model.fa_group(sequence_length)
        )

    shares = None
    if tp_size <= num_query_groups:
        shares = _whole_groups(sizes, tp_size, capacity, rank_cost)
    if shares is None:
        shares = _split_groups(sizes, tp_size, capacity, rank_cost)
    fa_costs = [
        share.num_fa_heads * fa_head + len(share.groups) * cost_model.fa_group(sequence_length)
        for share in shares
    ]
    free = [capacity - share.num_fa_heads for share in shares]
    la_heads = _deal_others(layer_plan, free, fa_costs, of_kinds)
    fa_heads = _deal(layer_plan, heads_per_group, shares)
    return [fa + la for fa, la in zip(fa_heads, la_heads, strict=True)]


def _whole_groups(
    sizes: Mapping[int, int], tp_size: int, capacity: int, rank_cost: _RankCost
) -> list[_Share] | None:
    """Shares that keep each group on one rank, or None if a group finds no room.

    Largest group first, each to the cheapest rank with room, known for jobs on machines as longest
    processing time first (Graham, SIAM J. Appl. Math. 17(2), 1969). Then the dearest rank exchanges
    up to two groups with another, as long as it gains.
    """

    def cost(groups: tuple[int, ...]) -> float:
        heads = sum(sizes[group] for group in groups)
        return rank_cost(heads, len(groups)) if heads <= capacity else inf

    def parts(groups: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
        """Up to two of the groups; of equal sizes some stand for all."""
        found = (part for num in range(3) for part in combinations(groups, num))
        return {tuple(sorted(sizes[group] for group in part)): part for part in found}.values()

    ranks: list[tuple[int, ...]] = [()] * tp_size
    for group in sorted(sizes, key=lambda group: (-sizes[group], group)):
        # Away from a rank of LA heads the least: FA heads of short sequences are the cheaper ones.
        rank = min(range(tp_size), key=lambda r: abs(cost((*ranks[r], group)) - cost(())))
        ranks[rank] += (group,)
    if max(map(cost, ranks)) == inf:
        return None
    while True:
        dearest = max(range(tp_size), key=lambda rank: cost(ranks[rank]))
        exchanges = (
            (tuple(set(ranks[dearest]) - set(give)) + take, tuple(set(x) - set(take)) + give, rank)
            for rank, x in enumerate(ranks)
            for give, take in product(parts(ranks[dearest]), parts(x) if rank != dearest else ())
        )
        gains = (x for x in exchanges if max(cost(x[0]), cost(x[1])) < cost(ranks[dearest]))
        one, other, rank = next(gains, ((), (), -1))
        if rank < 0:
            break
        ranks[dearest], ranks[rank] = one, other
    # Of equal ranks the first was served first: in another layer let it be another.
    first = sum(sizes) % tp_size
    return [_Share(x, sum(sizes[group] for group in x)) for x in ranks[first:] + ranks[:first]]


def _split_groups(
    sizes: Mapping[int, int], tp_size: int, capacity: int, rank_cost: _RankCost
) -> list[_Share]:
    """The cheapest shares when the heads of a group may lie on several ranks.

    A rank that opens a group takes at least one of its heads; the others may wait for later
    ranks, which then share the group. All that binds is that no rank takes a head of a group not
    yet opened, so opening the largest groups first loses nothing, and the number of groups
    opened and of heads taken so far is all that the dynamic programme needs to know.
    """
    order = sorted(sizes, key=lambda group: (-sizes[group], group))
    reach = [0, *accumulate(sizes[group] for group in order)]

    @cache
    def solve(
        ranks_left: int, opened: int, taken: int
    ) -> tuple[float, tuple[tuple[int, int], ...]] | None:
        if ranks_left == 0:
            return (-inf, ()) if taken == reach[-1] else None
        best = None
        for num_groups in range(min(capacity, len(order) - opened) + 1):
            most = min(capacity, reach[opened + num_groups] - taken)
            for num_fa_heads in range(most, num_groups - 1, -1):
                cost = rank_cost(num_fa_heads, num_groups)
                if best is not None and cost >= best[0]:
                    continue
                rest = solve(ranks_left - 1, opened + num_groups, taken + num_fa_heads)
                if rest is not None and (best is None or max(cost, rest[0]) < best[0]):
                    best = max(cost, rest[0]), ((num_groups, num_fa_heads), *rest[1])
        return best

    found = solve(tp_size, 0, 0)
    assert found is not None  # every rank has room for num_heads / tp_size FA heads
    shares, groups = [], iter(order)
    for num_groups, num_fa_heads in found[1]:
        shares.append(_Share(tuple(islice(groups, num_groups)), num_fa_heads))
    return shares


def _deal(layer_plan: LayerHeadPlan, heads_per_group: int, shares: list[_Share]) -> list[list[int]]:
    """Turn shares into FA heads, of the groups in turn."""
    waiting: list[int] = []  # of groups that earlier ranks opened
    ranks = []
    for share in shares:
        own = [h for h in layer_plan.fa_heads if h // heads_per_group in share.groups]
        # One head of each opened group must lie here, or the owner would be another rank.
        firsts = {h // heads_per_group: h for h in reversed(own)}.values()
        own.sort(key=lambda head: (head not in firsts, head))
        num_own = min(len(own), share.num_fa_heads)
        ranks.append(own[:num_own] + waiting[: share.num_fa_heads - num_own])
        waiting = waiting[share.num_fa_heads - num_own :] + own[num_own:]
    assert not waiting
    return ranks


def _deal_others(
    layer_plan: LayerHeadPlan,
    free: Sequence[int],
    fa_costs: Sequence[float],
    of_kinds: Mapping[HeadKind, float],
) -> list[list[int]]:
    """The heads that are not FA, of each kind in order: the dearest kind's first.

    Each goes to the rank that is cheapest if the rest of its room is filled with the cheapest kind;
    with two kinds no deal has a cheaper dearest rank, as all of the dearer kind weigh the same.
    """
    room, least = list(free), min(of_kinds.values(), default=0.0)
    costs = [cost + n * least for cost, n in zip(fa_costs, free, strict=True)]
    ranks: list[list[int]] = [[] for _ in free]
    for kind in sorted(of_kinds, key=lambda kind: -of_kinds[kind]):
        heads = [h for h in layer_plan.la_heads if layer_plan.kinds[h] == kind]
        counts = [0] * len(ranks)
        for _ in heads:
            rank = min((r for r, n in enumerate(room) if n), key=costs.__getitem__)
            counts[rank], room[rank] = counts[rank] + 1, room[rank] - 1
            costs[rank] += of_kinds[kind] - least
        dealt = iter(heads)
        for rank, count in enumerate(counts):
            ranks[rank] += islice(dealt, count)
    return ranks
