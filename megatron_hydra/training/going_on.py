"""Which checkpoint of its folder a run goes on from, if that is its own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.teachers.distributed_weights import check_weights
from megatron_hydra.training.config import RunConfig
from megatron_hydra.training.run_files import checkpoint_step
from megatron_hydra.training.run_folder import RunFolder
from megatron_hydra.training.run_inputs import check_same_inputs, input_hashes

logger = logging.getLogger(__name__)

MODEL = "hydra_model"
"""The key that checkpoints have it under."""


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


def read_identity(checkpoint: Path) -> RunIdentity:
    """The run that a training checkpoint is of.

    Args:
        checkpoint: Its folder, not damaged. What an earlier release has not noted is empty, or 0.

    Raises:
        UserError: If it is no checkpoint of a run, or was saved at another step than its name says.
    """
    state = dist_checkpointing.load_common_state_dict(str(checkpoint / "weights"))
    saved = state.get(MODEL)
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
            what = "FA heads", list(there.fa_heads), list(here.fa_heads)
            if there.fa_heads == here.fa_heads:
                what = "kinds of the heads", list(there.kinds), list(here.kinds)
            raise UserError(
                f"{checkpoint} is of another head plan than {source}: the {what[0]} of layer "
                f"{index} are {what[1]} there and {what[2]} here; {way_out}"
            )
