"""All kinds of heads, in the order in which a layer has their rows and runs them."""

from __future__ import annotations

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadKind, HeadPlan, LayerHeadPlan
from megatron_hydra.model.mixers.base import Mixer
from megatron_hydra.model.mixers.full_attention import FullAttention
from megatron_hydra.model.mixers.gated_delta_net import GatedDeltaNet
from megatron_hydra.model.mixers.kda import KimiDeltaAttention
from megatron_hydra.model.mixers.sliding_window import SlidingWindow
from megatron_hydra.model.options import HydraFields
from megatron_hydra.model.placement import LayerPlacement
from megatron_hydra.model.projection import ProjectionLayout

KINDS: dict[HeadKind, type[Mixer]] = {
    kind.kind: kind for kind in (FullAttention, GatedDeltaNet, KimiDeltaAttention, SlidingWindow)
}


def check_kinds(plan: HeadPlan) -> None:
    """See that every kind that a plan names is known.

    Raises:
        UserError: Names the layer and the head.
    """
    for index, layer in enumerate(plan.layers):
        for head, kind in enumerate(layer.kinds):
            if kind != "la" and kind not in KINDS:
                raise UserError(
                    f"head {head} of layer {index} of the head plan is of kind {kind!r}; allowed: "
                    f"la (the model's la_kind), {', '.join(KINDS)}"
                )


def kinds_of_layer(layer_plan: LayerHeadPlan, la_kind: HeadKind) -> tuple[type[Mixer], ...]:
    """Whose modules a layer has: full attention's, its LA kind's, and of each kind that it names.

    The first two without a head of theirs too, so that layers look alike in checkpoints.
    """
    names = {"fa", la_kind, *layer_plan.resolved(la_kind).kinds}
    return tuple(kind for name, kind in KINDS.items() if name in names)


def lay_out(
    config: HydraFields, head_dim: int, placement: LayerPlacement, rank: int
) -> ProjectionLayout:
    """The in-projection of a rank: the sections of all kinds.

    Args:
        config: Decides which sections exist.
        head_dim: d.
        placement: The layer's heads on all ranks, their plan resolved.
        rank: Tensor-parallel rank.
    """
    owned = [placement.owned_groups(r) for r in range(placement.tp_size)]
    groups = (owned[rank], tuple(sorted(g for of_rank in owned for g in of_rank)))
    sections = []
    for kind in kinds_of_layer(placement.layer_plan, config.la_kind):
        heads = (
            placement.heads_of(rank, kind.kind),
            placement.layer_plan.heads_of(kind.kind),
        )
        sections += kind.sections(config, head_dim, heads, groups)
    return ProjectionLayout(tuple(sections))
