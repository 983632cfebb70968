"""How a checkpoint names and stores per-head parameters: one shard per head, in any layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    ReplicaId,
    ShardedTensor,
    ShardedTensorFactory,
)
from torch import Tensor

from megatron_hydra.model.projection import Section


def sharded_heads(
    key: str,
    parameter: Tensor,
    sections: Sequence[Section],
    *,
    axis: int = 0,
    num_padding: int = 0,
    sharded_offsets: tuple = (),
    replica_id: ReplicaId,
) -> ShardedTensorFactory:
    """Describe a per-head parameter to Megatron's distributed checkpoints, head by head.

    Each unit of each section is one shard of a global tensor `<key>.<section>` (`<key>` for a
    section without a name) that has the units of all ranks in the teacher's order. So the
    checkpoint knows neither TP size nor placement, and any layout loads it.

    Args:
        key: The parameter's key in the checkpoint.
        parameter: This rank's tensor.
        sections: Its parts along `axis`, in order.
        axis: The dimension that the heads lie on.
        num_padding: Zeros along `axis` behind the last section; they are not stored.
        sharded_offsets: Megatron's leading offsets, such as the layer's.
        replica_id: Tells apart the data-parallel replicas.
    """

    def build(key: str, tensor: Tensor, replica_id: ReplicaId, flattened_range: Any) -> list:
        assert flattened_range is None, "flattened optimizer shards are not in use"
        shards, start, leading = [], 0, len(sharded_offsets)
        for section in sections:
            name = f"{key}.{section.name}" if section.name else key
            for unit in section.units:
                place = (axis + leading, section.all_units.index(unit), len(section.all_units))
                shards.append(
                    ShardedTensor.from_rank_offsets(
                        name,
                        tensor.narrow(axis, start, section.width),
                        *sharded_offsets,
                        place,
                        replica_id=replica_id,
                        prepend_axis_num=leading,
                    )
                )
                start += section.width
        assert start + num_padding == tensor.shape[axis], (key, start, tuple(tensor.shape))
        return shards

    def merge(shards: list[Tensor]) -> Tensor:
        shape = list(shards[0].shape)
        shape[axis] = num_padding
        return torch.cat([*shards, shards[0].new_zeros(shape)], dim=axis)

    return ShardedTensorFactory(key, parameter, build, merge, replica_id)
