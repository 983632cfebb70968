"""What a training checkpoint holds beside weights, optimizer and the data's place.

The head plan and the teacher that the run is for, and every rank's random states.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan

logger = logging.getLogger(__name__)

_MODEL, _LAYOUT, _RANDOM_STATES = "hydra_model", "hydra_layout", "hydra_random_states"


class RunStateCallback(pl.Callback):
    """Puts the run's state into each checkpoint, and takes the random states out again.

    Args:
        plan: Of the hybrid.
        teacher_config_hash: Of the teacher that the hybrid was made from.
    """

    def __init__(self, plan: HeadPlan, teacher_config_hash: str) -> None:
        self.plan, self.teacher_config_hash = plan, teacher_config_hash
        self._loaded: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the state; collective in what is made of it."""
        checkpoint[_MODEL] = {
            "plan": self.plan.to_dict(),
            "teacher_config_hash": self.teacher_config_hash,
        }
        checkpoint[_LAYOUT] = _layout()
        checkpoint[_RANDOM_STATES] = _sharded(random_states())

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the random states for the first step."""
        self._loaded = checkpoint.get(_RANDOM_STATES)

    def on_train_batch_start(self, *args: Any) -> None:
        """Set the random states; what was set up since the start has drawn from them."""
        if self._loaded is not None:
            set_random_states(self._loaded)
            self._loaded = None


def check_model(weights: Path, plan: HeadPlan, teacher_config_hash: str, source: str) -> None:
    """Check that a training checkpoint is one of this plan and teacher.

    Args:
        weights: Its `weights` folder, not damaged.
        plan: Of the run.
        teacher_config_hash: Of the run's hybrid.
        source: Where these two come from, for the message.

    Raises:
        UserError: If it is another's.
    """
    saved = dist_checkpointing.load_common_state_dict(str(weights)).get(_MODEL)
    checkpoint = weights.parent
    if saved is None:
        raise UserError(f"{checkpoint} holds no head plan: it is no checkpoint of this release")
    if saved["teacher_config_hash"] != teacher_config_hash:
        raise UserError(
            f"{checkpoint} is of a hybrid of another teacher than {source}: "
            "choose another log.folder, or pass --overwrite to start anew"
        )
    saved_layers = HeadPlan.from_dict(saved["plan"]).layers
    for index, (there, here) in enumerate(zip(saved_layers, plan.layers, strict=True)):
        if there != here:
            raise UserError(
                f"{checkpoint} is of another head plan than {source}: the FA heads of layer "
                f"{index} are {list(there.fa_heads)} there and {list(here.fa_heads)} here; "
                "choose another log.folder, or pass --overwrite to start anew"
            )


def sharded_run_state(checkpoint: Path) -> dict[str, Any]:
    """What to ask a checkpoint for, beside what NeMo asks for.

    Random states belong to a rank's place in the layout they were saved at; at another layout
    the generators start from the seed.
    """
    saved = dist_checkpointing.load_common_state_dict(str(checkpoint)).get(_LAYOUT)
    if saved != _layout():
        logger.info("random states start from the seed: the checkpoint is of another layout")
        return {}
    return {_RANDOM_STATES: _sharded(None)}


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


def _sharded(states: dict[str, Any] | None) -> ShardedObject:
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return ShardedObject(_RANDOM_STATES, states, (size,), (rank,))


def _layout() -> dict[str, int]:
    return {
        "world": torch.distributed.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
    }
