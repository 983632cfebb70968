"""Gradients of what tensor-parallel ranks hold alike, norms above all, on ranks of unlike heads.

Megatron sums them over tensor-parallel ranks once each rank has reduced its share of the buffer
over data-parallel ones. That is right where a parameter lies at the same place of all ranks'
buffers. Ranks with heads of other kinds, or with other numbers of them, have buffers of other
lengths: with the distributed optimizer one rank would add what another has not reduced, and without
it the order of a sum, and so its last bit, would differ from rank to rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed import finalize_model_grads as _finalize_model_grads
from torch import Tensor


def finalize_model_grads(
    chunks: Sequence[DistributedDataParallel], *args: Any, **kwargs: Any
) -> None:
    """Megatron's function of this name, for `config.finalize_model_grads_func`.

    Args:
        chunks: Wrapped in Megatron's DistributedDataParallel.
        *args: Megatron's.
        **kwargs: Megatron's.
    """
    with shared_gradients_whole(chunks):
        _finalize_model_grads(list(chunks), *args, **kwargs)


@contextmanager
def shared_gradients_whole(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """While Megatron finalizes: reduced over data-parallel ranks, they are so on every rank.

    Args:
        chunks: This rank's.
    """
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        yield
        return
    for chunk in chunks:
        chunk.finish_grad_sync = partial(_finish, chunk, chunk.finish_grad_sync)
    try:
        yield
    finally:
        for chunk in chunks:
            del chunk.finish_grad_sync


def _finish(
    chunk: DistributedDataParallel, finish: Callable[..., None], *args: Any, **kwargs: Any
) -> None:
    finish(*args, **kwargs)
    shared = [
        parameter
        for parameter in chunk.parameters()
        if parameter.requires_grad and not getattr(parameter, "tensor_model_parallel", False)
    ]
    gradients = [parameter.main_grad for parameter in shared]
    if chunk.ddp_config.use_distributed_optimizer:
        _sum_over(_shares(chunk, shared), gradients)
    if not chunk.config.sequence_parallel:  # else Megatron sums them, which makes ranks alike
        # A mean: each rank has the whole. Of the norms of queries and keys it has its heads' part,
        # which Megatron sums afterwards: a sum of equal means is the sum of the parts.
        group = parallel_state.get_tensor_model_parallel_group()
        _sum_over([(group, gradient / group.size()) for gradient in gradients], gradients)


def _shares(
    chunk: DistributedDataParallel, parameters: Sequence[torch.nn.Parameter]
) -> list[tuple[Any, Tensor]]:
    """Of each gradient what this rank has reduced, zeros elsewhere, and who has the rest."""
    buffers = {each: buffer for buffer in chunk.buffers for each in buffer.param_index_map}
    shares = []
    for parameter in parameters:
        buffer = buffers[parameter]
        start, _, number = buffer.param_index_map[parameter]
        bucket, group = buffer.buckets[number], buffer.data_parallel_group
        size = bucket.grad_data.numel() // group.size()
        first = bucket.offset + group.rank() * size - start
        own = slice(max(first, 0), max(first + size, 0))
        share = torch.zeros_like(parameter.main_grad)
        share.view(-1)[own] = parameter.main_grad.view(-1)[own]
        shares.append((group, share))
    return shares


def _sum_over(addends: Sequence[tuple[Any, Tensor]], targets: Sequence[Tensor]) -> None:
    """Each addend's sum over its group's ranks into its target, with one collective for a kind."""
    kinds: dict[tuple[Any, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for (group, addend), target in zip(addends, targets, strict=True):
        kinds.setdefault((group, addend.dtype), []).append((addend, target))
    for (group, _), pairs in kinds.items():
        flat = torch.cat([addend.view(-1) for addend, _ in pairs])
        dist.all_reduce(flat, group=group)
        parts = flat.split([target.numel() for _, target in pairs])
        for part, (_, target) in zip(parts, pairs, strict=True):
            target.copy_(part.view_as(target))
