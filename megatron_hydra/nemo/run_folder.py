"""The run folder: what stands where, which checkpoint a run goes on from; imports no NeMo."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_hydra.errors import UserError
from megatron_hydra.files import check_output, write_beside
from megatron_hydra.nemo.config import RunConfig, difference, load_config

# Sections that decide the result; a run that goes on may change the others.
_FIXED_SECTIONS = ("model", "data", "trainer", "optim", "transfer")


class RunFolder:
    """Paths of a run, and the state it was left in.

    Args:
        config: Of the run; its `log.folder` is this folder.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.path = config.folder
        self.config_file = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.hybrid = self.path / "hybrid"
        self.data_index = self.path / "data_index"
        self.nemo_logs = self.path / "nemo_logs"

    def is_complete(self) -> bool:
        """Whether the trained hybrid is written."""
        return (self.hybrid / "model.json").is_file()

    def check(self) -> None:
        """Check that the run can be started here or go on.

        Raises:
            UserError: If the folder cannot be written, or holds results of another configuration.
        """
        check_output(self.path, overwrite=True)
        if not self.config_file.is_file() or not self._has_results():
            return
        try:
            earlier = load_config(self.config_file)
        except UserError as error:
            raise UserError(f"{self.config_file}, of an earlier run: {error}") from error
        changed = difference(earlier, self.config, _FIXED_SECTIONS)
        if changed is not None:
            raise UserError(
                f"{self.path} holds a run with another {changed}: choose another log.folder, "
                "or pass --overwrite to start anew"
            )

    def _has_results(self) -> bool:
        """Whether there is something to go on from; a run that failed at once has nothing."""
        return self.is_complete() or bool(self.finished_checkpoints())

    def check_removable(self) -> None:
        """Check that the folder holds a run or nothing.

        Raises:
            UserError: If it holds something else.
        """
        if self.path.exists() and any(self.path.iterdir()) and not self.config_file.is_file():
            raise UserError(f"{self.path} is no run folder: it has no config.yaml; not removed")

    def remove(self) -> None:
        """Remove the folder, which :meth:`check_removable` has passed."""
        if self.path.exists():
            # Renamed first: another rank may be making its folders at this moment.
            removed = self.path.with_name(f".{self.path.name}.{os.getpid()}.removed")
            self.path.rename(removed)
            shutil.rmtree(removed)

    def write_config(self) -> None:
        """Write the resolved configuration."""
        with write_beside(self.config_file, overwrite=True) as temporary:
            temporary.write_text(self.config.to_yaml(), encoding="utf-8")

    def finished_checkpoints(self) -> list[Path]:
        """The finished checkpoints, newest first; whether they are whole, a reader must see."""
        finished = [
            folder
            for folder in self.checkpoints.glob("step_*")
            # NeMo marks a checkpoint as unfinished by a file beside it while it writes.
            if folder.is_dir() and not folder.with_name(f"{folder.name}-unfinished").exists()
        ]
        return sorted(finished, key=lambda folder: folder.name, reverse=True)
