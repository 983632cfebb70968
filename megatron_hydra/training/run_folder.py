"""The run folder: what stands where, who may write it, whether a run may start or go on there.

From which checkpoint it goes on, `going_on` says.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from megatron_hydra.disk import check_space
from megatron_hydra.errors import UserError
from megatron_hydra.files import check_output, check_outputs, lock, read_json, write_beside
from megatron_hydra.training.config import MAY_CHANGE, RunConfig, differences, load_config
from megatron_hydra.training.run_files import (
    FINDINGS,
    HEADER,
    METRICS,
    OUTPUT_FOLDERS,
    RUN_CONFIG,
    checkpoint_step,
    files_below,
    has_step_lines,
    is_run_config,
    trained_steps,
    written_files,
)
from megatron_hydra.training.run_inputs import (
    check_same_inputs,
    input_hashes,
    input_paths,
    moved_inputs,
    result_bytes,
)

_WAY_OUT = "choose another log.folder"


class RunFolder:
    """Paths of a run, and the state it was left in; imports no NeMo.

    Args:
        config: Of the run; its `log.folder` is this folder.
        config_file: What it was read from, where that is a file.
    """

    def __init__(self, config: RunConfig, config_file: str | Path | None = None) -> None:
        self.config = config
        self.config_file = None if config_file is None else Path(config_file)
        self.path = config.folder
        self.run_config = self.path / RUN_CONFIG
        self.lock_file = self.path / ".lock"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.hybrid = self.path / "hybrid"
        self.data_index = self.path / "data_index"
        self.nemo_logs = self.path / "nemo_logs"
        self.wandb = self.path / "wandb"
        self.metrics = self.path / METRICS
        self.findings = self.path / FINDINGS

    def lock(self) -> AbstractContextManager[None]:
        """Hold the folder, so that one run at a time writes it; makes it if it is not there.

        Raises:
            UserError: If another run holds it; says which.
        """
        return lock(self.lock_file, f"log.folder {self.path}")

    def is_complete(self) -> bool:
        """Whether the trained hybrid is written, of as many steps as the run is to have."""
        return trained_steps(self.hybrid) == self.config.trainer.max_steps

    def check_trained(self) -> None:
        """Check that the hybrid of a complete run was trained on what the run would read now.

        What is not there any more, nobody can have meant to train on.

        Raises:
            UserError: If it was not.
        """
        meta = read_json(self.hybrid / "model.json", "hybrid", 1)
        saved = meta["provenance"].get("inputs", {})
        found = input_hashes(self.config)
        check_same_inputs(saved, found, self.moved_inputs(), self.config, self.hybrid)

    def moved_inputs(self) -> set[str]:
        """The keys that name other places than when the run was started last."""
        if not self.run_config.is_file():
            return set()
        return moved_inputs(load_config(self.run_config), self.config)

    def check(self) -> None:
        """Check that the run can be started here or go on.

        Raises:
            UserError: If the folder cannot be written, what the run reads lies where it writes,
                or the folder holds something else, or results of another configuration.
        """
        self._check_places()
        if not self.is_complete():
            self._check_in_the_way()
        reached = self._steps_reached()
        if reached is None:
            return  # a run that failed at once has nothing to go on from
        if not is_run_config(self.run_config):
            raise UserError(self._unknown_run())
        try:
            earlier = load_config(self.run_config)
        except UserError as error:
            raise UserError(f"{self.run_config}, of an earlier run: {error}") from error
        if changed := list(differences(earlier, self.config)):
            raise UserError(
                f"{self.path} holds a run with "
                + ", ".join(f"{key} {old} (here {new})" for key, old, new in changed)
                + f": set it back, or {_WAY_OUT}; a run that goes on may change only "
                + ", ".join(MAY_CHANGE)
            )
        self._check_length(reached)

    def _check_length(self, reached: int) -> None:
        """Check that the run is as long as it has become, and, if longer, can go on."""
        max_steps, trained = self.config.trainer.max_steps, trained_steps(self.hybrid)
        if max_steps < reached:
            raise UserError(
                f"trainer.max_steps is {max_steps}, but {self.path} holds a run of {reached} "
                f"steps: raise it to {reached} or more, or {_WAY_OUT}"
            )
        if trained is not None and trained < max_steps and not self.finished_checkpoints():
            raise UserError(
                f"{self.path} holds a model trained for {trained} steps, but no checkpoint to go "
                f"on from to trainer.max_steps {max_steps}: set it back to {trained}, or {_WAY_OUT}"
            )

    def _steps_reached(self) -> int | None:
        """Finished steps of the newest result; None where there is none."""
        steps = [checkpoint_step(folder) for folder in self.finished_checkpoints()]
        return max((step for step in (*steps, trained_steps(self.hybrid)) if step is not None),
                   default=None)  # fmt: skip

    def _unknown_run(self) -> str:
        earlier = self.path / "config.yaml"
        if is_run_config(earlier):
            return (
                f"{self.path} holds a run of an earlier release: rename its config.yaml to "
                f"{RUN_CONFIG} to go on with it, or {_WAY_OUT}"
            )
        return (
            f"{self.path} holds a run's results without its {RUN_CONFIG}, so that nobody knows "
            f"what they are of: put that back, or {_WAY_OUT}"
        )

    def check_removable(self) -> None:
        """Check that a run can be started anew here; removes nothing.

        Raises:
            UserError: As :meth:`check`, but for an earlier run's results.
        """
        self._check_places()
        if self.config_file is not None and _is_same(self.config_file, self.run_config):
            raise UserError(
                f"--overwrite would replace {self.config_file}, which --config names: copy it to "
                "a place outside the run first"
            )
        self._check_in_the_way()

    def remove(self) -> None:
        """Remove what an earlier run wrote, which :meth:`check_removable` has passed.

        Its configuration stays until :meth:`write_config` replaces it, and so do the folders that
        every run has: another rank may be writing there at this moment.
        """
        removed = list(written_files(self.path))
        # At one stroke: without its model.json nobody could tell what the rest of it is.
        aside = self.path / f".hybrid.{os.getpid()}.old"
        if any(file.is_relative_to(self.hybrid) for file in removed):
            self.hybrid.rename(aside)
            removed = [file for file in removed if not file.is_relative_to(self.hybrid)]
            removed += files_below(aside)
        for file in removed:
            file.unlink(missing_ok=True)
        kept = {self.path / name for name in OUTPUT_FOLDERS} | {self.path}
        for folder in sorted({parent for file in removed for parent in file.parents}, reverse=True):
            if (
                folder.is_relative_to(self.path)
                and folder not in kept
                and not any(folder.iterdir())
            ):
                folder.rmdir()

    def write_config(self) -> None:
        """Write the resolved configuration."""
        with write_beside(self.run_config, overwrite=True) as temporary:
            temporary.write_text(f"{HEADER}\n{self.config.to_yaml()}", encoding="utf-8")

    def append_metrics(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write a step's line, at one stroke: a run that is killed leaves whole lines.

        Args:
            step: Finished steps, this one counted in.
            scalars: By name; a number that is not finite is written as null.

        Raises:
            UserError: If the folder is gone.
        """
        self._append(self.metrics, step, scalars)

    def append_finding(self, step: int, fields: Mapping[str, Any]) -> None:
        """Write down what was found in a step; arguments and errors as of the metrics."""
        self._append(self.findings, step, fields)

    def _append(self, file: Path, step: int, fields: Mapping[str, Any]) -> None:
        def finite(value: Any) -> Any:
            return None if isinstance(value, float) and not math.isfinite(value) else value

        values = {name: finite(value) for name, value in fields.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **values})
        try:
            with file.open("ab", buffering=0) as stream:
                stream.write(f"{line}\n".encode())
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            raise UserError(
                f"log.folder {self.path} is gone, which was there when the run began: was it "
                f"removed or its disk unmounted? Step {step} was the last"
            ) from error

    def finished_checkpoints(self) -> list[Path]:
        """The finished checkpoints, newest first; whether they are whole, a reader must see."""
        finished = {
            folder: step
            for folder in (self.checkpoints.iterdir() if self.checkpoints.is_dir() else ())
            if (step := checkpoint_step(folder)) is not None
            and (folder / "weights").is_dir()
            # NeMo marks a checkpoint as unfinished by a file beside it while it writes.
            and not folder.with_name(f"{folder.name}-unfinished").exists()
        }
        return sorted(finished, key=lambda folder: (finished[folder], folder.name), reverse=True)

    def check_room(self) -> None:
        """Check that the disk has room for what the run is going to write at the least.

        That is the trained hybrid, and the checkpoints that it keeps with the one that is written
        before the oldest goes; less where some are there already, or the run is shorter.

        Raises:
            UserError: Naming the needed and the free space.
        """
        resume, max_steps = self.config.resume, self.config.trainer.max_steps
        num_saves = max_steps // resume.save_every_n_steps
        num_new = min(resume.keep + 1, num_saves) - len(self.finished_checkpoints())
        hybrid, checkpoint = result_bytes(self.config)
        check_space(self.checkpoints, hybrid + max(0, num_new) * checkpoint)

    def _check_places(self) -> None:
        """Check that the folder can be written, and nothing that the run reads lies in its way."""
        check_output(self.path, overwrite=True, kind="folder")
        inputs = [path for _, path in input_paths(self.config)]
        if self.config_file is not None and not (
            # Going on by the run's own record of itself.
            _is_same(self.config_file, self.run_config) and is_run_config(self.run_config)
        ):
            inputs.append(self.config_file)
        outputs = [self.path / name for name in OUTPUT_FOLDERS]
        check_outputs(
            [*outputs, self.run_config, self.metrics, self.findings, self.lock_file],
            inputs,
            _WAY_OUT,
        )

    def _check_in_the_way(self) -> None:
        """Check that nothing that no run wrote stands where this one writes."""
        for folder in (self.path / name for name in OUTPUT_FOLDERS):
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{folder} is a file, and a run makes a folder there: {_WAY_OUT}")
        for file, is_own in (
            (self.run_config, is_run_config),
            (self.metrics, has_step_lines),
            (self.findings, has_step_lines),
        ):
            if file.exists() and not is_own(file):
                raise UserError(
                    f"{file} was not written by a run, which would write there: rename it, or "
                    f"{_WAY_OUT}"
                )
        if self.hybrid.is_symlink():
            raise UserError(
                f"{self.hybrid} is a link, and a run moves the trained model there: remove it, or "
                f"{_WAY_OUT}"
            )
        own = set(written_files(self.path))
        for file in files_below(self.hybrid):
            if file not in own:
                raise UserError(
                    f"{file} was not written by a run, which will put the trained model into "
                    f"{self.hybrid}: move it, or {_WAY_OUT}"
                )


def _is_same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
