"""What a training checkpoint holds beside weights, optimizer and the data's place.

The head plan and the teacher that the run is for, and every rank's random states.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
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
from megatron_hydra.training.run_files import checkpoint_step

logger = logging.getLogger(__name__)

_MODEL, _LAYOUT, _RANDOM_STATES = "hydra_model", "hydra_layout", "hydra_random_states"


@dataclass(frozen=True)
class RunIdentity:
    """What makes checkpoints those of one run."""

    plan: HeadPlan
    teacher_config_hash: str
    """Of the teacher that the hybrid was made from: its shape."""
    inputs: Mapping[str, str]
    """Hashes of the contents of what the run reads, by the keys that name it."""
    max_steps: int
    """Where the learning rate's schedule ends; may change."""


class RunStateCallback(pl.Callback):
    """Puts the run's state into each checkpoint, and takes the random states out again.

    Args:
        identity: Of the run.
    """

    def __init__(self, identity: RunIdentity) -> None:
        self.identity = identity
        self._loaded: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the state; collective in what is made of it."""
        checkpoint[_MODEL] = {
            "plan": self.identity.plan.to_dict(),
            "teacher_config_hash": self.identity.teacher_config_hash,
            "inputs": dict(self.identity.inputs),
            "max_steps": self.identity.max_steps,
        }
        checkpoint[_LAYOUT] = _layout()
        checkpoint[_RANDOM_STATES] = _sharded(random_states())

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the random states for the first step."""
        self._loaded = checkpoint.get(_RANDOM_STATES)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the learning rate from this run's schedule, not the one that was saved.

        Equal, bit for bit, unless `trainer.max_steps` has changed.
        """
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            for group, start, rate in zip(
                scheduler.optimizer.param_groups,
                scheduler.base_lrs,
                scheduler.lr_lambdas,
                strict=True,
            ):
                group["lr"] = start * rate(scheduler.last_epoch)

    def on_train_batch_start(self, *args: Any) -> None:
        """Set the random states; what was set up since the start has drawn from them."""
        if self._loaded is not None:
            set_random_states(self._loaded)
            self._loaded = None


def read_identity(checkpoint: Path) -> RunIdentity:
    """The run that a training checkpoint is of.

    Args:
        checkpoint: Its folder, not damaged. What an earlier release has not noted is empty, or 0.

    Raises:
        UserError: If it is no checkpoint of a run, or was saved at another step than its name says.
    """
    state = dist_checkpointing.load_common_state_dict(str(checkpoint / "weights"))
    saved = state.get(_MODEL)
    if saved is None:
        raise UserError(f"{checkpoint} holds no head plan: it is no checkpoint of this release")
    if state.get("global_step") != checkpoint_step(checkpoint):
        raise UserError(f"{checkpoint} was saved at step {state.get('global_step')}: it is a copy")
    return RunIdentity(
        HeadPlan.from_dict(saved["plan"]),
        saved["teacher_config_hash"],
        saved.get("inputs", {}),
        saved.get("max_steps", 0),
    )


def check_model(saved: RunIdentity, run: RunIdentity, checkpoint: Path, source: str) -> None:
    """Check that a training checkpoint is one of this run's plan and teacher.

    Args:
        saved: Of the checkpoint.
        run: Of the run.
        checkpoint: Its folder, for the message.
        source: Where the run's plan and teacher come from, for the message.

    Raises:
        UserError: If it is another's.
    """
    way_out = "put that back, or choose another log.folder"
    if saved.teacher_config_hash != run.teacher_config_hash:
        raise UserError(f"{checkpoint} is of a hybrid of another teacher than {source}: {way_out}")
    for index, (there, here) in enumerate(zip(saved.plan.layers, run.plan.layers, strict=True)):
        if there != here:
            raise UserError(
                f"{checkpoint} is of another head plan than {source}: the FA heads of layer "
                f"{index} are {list(there.fa_heads)} there and {list(here.fa_heads)} here; "
                f"{way_out}"
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
