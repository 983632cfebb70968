"""The curves and the configuration of a training run, from its folder."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
CONFIG_FILES = ("run_config.yaml", "config.yaml")
"""Where a run's configuration may stand; the latter is where earlier releases wrote it."""
_LAYER_PREFIX = "train/alignment/layer_"
_REQUIRED = ("train/grad_norm", "train/tokens_per_s")
_SKIPPED = "train/skipped_steps"


@dataclass(frozen=True)
class Curve:
    """A scalar by optimizer step; ``steps`` ascending, ``values`` of the same length.

    A value is NaN at a step that the run skipped as bad, and finite at every other.
    """

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class TrainingRun:
    """A run of one stage.

    Attributes:
        name: What the user calls it.
        curves: By TensorBoard tag.
        config_yaml: The resolved configuration, as written to the run folder.
        config: The same, parsed.
        provenance: Of the trained hybrid.
        plan: Of the trained hybrid.
    """

    name: str
    folder: Path
    curves: dict[str, Curve]
    config_yaml: str
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    plan: HeadPlan

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


def read_run(name: str, folder: str | os.PathLike[str]) -> TrainingRun:
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
    run = TrainingRun(name, folder, _read_curves(files), config_yaml, config, provenance, plan)
    _check_curves(run)
    return run


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


def _read_curves(files: list[Path]) -> dict[str, Curve]:
    points: dict[str, dict[int, float]] = {}
    for events in sorted(map(_scalars, files), key=_start_time):
        first = min((event.step for found in events.values() for event in found), default=0)
        for earlier in points.values():
            for step in [step for step in earlier if step >= first]:
                del earlier[step]
        for tag, found in events.items():
            points.setdefault(tag, {}).update({event.step: event.value for event in found})
    skipped = points.get(_SKIPPED, {})
    return {
        tag: Curve(np.array(sorted(found)), _values(found, skipped))
        for tag, found in points.items()
        if found
    }


def _scalars(file: Path) -> dict[str, list[Any]]:
    """The events of one file, by tag."""
    # Imported here: TensorBoard takes seconds to load, and only this function needs it.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def _start_time(events: Mapping[str, list[Any]]) -> float:
    return min((event.wall_time for found in events.values() for event in found), default=0.0)


def _values(points: Mapping[int, float], skipped: Collection[int]) -> np.ndarray:
    """In the order of the steps; what is Inf at a skipped step is as little to be drawn as NaN."""
    is_gap = {step: step in skipped and not math.isfinite(points[step]) for step in points}
    return np.array([math.nan if is_gap[step] else points[step] for step in sorted(points)])


def _check_curves(run: TrainingRun) -> None:
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
