"""The curves and the configuration of a training run, from its folder."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from megatron_hydra.errors import UserError
from megatron_hydra.files import read_json
from megatron_hydra.head_plan import HeadPlan

LOSS_PARTS = {
    "train/alignment": "alignment",
    "train/kl": "KL",
    "train/ce": "cross entropy",
    "train/loss": "total",
}
"""Tags of the losses and what the page calls them."""
_HELD_OUT = {
    "alignment": "validation/loss",
    "KL": "validation/kl",
    "cross entropy": "validation/ce",
    "total": "validation/loss",
}
"""Tags of the same on held-out samples, by what the page calls them."""
CONFIG_FILES = ("run_config.yaml", "config.yaml")
"""Where a run's configuration may stand; the latter is where earlier releases wrote it."""
STAGES = {
    "align": (
        "stage 1, alignment",
        "each hybrid attention learns its teacher attention's output",
    ),
    "distill": (
        "stage 2, distillation",
        "the whole hybrid learns the teacher's next-token distribution",
    ),
    "long_context": (
        "stage 3, long context",
        "the whole hybrid learns to predict the next token of long samples",
    ),
}
"""A stage by its word in a configuration: its name, and what it does."""
_LAYER_PREFIX = "train/alignment/layer_"
_NEEDLES_PREFIX, _TEACHER_NEEDLES_PREFIX = "needles/", "teacher_needles/"
_REQUIRED = ("train/grad_norm", "train/tokens_per_s")
_SKIPPED = "train/skipped_steps"


@dataclass(frozen=True)
class Curve:
    """A scalar by optimizer step; ``steps`` ascending, ``values`` of the same length.

    A value is NaN at a step that the run skipped as bad, and finite at every other.
    """

    steps: np.ndarray
    values: np.ndarray


class Life(NamedTuple):
    """What one start of a run has left in its event file.

    Attributes:
        start: When training started, Unix time in seconds.
        end: When the last scalar was written, likewise.
        scalars: TensorBoard's events by tag.
    """

    start: float
    end: float
    scalars: Mapping[str, list[Any]]


@dataclass(frozen=True)
class RecordedRun:
    """A run of one stage.

    Attributes:
        name: What the user calls it.
        lives: One for each start of the run, the earliest first.
        curves: By TensorBoard tag, of all lives.
        config_yaml: The resolved configuration, as written to the run folder.
        config: The same, parsed.
        provenance: Of the trained hybrid.
        plan: Of the trained hybrid.
    """

    name: str
    folder: Path
    lives: Sequence[Life]
    curves: dict[str, Curve]
    config_yaml: str
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    plan: HeadPlan

    @property
    def _stage(self) -> tuple[str, str]:
        stage = self.provenance.get("stage") or recorded(self.config, "transfer", "stage")
        return STAGES.get(str(stage), ("", ""))

    @property
    def title(self) -> str:
        """The user's name of the run and, where it is recorded, that of its stage."""
        return f"{self.name} ({self._stage[0]})" if self._stage[0] else self.name

    @property
    def purpose(self) -> str:
        """What the stage does; empty where no stage is recorded."""
        return self._stage[1]

    @property
    def hardware(self) -> str:
        """What the run was trained on; empty where it is not recorded."""
        kind = str(recorded(self.config, "trainer", "accelerator"))
        return str(self.provenance.get("hardware") or {"cpu": "CPU", "gpu": "GPU"}.get(kind, ""))

    @property
    def days(self) -> str:
        """First and last day of training in UTC, as ``2026-11-28 to 2026-11-30``."""
        ends = (self.lives[0].start, max(life.end for life in self.lives))
        days = (datetime.fromtimestamp(end, timezone.utc).date().isoformat() for end in ends)
        return " to ".join(dict.fromkeys(days))

    @property
    def seconds(self) -> float:
        """From the start of training to its last scalar, summed over the lives."""
        return sum(life.end - life.start for life in self.lives)

    @property
    def num_steps(self) -> int:
        """The last step that has a loss."""
        return int(next(iter(self.loss_parts.values())).steps[-1])

    @property
    def num_tokens(self) -> int | None:
        """Tokens of all steps; None where the configuration does not give those of a step."""
        batch = recorded(self.config, "data", "global_batch_size")
        length = recorded(self.config, "data", "seq_length")
        if not isinstance(batch, int) or not isinstance(length, int):
            return None
        return self.num_steps * batch * length

    @property
    def loss_parts(self) -> dict[str, Curve]:
        """The losses to draw, by title: parts that are on, and the total of two or more."""
        found = {
            title: self.curves[tag]
            for tag, title in LOSS_PARTS.items()
            if tag in self.curves and np.nan_to_num(self.curves[tag].values).any()
        }
        if len(found) == 2:  # The total of one part is that part.
            found.pop("total", None)
        return found

    @property
    def needles(self) -> dict[str, Curve]:
        """Share of the needles that the model found while it trained, by task; mostly empty."""
        return {
            tag.removeprefix(_NEEDLES_PREFIX): curve
            for tag, curve in sorted(self.curves.items())
            if tag.startswith(_NEEDLES_PREFIX)
        }

    @property
    def teacher_needles(self) -> dict[str, float]:
        """Share of them that its teacher finds, by task; of a run without a teacher none."""
        return {
            tag.removeprefix(_TEACHER_NEEDLES_PREFIX): float(curve.values[-1])
            for tag, curve in self.curves.items()
            if tag.startswith(_TEACHER_NEEDLES_PREFIX)
        }

    @property
    def validation_parts(self) -> dict[str, Curve]:
        """Of :attr:`loss_parts` those that were measured on held-out samples too, by title."""
        found = {title: self.curves.get(_HELD_OUT[title]) for title in self.loss_parts}
        return {
            title: curve
            for title, curve in found.items()
            if curve is not None and np.isfinite(curve.values).any()
        }

    @property
    def skipped_steps(self) -> list[int]:
        """The steps that the run left out because of NaN or Inf."""
        return (
            [int(step) for step in self.curves[_SKIPPED].steps] if _SKIPPED in self.curves else []
        )

    @property
    def layer_alignment(self) -> list[Curve]:
        """Alignment of each layer, in order; empty where the run has none."""
        tags = [tag for tag in self.curves if tag.startswith(_LAYER_PREFIX)]
        return [self.curves[tag] for tag in sorted(tags, key=lambda tag: (len(tag), tag))]


def read_run(name: str, folder: str | os.PathLike[str]) -> RecordedRun:
    """Read ``run_config.yaml``, the event files in ``tensorboard/``, and the hybrid's provenance.

    A run that was stopped and resumed has several event files with steps in common: what the
    earlier ones hold from where a later one begins was done again, and is left out.

    Raises:
        UserError: If the folder, its configuration, the events, a curve or the trained hybrid is
            missing, or a value is not finite at a step that was not skipped.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"run {name}: folder {folder} does not exist")
    config_yaml, config = _read_config(name, folder)
    files = sorted((folder / "tensorboard").rglob("events.out.tfevents.*"))
    if not files:
        raise UserError(f"run {name}: no TensorBoard event file below {folder / 'tensorboard'}")
    meta = folder / "hybrid" / "model.json"
    if not meta.is_file():
        raise UserError(f"run {name}: {folder} has no hybrid/model.json: it has not finished")
    provenance = read_json(meta, "hybrid", 1).get("provenance", {})
    plan = HeadPlan.load(meta.with_name("plan.json"))
    lives = _read_lives(files)
    run = RecordedRun(
        name, folder, lives, _join_curves(lives), config_yaml, config, provenance, plan
    )
    _check_curves(run)
    return run


def recorded(record: Any, *keys: str) -> Any:
    """What stands in a nested record behind ``keys``; None if it is not there."""
    for key in keys:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


def _read_config(name: str, folder: Path) -> tuple[str, Mapping[str, Any]]:
    path = next((folder / name for name in CONFIG_FILES if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"run {name}: {folder} has no run_config.yaml, so it is no training run")
    text = path.read_text(encoding="utf-8")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"run {name}: {path} is not valid YAML: {error}") from error
    if not isinstance(config, Mapping):
        raise UserError(f"run {name}: {path} must hold the sections of a run's configuration")
    return text, config


def _read_lives(files: list[Path]) -> list[Life]:
    """The lives that wrote a scalar, the earliest first."""
    # Imported here: TensorBoard takes seconds to load, and only this function needs it.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lives = []
    for file in files:
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
        if scalars:
            end = max(found[-1].wall_time for found in scalars.values())
            lives.append(Life(events.FirstEventTimestamp(), end, scalars))
    return sorted(lives, key=lambda life: life.start)


def _join_curves(lives: list[Life]) -> dict[str, Curve]:
    points: dict[str, dict[int, float]] = {}
    for life in lives:
        first = min(event.step for found in life.scalars.values() for event in found)
        for earlier in points.values():
            for step in [step for step in earlier if step >= first]:
                del earlier[step]
        for tag, found in life.scalars.items():
            points.setdefault(tag, {}).update({event.step: event.value for event in found})
    skipped = points.get(_SKIPPED, {})
    return {
        tag: Curve(np.array(sorted(found)), _values(found, skipped))
        for tag, found in points.items()
        if found
    }


def _values(points: Mapping[int, float], skipped: Collection[int]) -> np.ndarray:
    """In the order of the steps; what is Inf at a skipped step is as little to be drawn as NaN."""
    is_gap = {step: step in skipped and not math.isfinite(points[step]) for step in points}
    return np.array([math.nan if is_gap[step] else points[step] for step in sorted(points)])


def _check_curves(run: RecordedRun) -> None:
    skipped = set(run.skipped_steps)
    for tag, curve in run.curves.items():
        if not tag.startswith("train/"):
            continue
        for step, value in zip(curve.steps, curve.values, strict=True):
            if not math.isfinite(value) and step not in skipped:
                raise UserError(f"run {run.name}: {tag} is {value} at step {step}")
        if not np.isfinite(curve.values).any():
            raise UserError(f"run {run.name}: {tag} has no finite value: every step was skipped")
    found = ", ".join(sorted(run.curves)) or "none"
    if not run.loss_parts:
        raise UserError(
            f"run {run.name}: {run.folder} has no loss curve; needed is one of "
            f"{', '.join(LOSS_PARTS)}, found: {found}"
        )
    for tag in _REQUIRED:
        if tag not in run.curves:
            raise UserError(f"run {run.name}: {run.folder} has no curve {tag}; found: {found}")
