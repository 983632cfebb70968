"""Global tensors from what each rank holds: the same names and shapes whatever the layout.

Parameters are described by the checkpoint's own shards, one per head, so a tensor that was split
over ranks comes together by what the shards say of themselves. What several ranks hold (tensor
and data parallel replicas, tied embeddings) must be one value: its spread is the replica drift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_hydra.teachers.distributed_weights import sharded_weights


@dataclass(frozen=True)
class Piece:
    """Part of a global tensor: at `offset` along every axis, or at `rows` of the first axis."""

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: Tensor
    rows: Tensor | None = None


@dataclass
class Assembly:
    """Global tensors on the CPU, and how far replicas of their parts were apart."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    drift: float = 0.0
    drift_at: str = ""


def parameter_pieces(
    chunks: Sequence[GPTModel], value: Callable[[torch.nn.Parameter], Tensor]
) -> list[Piece]:
    """What this rank holds of a tensor that every parameter has, such as its gradient.

    Args:
        chunks: The rank's model chunks, bare.
        value: Of a parameter, shaped alike.
    """
    pieces = []
    for chunk in chunks:
        with _standing_in(chunk, value):
            pieces += shard_pieces(sharded_weights(chunk))
    return pieces


def gradient_pieces(wrapped: Sequence[DistributedDataParallel]) -> list[Piece]:
    """What this rank holds of every gradient, once they are reduced; collective."""
    for chunk in wrapped:
        if chunk.ddp_config.use_distributed_optimizer:
            _gather_reduced_gradients(chunk)
    return parameter_pieces([chunk.module for chunk in wrapped], _gradient)


def _gather_reduced_gradients(ddp: DistributedDataParallel) -> None:
    """Complete the gradient buffers, of which each rank has reduced its optimizer's share."""
    for bucket_group in ddp.bucket_groups:
        group = bucket_group.intra_distributed_optimizer_instance_group
        for bucket in bucket_group.buckets:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            parts = [torch.empty_like(own) for _ in range(group.size())]
            dist.all_gather(parts, own, group=group)
            bucket.grad_data.copy_(torch.cat(parts))


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    if not parameter.requires_grad:
        return torch.zeros_like(parameter.data)
    return parameter.main_grad


@contextmanager
def _standing_in(chunk: GPTModel, value: Callable[[torch.nn.Parameter], Tensor]) -> Iterator[None]:
    """Other parameters in place of the chunk's, with those values.

    Their `data` alone cannot be exchanged: autograd forgets a parameter's hooks once it had data
    of another type, and by hooks gradients reach Megatron's buffers.
    """
    kept = [(module._parameters, dict(module._parameters)) for module in chunk.modules()]
    others: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for parameter in chunk.parameters():
        stand_in = value(parameter).detach().clone()
        others[parameter] = torch.nn.Parameter(stand_in, parameter.requires_grad)
        others[parameter].__dict__.update(parameter.__dict__)
    for held, parameters in kept:
        held.update((name, others.get(each)) for name, each in parameters.items())
    try:
        yield
    finally:
        for held, parameters in kept:
            held.update(parameters)


def shard_pieces(sharded_state: Any) -> list[Piece]:
    """The tensors of a sharded state dict; its factories are applied in place."""
    apply_factories(sharded_state)
    return [
        Piece(
            leaf.key,
            tuple(leaf.global_shape),
            tuple(leaf.global_offset),
            # Axes that only number the shards (layers, say) have size 1 and are not in the data.
            leaf.data.detach().cpu().reshape((1,) * leaf.prepend_axis_num + leaf.data.shape),
        )
        for leaf in _leaves(sharded_state)
        if isinstance(leaf, ShardedTensor)
    ]


def assemble(pieces: Sequence[Piece], scratch: Path) -> Assembly:
    """Put the pieces of all ranks together, on rank 0.

    Collective. The pieces go through files, so that neither a GPU's memory nor one pickle has to
    hold those of all ranks.

    Args:
        pieces: This rank's.
        scratch: A folder that all ranks see.

    Returns:
        The global tensors on rank 0; nothing on the others.
    """
    rank = dist.get_rank()
    file = scratch / f"pieces.{rank}.pt"
    torch.save(list(pieces), file)
    dist.barrier()
    result = Assembly()
    if rank == 0:
        _fill(result, scratch)
    dist.barrier()
    file.unlink()
    return result


def _fill(result: Assembly, scratch: Path) -> None:
    first: dict[tuple, Tensor] = {}
    for rank in range(dist.get_world_size()):
        pieces = torch.load(scratch / f"pieces.{rank}.pt", weights_only=False)
        for piece in pieces:
            target = result.tensors.setdefault(
                piece.key, torch.empty(piece.shape, dtype=piece.data.dtype)
            )
            rows = None if piece.rows is None else tuple(piece.rows.tolist())
            where = (piece.key, piece.offset, rows)
            if where in first:
                drift = _spread(first[where], piece.data)
                if drift > result.drift:
                    result.drift, result.drift_at = drift, f"{piece.key} on rank {rank}"
                continue
            first[where] = piece.data
            index: list[Any] = [
                slice(start, start + size)
                for start, size in zip(piece.offset, piece.data.shape, strict=True)
            ]
            if piece.rows is not None:
                index[0] = piece.rows
            target[tuple(index)] = piece.data
    held: dict[str, int] = {}
    for (key, _, _), data in first.items():
        held[key] = held.get(key, 0) + data.numel()
    for key, tensor in result.tensors.items():
        assert held[key] == tensor.numel(), f"{key}: the ranks hold {held[key]} of {tensor.shape}"


def _spread(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    if torch.equal(one, other):
        return 0.0
    worst = (one.double() - other.double()).abs().max().item()
    return worst if worst > 0 else float("inf")  # NaN is as far apart as can be


def _leaves(state: Any) -> Iterator[Any]:
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, (list, tuple)):
        for item in state:
            yield from _leaves(item)
    else:
        yield state
