"""Properties of layouts on any plan, rank count and packing that hypothesis finds to break them.

Catches: a head without a rank, a query group without an owner, a checkpoint shard that another
layout reads as another head, tokens that two context-parallel ranks hold or none, and exchanges
whose two sides disagree.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.tiny import tiny_config, tiny_plan, token_batch
from torch import Tensor

from megatron_hydra.head_plan import HeadKind, LayerHeadPlan
from megatron_hydra.model import projection
from megatron_hydra.model.build import build_model
from megatron_hydra.model.checkpoint_shards import sharded_heads
from megatron_hydra.model.context_parallel import Pieces
from megatron_hydra.model.mixers.costs import CostModel
from megatron_hydra.model.mixers.kinds import KINDS, lay_out
from megatron_hydra.model.options import HydraFields
from megatron_hydra.model.placement import LayerPlacement, PlacementPolicy, place_heads
from megatron_hydra.model.projection import ProjectionLayout, SectionGradients
from megatron_hydra.model.sequence import (
    SequenceLayout,
    packed_sequence,
    pad_documents,
    shard_batch,
)
from megatron_hydra.parallel import initialize_model_parallel

HEAD_DIM = 3
# Reproducible, and no complaint about the first example's imports.
settings.register_profile("layouts", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("layouts")

POLICIES: list[PlacementPolicy] = ["by_type", "balanced"]
GATES = st.fixed_dictionaries(
    {
        "fa_output_gate": st.booleans(),
        "la_output_gate": st.sampled_from(["silu", "none"]),
        "la_decay": st.booleans(),
        "la_beta": st.booleans(),
    }
)


class Case(NamedTuple):
    """A layer's plan, with two layouts of it."""

    layer: LayerHeadPlan
    num_groups: int
    layouts: list[tuple[int, PlacementPolicy]]

    def place(self, index: int) -> LayerPlacement:
        tp_size, policy = self.layouts[index]
        cost = CostModel(hidden_size=64, head_dim=HEAD_DIM)
        return place_heads(self.layer, self.num_groups, tp_size, policy, 256, cost)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_groups = draw(st.integers(1, 6))
    num_heads = num_groups * draw(st.integers(1, 4))
    kinds: list[HeadKind] = list(KINDS)
    layer = LayerHeadPlan(
        tuple(draw(st.lists(st.sampled_from(kinds), min_size=num_heads, max_size=num_heads)))
    )
    sizes = [size for size in range(1, num_heads + 1) if num_heads % size == 0]
    layout = st.tuples(st.sampled_from(sizes), st.sampled_from(POLICIES))
    return Case(layer, num_groups, [draw(layout), draw(layout)])


@given(cases())
def test_every_head_has_one_rank_and_every_used_group_one_owner(case: Case) -> None:
    placement = case.place(0)
    ranks = placement.heads_per_rank
    assert sorted(head for heads in ranks for head in heads) == list(range(case.layer.num_heads))
    assert len({len(heads) for heads in ranks}) == 1
    per_group = case.layer.num_heads // case.num_groups
    owned = [group for rank in range(len(ranks)) for group in placement.owned_groups(rank)]
    assert sorted(owned) == sorted({head // per_group for head in case.layer.fa_heads})


@given(cases(), GATES)
def test_any_layout_reads_the_heads_that_another_has_written(case: Case, gates: dict) -> None:
    fields = HydraFields(**gates)
    written: dict[str, Tensor] = {}
    for rank, layout in enumerate(_layouts(case, 0, fields)):
        for shard in _shards(layout, _rows(layout)):
            where = tuple(
                slice(o, o + n) for o, n in zip(shard.global_offset, shard.local_shape, strict=True)
            )
            whole = written.setdefault(shard.key, torch.full(shard.global_shape, torch.nan))
            assert whole[where].isnan().all(), f"rank {rank} writes {shard.key} a second time"
            whole[where] = shard.data
    assert not any(whole.isnan().any() for whole in written.values())
    for layout in _layouts(case, 1, fields):
        expected = _rows(layout)
        factory = sharded_heads(
            "w", torch.empty_like(expected), layout.sections, replica_id=(0, 0, 0)
        )
        read = [
            written[shard.key][
                tuple(
                    slice(o, o + n)
                    for o, n in zip(shard.global_offset, shard.local_shape, strict=True)
                )
            ]
            for shard in factory.build()
        ]
        found = factory.merge_fn(read) if read else expected
        assert torch.equal(found, expected)


@given(cases(), GATES, st.data())
def test_gradients_of_sections_are_joined(case: Case, gates: dict, data: st.DataObject) -> None:
    """Wherever each was written, by two functions or none, and whatever was added to it."""
    layout = data.draw(st.sampled_from(_layouts(case, 0, HydraFields(**gates))))
    projected = torch.randn(2, 1, layout.num_rows, requires_grad=True)
    sections = layout.split(projected)
    writer = {name: data.draw(st.integers(0, 2), name) for name in sections}
    used, again = (
        data.draw(st.sets(st.sampled_from([*sections]), min_size=least)) for least in (1, 0)
    )
    _Square.written = {}
    squares = {name: x**2 for name, x in sections.items()}
    for number in (1, 2):
        names = [name for name in sections if writer[name] == number]
        values = (sections[name] for name in names)
        squares |= zip(names, _Square.apply(sections.gradients, names, *values), strict=True)
    loss = sum(squares[name].sum() for name in used)
    loss = loss + sum(3 * sections[name].sum() for name in again)
    expected = torch.zeros_like(projected)
    for name, place in layout.split(expected).items():
        place.copy_(2 * sections[name].detach() * (name in used) + 3 * (name in again))

    # A pass that stops at the sections, then whole ones: none may write over another's result.
    passes: list[tuple[Tensor, Tensor]] = []
    for factor, wanted in ((1, [*sections.values()]), (2, [projected]), (3, [projected])):
        results = torch.autograd.grad(
            loss, wanted, torch.tensor(factor), retain_graph=True, allow_unused=True
        )
        passes += [(x, x.clone()) for x in results if x is not None]
        if wanted[0] is not projected:
            continue
        found = results[0]
        torch.testing.assert_close(found, factor * expected)
        places = layout.split(found)
        for name, written in _Square.written.items():
            if written.numel() and not again and {n for n in writer if writer[n]} <= used:
                assert written.data_ptr() == places[name].data_ptr(), f"{name} was copied"
    for result, as_it_was in passes:
        assert torch.equal(result, as_it_was), "a later pass wrote over an earlier one's gradient"


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_the_layers_kernels_write_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []

    def copy(source: Tensor, target: Tensor) -> None:
        copied.append("copy")
        target.copy_(source)

    monkeypatch.setattr(projection, "_copy", copy)
    initialize_model_parallel()
    model = build_model(tiny_config(fused_kernels="triton"), tiny_plan())
    tokens, positions = token_batch(model.config)
    model(tokens, positions, None, labels=tokens).mean().backward()
    # Of each layer queries, keys and values of the FA heads, which Megatron's modules hand back.
    assert len(copied) == 3 * model.config.num_layers


class _Square(torch.autograd.Function):
    """Sections squared, whose gradients are written where all are joined."""

    written: dict[str, Tensor]

    @staticmethod
    def forward(
        ctx: Any, gradients: SectionGradients, names: list[str], *values: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.gradients, ctx.names = gradients, names
        ctx.save_for_backward(*values)
        return tuple(x**2 for x in values)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        places = ctx.gradients.empty(*ctx.names)
        for place, x, dy in zip(places, ctx.saved_tensors, upstream, strict=True):
            torch.mul(2 * x, dy, out=place)
        _Square.written |= dict(zip(ctx.names, places, strict=True))
        return (None, None, *places)


def _layouts(case: Case, index: int, fields: HydraFields) -> list[ProjectionLayout]:
    placement = case.place(index)
    ranks = range(case.layouts[index][0])
    return [lay_out(fields, HEAD_DIM, placement, rank) for rank in ranks]


def _rows(layout: ProjectionLayout) -> Tensor:
    """A rank's rows, each of a number that section, head and row make: no two are the same."""
    rows = [
        [sum(map(ord, section.name)) * 1000 + unit * 10 + row]
        for section in layout.sections
        for unit in section.units
        for row in range(section.width)
    ]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 1)


def _shards(layout: ProjectionLayout, rows: Tensor) -> list[Any]:
    return sharded_heads("w", rows, layout.sections, replica_id=(0, 0, 0)).build()


lengths_of_documents = st.lists(st.integers(1, 40), min_size=1, max_size=12)
rank_counts = st.integers(1, 5)


def _group(size: int, rank: int) -> Any:
    return SimpleNamespace(size=lambda: size, rank=lambda: rank)


@given(lengths_of_documents, rank_counts)
def test_every_token_lies_on_one_rank_with_its_own_document_and_position(
    lengths: list[int], size: int
) -> None:
    total = sum(lengths)
    tokens = torch.arange(1, total + 1)
    mask = torch.ones(total)
    batch = {"tokens": tokens[None], "loss_mask": mask[None]}
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    padded, packing = pad_documents(batch, cu_seqlens, size)
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])
    seen = []
    for rank in range(size):
        group = _group(size, rank)
        local = shard_batch(padded, group, packing)
        layout = SequenceLayout.of(local["tokens"].shape[1], packing, group)
        real = local["loss_mask"][0].bool()
        here = local["tokens"][0][real] - 1
        assert torch.equal(layout.positions[real], positions[here])
        assert torch.equal(layout.document(layout.stream_index())[real], documents[here])
        assert int(layout.positions.max()) < packing.max_seqlen_q
        seen += here.tolist()
        # Load balance: as many tokens of every document on each rank.
        counts = torch.bincount(layout.document(layout.stream_index()))
        assert torch.equal(counts * size, packing_lengths(packing))
    assert sorted(seen) == list(range(total))


def packing_lengths(packing: Any) -> Tensor:
    """Tokens of each document, padding counted in."""
    ends = packing.cu_seqlens_q_padded
    return (packing.cu_seqlens_q if ends is None else ends).diff().long()


@given(lengths_of_documents, rank_counts)
def test_a_token_sees_its_own_document_up_to_itself(lengths: list[int], size: int) -> None:
    multiples = torch.tensor([0, *(2 * size * length for length in lengths)])
    packing = packed_sequence(multiples.cumsum(0))
    num_tokens = int(multiples.sum()) // size
    layouts = [SequenceLayout.of(num_tokens, packing, _group(size, rank)) for rank in range(size)]
    keys = torch.cat([layout.stream_index() for layout in layouts])
    documents = layouts[0].document(keys)
    for layout in layouts:
        queries = layout.stream_index()
        expected = [
            [bool(q >= k and layout.document(q[None])[0] == d) for k, d in zip(keys, documents)]
            for q in queries[:5]
        ]
        assert layout.causal_mask()[:5].tolist() == expected


@given(lengths_of_documents, rank_counts)
def test_both_sides_of_the_exchange_agree_and_the_stream_comes_out(
    lengths: list[int], size: int
) -> None:
    multiples = torch.tensor([0, *(2 * size * length for length in lengths)])
    packing = packed_sequence(multiples.cumsum(0))
    num_tokens = int(multiples.sum()) // size
    layouts = [SequenceLayout.of(num_tokens, packing, _group(size, rank)) for rank in range(size)]
    pieces = [Pieces(layout, _group(size, layout.rank)) for layout in layouts]
    if size == 1:
        assert not pieces[0].moves_tokens
        return
    exchanges = [piece._exchange for piece in pieces]
    for rank, (_, received, place) in enumerate(exchanges):
        assert received == [exchanges[source][0][rank] for source in range(size)]
        arriving = torch.cat(
            [
                layout.stream_index().split(exchanges[source][0])[rank]
                for source, layout in enumerate(layouts)
            ]
        )
        stream = torch.arange(rank * num_tokens, (rank + 1) * num_tokens)
        assert torch.equal(arriving[place.argsort()], stream)
        # Boundaries of this part of the stream: its own ends, and every document's within it.
        inner = {int(end) - rank * num_tokens for end in layouts[0].cu_seqlens}
        expected = sorted({0, num_tokens} | {end for end in inner if 0 < end < num_tokens})
        assert pieces[rank].cu_seqlens.tolist() == expected
