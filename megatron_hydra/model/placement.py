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

PlacementPolicy = Literal["by_type", "balanced"]


@dataclass(frozen=True)
class CostModel:
    """Floating-point operations (FLOPs) of the forward pass of one sequence, counted by hand.

    One multiply-add is two FLOPs. Softmax, norms and activations are left out, and so are memory
    traffic and communication: the numbers compare ranks, they do not predict milliseconds. LA
    kernels reach a smaller share of a GPU's peak than attention does, so LA is underestimated.
    The defaults are Qwen3-1.7B's sizes.

    Attributes:
        hidden_size: Width of the model.
        head_dim: Width of one head.
        la_chunk_tokens: Tokens a chunk of the chunked gated delta rule.
        la_conv_kernel_size: Taps of the short convolution on LA's q, k and v.
    """

    hidden_size: int = 2048
    head_dim: int = 128
    la_chunk_tokens: int = 64
    la_conv_kernel_size: int = 4

    def _projection(self, sequence_length: int) -> float:
        """One [h, d] matrix over the sequence."""
        return 2.0 * sequence_length * self.hidden_size * self.head_dim

    def fa_head(self, sequence_length: int) -> float:
        """Query, gate and output projection, and causal QK^T and PV over half the square."""
        attention = 2.0 * sequence_length**2 * self.head_dim
        return 3 * self._projection(sequence_length) + attention

    def fa_group(self, sequence_length: int) -> float:
        """Key and value projection of one query group, paid by the rank that owns it."""
        return 2 * self._projection(sequence_length)

    def la_head(self, sequence_length: int) -> float:
        """q, k, v, z and output projection, decay and beta, convolution, chunked delta rule.

        The rule in its chunked form (arXiv 2412.06464, section 3.3) makes five chunk-wide and
        three state-wide products a token, and solves one triangular system a chunk.
        """
        dim, chunk = self.head_dim, self.la_chunk_tokens
        per_token = (
            4 * self.hidden_size  # rows a and b
            + 6 * self.la_conv_kernel_size * dim
            + 5 * 2 * chunk * dim  # QK^T, KK^T, T K, T V, (QK^T) U
            + 3 * 2 * dim * dim  # W S, Q S, K^T U
            + chunk * chunk
        )
        return 5 * self._projection(sequence_length) + float(sequence_length * per_token)


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
        """LA heads of ``rank``, ascending."""
        return self.heads_of(rank, "la")

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

    ``by_type`` puts the FA heads first, then the LA heads, both in order, and cuts equal parts.
    ``balanced`` makes the dearest rank cheap for ``sequence_length``. When ``tp_size <=
    num_query_groups`` the FA heads of a query group lie on one rank, by a greedy rule (see
    :func:`_whole_groups`); where that finds no room (possible only if ``tp_size`` does not divide
    the groups), groups are split as for a larger ``tp_size``: as cheaply as possible, exactly.

    Raises:
        UserError: If the heads do not divide by the ranks or by the groups, or a value is not
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
    costs = tuple(
        len(uncosted.fa_heads(rank)) * cost_model.fa_head(sequence_length)
        + len(uncosted.owned_groups(rank)) * cost_model.fa_group(sequence_length)
        + len(uncosted.la_heads(rank)) * cost_model.la_head(sequence_length)
        for rank in range(tp_size)
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
            f"tensor parallel size {tp_size} does not divide the {num_heads} heads: "
            f"use one of {', '.join(str(n) for n in _divisors(num_heads))}"
        )
    if num_query_groups < 1 or num_heads % num_query_groups:
        raise UserError(f"{num_heads} heads do not divide into {num_query_groups} query groups")
    if length < 1:
        raise UserError(f"sequence length {length} must be positive")


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


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

    @cache
    def rank_cost(num_fa_heads: int, num_groups: int) -> float:
        return (
            num_fa_heads * cost_model.fa_head(sequence_length)
            + (capacity - num_fa_heads) * cost_model.la_head(sequence_length)
            + num_groups * cost_model.fa_group(sequence_length)
        )

    shares = None
    if tp_size <= num_query_groups:
        shares = _whole_groups(sizes, tp_size, capacity, rank_cost)
    if shares is None:
        shares = _split_groups(sizes, tp_size, capacity, rank_cost)
    return _deal(layer_plan, heads_per_group, shares, capacity)


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


def _deal(
    layer_plan: LayerHeadPlan, heads_per_group: int, shares: list[_Share], capacity: int
) -> list[list[int]]:
    """Turn shares into heads: FA heads of the groups in turn, then LA heads to fill up."""
    la_heads = iter(layer_plan.la_heads)
    waiting: list[int] = []  # FA heads of groups that earlier ranks opened
    ranks = []
    for share in shares:
        own = [h for h in layer_plan.fa_heads if h // heads_per_group in share.groups]
        # One head of each opened group must lie here, or the owner would be another rank.
        firsts = {h // heads_per_group: h for h in reversed(own)}.values()
        own.sort(key=lambda head: (head not in firsts, head))
        num_own = min(len(own), share.num_fa_heads)
        heads = own[:num_own] + waiting[: share.num_fa_heads - num_own]
        waiting = waiting[share.num_fa_heads - num_own :] + own[num_own:]
        ranks.append(heads + list(islice(la_heads, capacity - len(heads))))
    assert not waiting
    return ranks
