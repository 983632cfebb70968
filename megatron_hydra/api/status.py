"""`status`: how far a training run is, from its folder alone; imports nothing slow."""

from __future__ import annotations

import json
import mmap
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from megatron_hydra.errors import UserError
from megatron_hydra.files import lock_holder
from megatron_hydra.training.config import RunConfig, load_config
from megatron_hydra.training.run_files import (
    NEEDLES,
    RUN_CONFIG,
    TEACHER_NEEDLES,
    VALIDATION,
    checkpoint_step,
    trained_steps,
)
from megatron_hydra.training.run_folder import RunFolder

_STEPS_OF_A_RATE = 20


@dataclass(frozen=True)
class Status:
    """What is known of a run.

    Attributes:
        folder: Of the run.
        stage: As `transfer.stage`.
        max_steps: Of the whole run.
        tokens_per_step: Tokens of a global batch.
        step: The newest finished step that is recorded; 0 where there is none.
        scalars: Of that step, as `metrics.jsonl` has them; None for what is no number.
        validation: Steps and value of the newest loss on held-out samples; None where none is.
        needles: Steps, task and share, 0 to 1, of the newest questions about needles; None where
            none were asked.
        teacher_needles: The share of them that the teacher finds; None where it was not asked.
        seconds_since_step: Since it was recorded; None where there is none.
        seconds_per_step: The median of the newest; None where fewer than two are recorded.
        saved_step: Finished steps of the newest checkpoint, or of the trained hybrid; 0 for none.
        seconds_since_save: Since that was written; None where there is none.
        holder: The process that works in the folder, in words; empty where there is none.
        is_complete: Whether the trained hybrid is there, with all its steps.
    """

    folder: Path
    stage: str
    max_steps: int
    tokens_per_step: int
    step: int
    scalars: Mapping[str, float | None]
    validation: tuple[int, float | None] | None
    needles: tuple[int, str, float] | None
    teacher_needles: float | None
    seconds_since_step: float | None
    seconds_per_step: float | None
    saved_step: int
    seconds_since_save: float | None
    holder: str
    is_complete: bool

    @property
    def tokens(self) -> int:
        """That the recorded steps have seen."""
        return self.step * self.tokens_per_step

    @property
    def max_tokens(self) -> int:
        """Of the whole run."""
        return self.max_steps * self.tokens_per_step

    @property
    def seconds_left(self) -> float | None:
        """Until the last step at the present rate; None where that is not known."""
        if self.seconds_per_step is None:
            return None
        return (self.max_steps - self.step) * self.seconds_per_step


def status(run: str | os.PathLike[str]) -> Status:
    """What the folder of a run tells.

    Raises:
        UserError: If it is no run's folder.
    """
    config_file = Path(run) / RUN_CONFIG
    if not config_file.is_file():
        raise UserError(f"{os.fspath(run)} has no {RUN_CONFIG}, so no training has begun there")
    return status_of(_placed(load_config(config_file), Path(run)))


def status_of(config: RunConfig) -> Status:
    """What the run folder of a configuration tells, which need not be there yet."""
    folder, now = RunFolder(config), time.time()
    records = _newest_records(folder.metrics, _STEPS_OF_A_RATE + 1)
    newest: Mapping[str, Any] = records[-1] if records else {}
    saved, of_teacher = _newest_save(folder), _newest_needles(folder.metrics, TEACHER_NEEDLES)
    return Status(
        folder=folder.path,
        stage=config.transfer.stage,
        max_steps=config.trainer.max_steps,
        tokens_per_step=config.data.global_batch_size * config.data.seq_length,
        step=int(newest.get("step", 0)),
        scalars={key: value for key, value in newest.items() if key not in ("step", "time")},
        validation=_newest_validation(folder.metrics),
        needles=_newest_needles(folder.metrics, NEEDLES),
        teacher_needles=None if of_teacher is None else of_teacher[-1],
        seconds_since_step=now - newest["time"] if records else None,
        seconds_per_step=_seconds_per_step(records),
        saved_step=0 if saved is None else saved[0],
        seconds_since_save=None if saved is None else now - saved[1],
        holder=lock_holder(folder.lock_file),
        is_complete=folder.is_complete(),
    )


def _placed(config: RunConfig, run: Path) -> RunConfig:
    """The configuration with the folder where it is found, which may have been given otherwise."""
    return replace(config, log=replace(config.log, folder=os.fspath(run)))


def _newest_records(file: Path, number: int, part: str = "") -> list[dict[str, Any]]:
    """The last lines of a run's `metrics.jsonl` that have a part, which may lie far above the end.

    A line that is being written is none of them.
    """
    if not file.is_file() or not file.stat().st_size:
        return []
    lines: list[bytes] = []
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
        end = text.rfind(b"\n")
        while len(lines) < number and end > 0:
            place = text.rfind(part.encode(), 0, end)
            if place < 0:
                break
            before = text.rfind(b"\n", 0, place)
            lines.append(text[before + 1 : text.find(b"\n", place)])
            end = before
    try:
        return [json.loads(line) for line in reversed(lines)]
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from error


def _newest_validation(file: Path) -> tuple[int, float | None] | None:
    """Step and loss of the last line that has one."""
    records = _newest_records(file, 1, f'"{VALIDATION}loss"')
    return (records[0]["step"], records[0][f"{VALIDATION}loss"]) if records else None


def _newest_needles(file: Path, prefix: str) -> tuple[int, str, float] | None:
    """Step, task and share of the last line that has one whose name begins so."""
    for record in _newest_records(file, 1, f'"{prefix}'):
        name = next(name for name in record if name.startswith(prefix))
        return record["step"], name.removeprefix(prefix), record[name]
    return None


def _seconds_per_step(records: Sequence[Mapping[str, Any]]) -> float | None:
    """The median time between steps that follow one another; a run that went on has a gap."""
    between = [
        (later["time"] - earlier["time"]) / (later["step"] - earlier["step"])
        for earlier, later in zip(records, records[1:], strict=False)
        if later["step"] > earlier["step"]
    ]
    return median(between) if between else None


def _newest_save(folder: RunFolder) -> tuple[int, float] | None:
    """Steps and Unix time of the newest checkpoint or of the trained hybrid; None without."""
    found = [
        (step, place.stat().st_mtime)
        for place, step in (
            *((each / "weights", checkpoint_step(each)) for each in folder.finished_checkpoints()),
            (folder.hybrid, trained_steps(folder.hybrid)),
        )
        if step is not None
    ]
    return max(found, default=None)
