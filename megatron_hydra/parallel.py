"""Process groups: Megatron's model-parallel state on one process or under torchrun."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_hydra.errors import UserError

Found = TypeVar("Found")


def initialize_model_parallel(
    tensor: int = 1,
    pipeline: int = 1,
    seed: int = 1234,
    *,
    context: int = 1,
    virtual_pipeline: int | None = None,
) -> None:
    """Set up process group, model-parallel groups and random seeds, once.

    Without torchrun's environment the process is a group of one, through an in-process store that
    opens no port. Backend: nccl where CUDA is available, else gloo.

    Args:
        tensor: Tensor-parallel size.
        pipeline: Pipeline-parallel size.
        seed: Seeds PyTorch's generator and Megatron's model-parallel RNG tracker.
        context: Context-parallel size.
        virtual_pipeline: Model chunks per pipeline rank; None for one.
    """
    if not dist.is_initialized():
        _initialize_process_group()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor, pipeline, virtual_pipeline, context_parallel_size=context
        )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def from_first_rank(find: Callable[[], Found]) -> Found:
    """What a function returns on the first rank, where alone it is called; collective.

    Raises:
        UserError: On every rank, if it does on the first: all must end.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = find()
        except UserError as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    found: Found = answer[0]
    return found


def _initialize_process_group() -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(_leave_process_group)  # or NCCL warns as the process ends


def _leave_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
