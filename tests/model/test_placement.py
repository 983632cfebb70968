"""Tests of placement: every head once, groups whole, and the dearest rank against brute force."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
from kit.exact_placement import cheapest_dearest_rank

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadKind, LayerHeadPlan
from megatron_hydra.model.mixers.costs import CostModel
from megatron_hydra.model.placement import LayerPlacement, PlacementPolicy, place_heads

SMALL = CostModel(hidden_size=128, head_dim=32)


def random_layer(num_heads: int, seed: int) -> LayerHeadPlan:
    draw = random.Random(seed)
    share = draw.random()
    kinds: list[HeadKind] = ["fa" if draw.random() < share else "la" for _ in range(num_heads)]
    return LayerHeadPlan(tuple(kinds))


def deals(heads: tuple[int, ...], num_ranks: int) -> Iterator[list[tuple[int, ...]]]:
    """Every way to put ``heads`` on ranks, without regard to room."""
    if not heads:
        yield [()] * num_ranks
        return
    for deal in deals(heads[1:], num_ranks):
        for rank in range(num_ranks):
            yield [(heads[0], *part) if r == rank else part for r, part in enumerate(deal)]


def brute_force_dearest(
    layer: LayerHeadPlan, num_groups: int, tp_size: int, length: int, keep_groups: bool
) -> float:
    """Cost of the dearest rank in the best of all deals, counted afresh from the cost model."""
    room = layer.num_heads // tp_size
    per_group = layer.num_heads // num_groups
    best = float("inf")
    for deal in deals(layer.fa_heads, tp_size):
        if max(map(len, deal)) > room:
            continue
        owners: dict[int, int] = {}
        for rank in reversed(range(tp_size)):
            owners.update({head // per_group: rank for head in deal[rank]})
        shared = any(owners[h // per_group] != rank for rank in range(tp_size) for h in deal[rank])
        if keep_groups and shared:
            continue
        costs = [
            len(part) * SMALL.head("fa", length)
            + (room - len(part)) * SMALL.head("la", length)
            + list(owners.values()).count(rank) * SMALL.fa_group(length)
            for rank, part in enumerate(deal)
        ]
        best = min(best, max(costs))
    return best


@pytest.mark.parametrize("length", [16, 256, 65536])
@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("seed", range(6))
def test_balanced_is_as_cheap_as_brute_force_in_a_small_layer(
    seed: int, tp_size: int, length: int
) -> None:
    layer = random_layer(8, seed)
    placement = place_heads(layer, 4, tp_size, "balanced", length, SMALL)
    expected = brute_force_dearest(layer, 4, tp_size, length, keep_groups=True)
    assert max(placement.predicted_costs) == pytest.approx(expected, rel=1e-12)
    assert not placement.shares_groups


@pytest.mark.parametrize("length", [16, 512, 4096, 32768, 131072])
@pytest.mark.parametrize(
    ("num_heads", "num_groups"),
    [(16, 8), (28, 4), (32, 8), (32, 32), (40, 8), (64, 8), (24, 6), (48, 16), (64, 16)],
)
def test_balanced_is_at_most_a_fortieth_dearer_than_the_cheapest(
    num_heads: int, num_groups: int, length: int
) -> None:
    """And keeps groups whole wherever the cheapest does."""
    models = (SMALL, CostModel(), CostModel(1024, 64), CostModel(8192, 128))
    for tp_size in (n for n in (2, 3, 4, 8) if num_heads % n == 0 and n <= num_groups):
        for seed in range(8):
            layer, model = random_layer(num_heads, seed), models[seed % len(models)]
            expected = cheapest_dearest_rank(layer, num_groups, tp_size, length, model)
            placement = place_heads(layer, num_groups, tp_size, "balanced", length, model)
            assert placement.shares_groups == (expected == float("inf")), (
                "whole where there is room"
            )
            if not placement.shares_groups:
                dearest = max(placement.predicted_costs) / expected
                assert 1 - 1e-9 <= dearest <= 1.025


LA_KINDS: tuple[HeadKind, ...] = ("gated_delta_net", "sliding_window", "kda")


@pytest.mark.parametrize("length", [64, 1024, 65536])
@pytest.mark.parametrize(("tp_size", "num_kinds", "most"), [(2, 2, 1), (4, 2, 1), (2, 3, 1.03)])
@pytest.mark.parametrize("seed", range(8))
def test_kinds_of_la_heads_are_dealt_as_cheaply_as_brute_force(
    seed: int, tp_size: int, num_kinds: int, most: float, length: int
) -> None:
    """Among all deals of the heads that are not FA, where the FA heads lie as they do."""
    draw = random.Random(seed)
    kinds = [draw.choice(("fa", *LA_KINDS[:num_kinds])) for _ in range(8)]
    layer = LayerHeadPlan(tuple(kinds))
    placement = place_heads(layer, 4, tp_size, "balanced", length, SMALL)
    assert sorted(h for heads in placement.heads_per_rank for h in heads) == list(range(8))
    fa_costs = [
        len(placement.fa_heads(rank)) * SMALL.head("fa", length)
        + len(placement.owned_groups(rank)) * SMALL.fa_group(length)
        for rank in range(tp_size)
    ]
    room = [8 // tp_size - len(placement.fa_heads(rank)) for rank in range(tp_size)]
    best = min(
        max(
            cost + sum(SMALL.head(kinds[head], length) for head in part)
            for cost, part in zip(fa_costs, deal, strict=True)
        )
        for deal in deals(layer.la_heads, tp_size)
        if [len(part) for part in deal] == room
    )
    found = max(placement.predicted_costs)
    assert best * (1 - 1e-9) <= found <= best * most * (1 + 1e-9)


def test_sizes_that_greed_deals_badly_are_exchanged() -> None:
    """Two ranks get 6 and 6 FA heads of groups of 3, 3, 2, 2, 2, where greed gives 7 and 5."""
    for num_heads, groups, sizes in ((32, 8, (3, 3, 2, 2, 2)), (48, 6, (5, 5, 4, 2, 2, 2))):
        heads = [i * (num_heads // groups) + j for i, size in enumerate(sizes) for j in range(size)]
        placement = place_heads(fa_layer(num_heads, heads), groups, 2, "balanced", 65536, SMALL)
        assert [len(placement.fa_heads(rank)) for rank in (0, 1)] == [sum(sizes) // 2] * 2


def test_what_cannot_be_equal_is_not_always_the_first_ranks() -> None:
    """One group of FA heads per layer: its rank follows from the group."""
    owners = {
        next(r for r in range(4) if placement.fa_heads(r))
        for group in range(8)
        for placement in [place_heads(fa_layer(16, [2 * group]), 8, 4, "balanced", 4096, SMALL)]
    }
    assert owners == {0, 1, 2, 3}


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_balanced_splits_groups_optimally_over_more_ranks(seed: int, num_groups: int) -> None:
    layer = random_layer(8, seed)
    placement = place_heads(layer, num_groups, 4, "balanced", 256, SMALL)
    expected = brute_force_dearest(layer, num_groups, 4, 256, keep_groups=False)
    assert max(placement.predicted_costs) == pytest.approx(expected, rel=1e-12)


def fa_layer(num_heads: int, fa_heads: Sequence[int]) -> LayerHeadPlan:
    return LayerHeadPlan(tuple("fa" if head in fa_heads else "la" for head in range(num_heads)))


def rank_cost(num_fa_heads: int, num_la_heads: int, num_groups: int, length: int) -> float:
    return (
        num_fa_heads * SMALL.head("fa", length)
        + num_la_heads * SMALL.head("la", length)
        + num_groups * SMALL.fa_group(length)
    )


def test_balanced_weighs_keys_and_values_too() -> None:
    """Groups of 2, 2, 1, 1, 1, 1 FA heads: 4 heads per rank either way, but 3 and 3 groups."""
    layer = fa_layer(12, [0, 1, 2, 3, 4, 6, 8, 10])
    placement = place_heads(layer, 6, 2, "balanced", 256, SMALL)
    assert placement.predicted_costs == pytest.approx([rank_cost(4, 2, 3, 256)] * 2)


def test_a_large_group_is_opened_before_a_small_one() -> None:
    """1 and 7 FA heads on 4 ranks: 2 on each, and no rank owns both groups."""
    layer = fa_layer(16, [0, *range(8, 15)])
    placement = place_heads(layer, 2, 4, "balanced", 256, SMALL)
    assert max(placement.predicted_costs) == pytest.approx(rank_cost(2, 2, 1, 256))


def test_a_rank_that_opens_two_groups_holds_a_head_of_each() -> None:
    """11 FA heads in groups of 3 on ranks of 4: the rank with 3 of them owns two groups."""
    length = 65536
    placement = place_heads(fa_layer(12, range(11)), 4, 3, "balanced", length, SMALL)
    assert max(placement.predicted_costs) == pytest.approx(rank_cost(4, 0, 1, length))


def assert_is_a_deal(placement: LayerPlacement, tp_size: int) -> None:
    """Every head lies on one rank, every rank is full, every used group has one owner."""
    layer, groups = placement.layer_plan, placement.num_query_groups
    ranks = placement.heads_per_rank
    assert len(ranks) == tp_size
    assert sorted(head for heads in ranks for head in heads) == list(range(layer.num_heads))
    owned = []
    for rank, heads in enumerate(ranks):
        assert list(heads) == sorted(heads)
        assert len(heads) == layer.num_heads // tp_size
        assert sorted(placement.fa_heads(rank) + placement.la_heads(rank)) == list(heads)
        assert set(placement.fa_heads(rank)) <= set(layer.fa_heads)
        assert set(placement.owned_groups(rank)) <= set(placement.used_groups(rank))
        for group in placement.used_groups(rank):
            assert placement.group_owner(group) <= rank
        owned += placement.owned_groups(rank)
    per_group = layer.num_heads // groups
    assert sorted(owned) == sorted({head // per_group for head in layer.fa_heads})


@pytest.mark.parametrize("policy", ["by_type", "balanced"])
@pytest.mark.parametrize(
    ("num_heads", "num_groups"), [(8, 4), (16, 8), (16, 1), (12, 4), (24, 24), (64, 8)]
)
def test_every_tp_size_that_fits_gets_a_full_deal(
    num_heads: int, num_groups: int, policy: PlacementPolicy
) -> None:
    for tp_size in (n for n in range(1, num_heads + 1) if num_heads % n == 0):
        for seed in range(5):
            layer = random_layer(num_heads, seed)
            placement = place_heads(layer, num_groups, tp_size, policy, 512, SMALL)
            assert_is_a_deal(placement, tp_size)
            if policy == "balanced" and num_groups % tp_size == 0:
                assert not placement.shares_groups


@pytest.mark.parametrize("kind", ["fa", "la"])
def test_layers_of_one_kind(kind: HeadKind) -> None:
    layer = LayerHeadPlan((kind,) * 8)
    for tp_size in (1, 2, 4, 8):
        placement = place_heads(layer, 4, tp_size, "balanced", 256, SMALL)
        assert_is_a_deal(placement, tp_size)
        if tp_size <= 4:
            assert len(set(placement.predicted_costs)) == 1


def test_groups_are_split_when_they_have_no_room_whole() -> None:
    """12 FA heads in 4 groups of 3 on 3 ranks of 4: no rank can hold two whole groups."""
    placement = place_heads(LayerHeadPlan(("fa",) * 12), 4, 3, "balanced", 256, SMALL)
    assert_is_a_deal(placement, 3)
    assert placement.shares_groups


def test_by_type_cuts_fa_then_la_heads_in_order() -> None:
    layer = LayerHeadPlan(("la", "fa", "la", "la", "fa", "fa", "la", "la"))
    placement = place_heads(layer, 4, 4, "by_type", 256)
    assert placement.heads_per_rank == ((1, 4), (0, 5), (2, 3), (6, 7))
    assert placement.used_groups(0) == (0, 2)
    assert placement.used_groups(1) == (2,)
    assert placement.group_owner(2) == 0
    assert placement.owned_groups(1) == ()
    assert placement.shares_groups


def test_balanced_spreads_what_by_type_piles_up() -> None:
    layer = LayerHeadPlan(("fa", "la") * 4)
    by_type, balanced = (
        place_heads(layer, 4, 4, policy, 65536, SMALL) for policy in ("by_type", "balanced")
    )
    assert [len(balanced.fa_heads(rank)) for rank in range(4)] == [1, 1, 1, 1]
    assert max(balanced.predicted_costs) < 0.6 * max(by_type.predicted_costs)


def test_placement_is_deterministic() -> None:
    layer = random_layer(32, 1)
    assert place_heads(layer, 8, 4, "balanced", 512) == place_heads(layer, 8, 4, "balanced", 512)


def test_costs_grow_as_attention_and_recurrence_do() -> None:
    model = CostModel()
    assert model.head("la", 8192) == 2 * model.head("la", 4096)
    assert model.fa_group(8192) == 2 * model.fa_group(4096)
    # The causal half square: 2 d s^2 above the three linear projections of 2 s h d.
    assert model.head("fa", 4096) - 3 * 2 * 4096 * 2048 * 128 == 2 * 128 * 4096**2
    assert model.head("fa", 1 << 20) > 20 * model.head("la", 1 << 20)


def test_no_rank_owns_an_unused_group() -> None:
    placement = place_heads(LayerHeadPlan(("fa", "la", "la", "la")), 2, 2, "balanced", 8)
    with pytest.raises(UserError, match="query group 1 has no FA head"):
        placement.group_owner(1)


@pytest.mark.parametrize(
    ("groups", "tp_size", "policy", "length", "sentence"),
    [
        (
            4,
            3,
            "balanced",
            8,
            "8 heads are not divisible by tensor parallel size 3: use one of 1, 2, 4, 8",
        ),
        (4, 16, "balanced", 8, "8 heads are not divisible by tensor parallel size 16"),
        (4, 0, "balanced", 8, "8 heads are not divisible by tensor parallel size 0"),
        (3, 2, "balanced", 8, "8 heads are not divisible by 3 query groups"),
        (4, 2, "greedy", 8, "unknown placement 'greedy': use 'by_type' or 'balanced'"),
        (4, 2, "balanced", 0, "sequence length 0 must be positive"),
    ],
)
def test_bad_requests_are_explained(
    groups: int, tp_size: int, policy: PlacementPolicy, length: int, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        place_heads(LayerHeadPlan(("fa",) * 8), groups, tp_size, policy, length)
