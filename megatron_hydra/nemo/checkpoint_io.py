"""How NeMo's checkpoints are written and read: by the training process, without CUDA."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import nemo.lightning as nl
import torch
from lightning.fabric.plugins import CheckpointIO
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
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
    """NeMo's asynchronous checkpoints, one at a time, on a thread that ends with the process."""

    def __init__(self, checkpoint_io: MegatronCheckpointIO) -> None:
        # NeMo's own constructor refuses megatron-core 0.16, for a format that it no longer has.
        super(AsyncFinalizableCheckpointIO, self).__init__(checkpoint_io)
        self.async_calls_queue = self  # NeMo asks it how many saves are under way
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._when_written: list[Callable[[], Any]] = []

    def get_num_unfinalized_calls(self) -> int:
        return int(self._thread is not None)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        # One copy of the state in memory, and one thread in the writers' process group.
        self.maybe_finalize_save_checkpoint(blocking=True)
        options = dict(storage_options or {})
        last = options.pop("finalize_fn", None)
        request = self.checkpoint_io.save_checkpoint(checkpoint, path, options)
        if last is not None:
            request.add_finalize_fn(last)
        self._when_written = request.finalize_fns
        self._thread = threading.Thread(target=self._run, args=(request,), daemon=True)
        self._thread.start()

    def _run(self, request: AsyncRequest) -> None:
        try:
            request.async_fn(*request.async_fn_args)
        # PyTorch's CheckpointException is no Exception. What is raised here, the training must see:
        # it would take the checkpoint for a finished one, and remove the one before.
        except BaseException as error:
            self._error = error

    def maybe_finalize_save_checkpoint(self, blocking: bool = False) -> bool:
        """Finish the checkpoint if every rank has written its files; collective.

        Raises:
            BaseException: What the writing raised, on any rank.
        """
        if self._thread is None:
            return False
        if blocking:
            self._thread.join()
        running = torch.tensor(int(self._thread.is_alive()), device=torch.cuda.current_device())
        torch.distributed.all_reduce(running)
        if running:
            return False
        if self._error is not None:
            raise self._error
        self._thread = None
        for finish in self._when_written:
            finish()
        return True
