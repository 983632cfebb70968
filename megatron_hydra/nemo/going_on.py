"""What a run goes on from: its newest whole checkpoint, held to what the run began with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.nemo.run_state import RunIdentity, check_model, read_identity
from megatron_hydra.teachers.distributed_weights import check_weights
from megatron_hydra.training.config import RunConfig
from megatron_hydra.training.run_folder import RunFolder
from megatron_hydra.training.run_inputs import check_same_inputs, input_hashes

logger = logging.getLogger(__name__)


def run_identity(config: RunConfig, plan: HeadPlan, meta: Mapping[str, Any]) -> RunIdentity:
    """What a run's checkpoints are known by.

    Args:
        config: Of the run.
        plan: Of the hybrid that it starts from.
        meta: model.json of that.
    """
    inputs = input_hashes(config)
    return RunIdentity(plan, meta["teacher_config_hash"], inputs, config.trainer.max_steps)


def newest_checkpoint(folder: RunFolder, identity: RunIdentity) -> Path | None:
    """The newest checkpoint that is whole, or None where there is none yet.

    Args:
        folder: Of the run, before its configuration is written anew.
        identity: Of the run.

    Raises:
        UserError: If none of several is whole, or the newest is another run's.
    """
    damage: list[UserError] = []
    for checkpoint in folder.finished_checkpoints():
        try:
            check_weights(checkpoint / "weights")
            saved = read_identity(checkpoint)
        except UserError as error:
            damage.append(error)
            continue
        if damage:
            logger.warning("%s; going on from %s instead", damage[0], checkpoint)
        check_model(saved, identity, checkpoint, folder.config.transfer.init_from)
        moved = folder.moved_inputs()
        check_same_inputs(saved.inputs, identity.inputs, moved, folder.config, checkpoint)
        if saved.max_steps not in (0, identity.max_steps):
            _tell_new_length(saved.max_steps, identity.max_steps)
        return checkpoint
    if damage:
        raise UserError(
            f"{damage[0]}; no checkpoint of {folder.path} is whole: put one back, or choose "
            "another log.folder"
        )
    return None


def _tell_new_length(earlier: int, max_steps: int) -> None:
    logger.info(
        "trainer.max_steps is %d, and was %d: from here on the learning rate is that of a run of "
        "%d steps, and so is the order of the data after its first epoch",
        max_steps,
        earlier,
        max_steps,
    )
