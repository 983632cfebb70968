"""All kinds of heads, in the order in which a layer has their rows and runs them."""

from __future__ import annotations

from megatron_hydra.head_plan import HeadKind
from megatron_hydra.model.config import HydraFields
from megatron_hydra.model.mixers.base import Mixer
from megatron_hydra.model.mixers.full_attention import FullAttention
from megatron_hydra.model.mixers.gated_delta_net import GatedDeltaNet
from megatron_hydra.model.placement import LayerPlacement
from megatron_hydra.model.projection import ProjectionLayout

KINDS: dict[HeadKind, type[Mixer]] = {kind.kind: kind for kind in (FullAttention, GatedDeltaNet)}


def lay_out(
    config: HydraFields, head_dim: int, placement: LayerPlacement, rank: int
) -> ProjectionLayout:
    """The in-projection of a rank: the sections of all kinds.

    Args:
        config: Decides which sections exist.
        head_dim: d.
        placement: The layer's heads on all ranks.
        rank: Tensor-parallel rank.
    """
    owned = [placement.owned_groups(r) for r in range(placement.tp_size)]
    groups = (owned[rank], tuple(sorted(g for of_rank in owned for g in of_rank)))
    sections = []
    for name, kind in KINDS.items():
        heads = (placement.heads_of(rank, name), placement.layer_plan.heads_of(name))
        sections += kind.sections(config, head_dim, heads, groups)
    return ProjectionLayout(tuple(sections))
