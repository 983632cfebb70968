"""How NeMo's checkpoints are written and read: by the training process, without CUDA."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import nemo.lightning as nl
from lightning.fabric.plugins import CheckpointIO
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import (
    AsyncCaller,
    AsyncCallsQueue,
    AsyncRequest,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from nemo.lightning.io.pl import MegatronCheckpointIO
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO

from megatron_hydra.teachers.distributed_weights import InProcessSave, damage_named
from megatron_hydra.training.config import ResumeSection
from megatron_hydra.training.random_states import sharded_run_state


def make_checkpoint_io(async_save: bool) -> CheckpointIO:
    """What writes and reads a run's checkpoints.

    Args:
        async_save: Write on a thread while the training goes on; the checkpoint is finished, and
            its predecessor removed, after the first step that finds every rank's files written.
    """
    checkpoint_io = _InProcessCheckpointIO(async_save=async_save)
    return _BackgroundCheckpointIO(checkpoint_io) if async_save else checkpoint_io


def make_checkpoint_callback(folder: Path, section: ResumeSection) -> HydraModelCheckpoint:
    """What decides when a run saves, and which checkpoints it keeps.

    Args:
        folder: Of the checkpoints.
        section: How often, and how many.
    """
    return HydraModelCheckpoint(
        dirpath=str(folder),
        filename="step_{finished_steps:08.0f}",
        auto_insert_metric_name=False,
        every_n_train_steps=section.save_every_n_steps,
        monitor="finished_steps",
        mode="max",
        save_top_k=section.keep,
        save_last=False,
        enable_version_counter=False,  # a damaged one is written over
        save_optim_on_train_end=True,
        always_save_context=False,
        save_context_on_train_end=False,
        verbose=False,
    )


class HydraModelCheckpoint(nl.ModelCheckpoint):
    """NeMo's checkpoint callback, which also saves where the run is asked to stop.

    Its removals are over before they count as over.
    """

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Save at the steps that are to be saved, and at the one that a run stops after."""
        super().on_train_batch_end(trainer, *args, **kwargs)
        if trainer.should_stop and self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _remove_checkpoint(
        self, trainer: pl.Trainer, filepath: str, override_async: bool = False
    ) -> None:
        if not (self.async_save and override_async):
            super()._remove_checkpoint(trainer, filepath, override_async)
            return
        # NeMo would start a thread and drop the mark of an unfinished checkpoint at once: one
        # that a killed run had removed half would be taken for a whole one.
        self.async_save = False
        try:
            super()._remove_checkpoint(trainer, filepath, override_async)
        finally:
            self.async_save = True


class _InProcessCheckpointIO(MegatronCheckpointIO):
    """NeMo's checkpoints, written without a helper process and read without CUDA.

    The helper that Megatron starts at every save outlives a killed run, and costs a second or two.
    """

    def load_checkpoint(
        self,
        path: str | Path,
        sharded_state_dict: Any = None,
        map_location: Any = None,
        strict: Any = None,
    ) -> dict[str, Any]:
        # Nothing may be missing, unlike in NeMo's own: a run that goes on goes on exactly.
        with damage_named(Path(path)):
            return dist_checkpointing.load(
                {**sharded_state_dict, **sharded_run_state(Path(path))},
                str(path),
                strict=StrictHandling.ASSUME_OK_UNEXPECTED,
            )

    def _determine_dist_ckpt_save_strategy(self) -> FullyParallelSaveStrategyWrapper:
        return FullyParallelSaveStrategyWrapper(InProcessSave("torch_dist", 1), None, False)


class _BackgroundCheckpointIO(AsyncFinalizableCheckpointIO):
    """NeMo's asynchronous checkpoints, one at a time, on a thread."""

    def __init__(self, checkpoint_io: MegatronCheckpointIO) -> None:
        # NeMo's own constructor refuses megatron-core 0.16, for a format that it no longer has.
        super(AsyncFinalizableCheckpointIO, self).__init__(checkpoint_io)
        self.async_calls_queue = _ThreadQueue()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        # One copy of the state in memory, and one thread in the writers' process group.
        self.maybe_finalize_save_checkpoint(blocking=True)
        super().save_checkpoint(checkpoint, path, storage_options)


class _ThreadQueue(AsyncCallsQueue):
    """Megatron's queue of saves that are under way, on threads where it would fork."""

    def _get_async_caller(self) -> AsyncCaller:
        return _ThreadCaller()


class _ThreadCaller(AsyncCaller):
    """One save on a thread, which ends with the process, however that ends."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        self._thread = threading.Thread(target=self._run, args=(async_req,), daemon=True)
        self._thread.start()

    def _run(self, request: AsyncRequest) -> None:
        try:
            request.async_fn(*request.async_fn_args)
        # PyTorch's CheckpointException is no Exception. What is raised here, the training must see:
        # it would take the checkpoint for a finished one, and remove the one before.
        except BaseException as error:
            self._error = error

    def is_current_async_call_done(self, blocking: bool, no_dist: bool) -> bool:
        """Whether every rank has written its files; collective unless ``no_dist``.

        Raises:
            BaseException: What the writing raised, on any rank.
        """
        if blocking:
            self.close()
        is_alive = self._thread is not None and self._thread.is_alive()
        is_done = not is_alive if no_dist else self.sync_all_async_calls(int(is_alive))
        if is_done and self._error is not None:
            raise self._error
        return is_done

    def close(self, abort: bool = False) -> None:
        if self._thread is not None and not abort:
            self._thread.join()

    def __del__(self) -> None: ...
