"""Lightning's hooks that put a run's state into checkpoints, and take it out again."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from megatron_hydra.training.going_on import MODEL, RunIdentity
from megatron_hydra.training.random_states import (
    LAYOUT,
    RANDOM_STATES,
    layout,
    random_states,
    set_random_states,
    sharded_states,
)


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
        checkpoint[MODEL] = {
            "plan": self.identity.plan.to_dict(),
            "teacher_config_hash": self.identity.teacher_config_hash,
            "inputs": dict(self.identity.inputs),
            "max_steps": self.identity.max_steps,
        }
        checkpoint[LAYOUT] = layout()
        checkpoint[RANDOM_STATES] = sharded_states(random_states())

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the random states for the first step."""
        self._loaded = checkpoint.get(RANDOM_STATES)

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
