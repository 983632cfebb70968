"""Every rank's random states, kept in training checkpoints so that a run goes on bit by bit."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker

logger = logging.getLogger(__name__)

LAYOUT, RANDOM_STATES = "hydra_layout", "hydra_random_states"


def sharded_run_state(checkpoint: Path) -> dict[str, Any]:
    """What to ask a checkpoint for, beside what NeMo asks for.

    Random states belong to a rank's place in the layout they were saved at; at another layout
    the generators start from the seed.
    """
    saved = dist_checkpointing.load_common_state_dict(str(checkpoint)).get(LAYOUT)
    if saved != layout():
        logger.info("random states start from the seed: the checkpoint is of another layout")
        return {}
    return {RANDOM_STATES: sharded_states(None)}


def random_states() -> dict[str, Any]:
    """The states of all generators of this rank; Megatron's tracker's by name."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": {
            name: state.get_state() if isinstance(state, torch.Generator) else state
            for name, state in get_cuda_rng_tracker().get_states().items()
        },
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Set what :func:`random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    tracker = get_cuda_rng_tracker()
    generators = {n: s for n, s in tracker.get_states().items() if isinstance(s, torch.Generator)}
    if generators:  # CUDA graphs hold on to them
        for name, generator in generators.items():
            generator.set_state(states["tracker"][name])
    else:
        tracker.set_states(states["tracker"])


def sharded_states(states: dict[str, Any] | None) -> ShardedObject:
    """A rank's states for Megatron's checkpoints; None to ask for them."""
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return ShardedObject(RANDOM_STATES, states, (size,), (rank,))


def layout() -> dict[str, int]:
    """The sizes of the layout that random states belong to."""
    return {
        "world": torch.distributed.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
    }
