"""Which files of a folder a training run wrote: known by their place and by what they hold."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from megatron_hydra.teachers.model_folder import peek_metadata
from megatron_hydra.training.config import RunConfig

OUTPUT_FOLDERS = ("checkpoints", "tensorboard", "hybrid", "data_index", "nemo_logs", "wandb")
RUN_CONFIG = "run_config.yaml"
METRICS = "metrics.jsonl"
FINDINGS = "findings.jsonl"
"""Lines of bad numbers, jumps of the loss and slow ranks."""
VALIDATION, NEEDLES, TEACHER_NEEDLES = "validation/", "needles/", "teacher_needles/"
"""Before the names of what is measured on held-out samples, and of the tasks with needles, which
the student finds and its teacher."""
HEADER = "# The resolved configuration of a training run: written and read by megatron-hydra train."
"""The first line of a run's own configuration file."""

_WEIGHTS = r"weights/(\.metadata|metadata\.json|common\.pt|__\d+_\d+\.distcp)"
_CHECKPOINT = re.compile(r"step_(\d+)")
# Below each output folder, the paths of what a run writes there.
_WRITTEN = {
    "checkpoints": re.compile(rf"step_\d+-unfinished|step_\d+/{_WEIGHTS}"),
    "tensorboard": re.compile(r"events\.out\.tfevents\.[^/]+"),
    "hybrid": re.compile(rf"model\.json|plan\.json|tokenizer/[^/]+|{_WEIGHTS}"),
    "data_index": re.compile(
        r"([0-9a-f]{16}(_\d+x\d+)?/)?[0-9a-f]{32}-\w+-(train|valid|test)-\w+\.(npy|txt)"
    ),
    "wandb": re.compile(r"run_id"),  # what W&B itself wrote is a record of its own run
    "nemo_logs": re.compile(r"(cmd-args|git-info)\.log|(lightning_logs|nemo_\w+[\w-]*)\.txt"),
}
# What a killed run leaves of an output that it was writing.
_PARTIAL = re.compile(
    r"\.(hybrid|run_config\.yaml)\.\d+\.(partial|old)|\.seen_by_all\.[0-9a-f]{16}"
)


def checkpoint_step(folder: Path) -> int | None:
    """Finished steps of the checkpoint that a run would call so; None for any other name."""
    match = _CHECKPOINT.fullmatch(folder.name)
    return int(match[1]) if match else None


def written_files(folder: Path) -> Iterator[Path]:
    """What earlier runs wrote to ``folder``, file by file, but for their configuration.

    Links inside are not followed; an output folder may itself be one, to another disk.
    """
    for name in OUTPUT_FOLDERS:
        if name == "hybrid" and trained_steps(folder / name) is None:
            continue
        for file in files_below(folder / name):
            if _WRITTEN[name].fullmatch(file.relative_to(folder / name).as_posix()):
                yield file
    yield from (folder / name for name in (METRICS, FINDINGS) if has_step_lines(folder / name))
    for path in folder.glob(".*"):
        if _PARTIAL.fullmatch(path.name):
            yield from files_below(path) if path.is_dir() else [path]


def files_below(folder: Path) -> Iterator[Path]:
    """Every file and link below a folder; nothing where there is none."""
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        yield from (Path(parent) / name for name in (*names, *links))


def trained_steps(hybrid: Path) -> int | None:
    """The steps that the trained hybrid in ``hybrid`` has; None if no run wrote it."""
    try:
        provenance = peek_metadata(hybrid)["provenance"]
        return int(provenance["max_steps"]) if "stage" in provenance else None
    except (ValueError, KeyError, TypeError):
        return None


def has_step_lines(file: Path) -> bool:
    """Whether a run wrote this: its first line is one of a step, or there is none."""
    try:
        with file.open(encoding="utf-8") as stream:
            line = stream.readline()
        first = json.loads(line) if line else {"step": 0, "time": 0}
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and {"step", "time"} <= set(first)


def is_run_config(file: Path) -> bool:
    """Whether a run wrote this configuration: its first line says so, or no section is left out.

    The latter is how earlier releases wrote it, under another name.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if text.startswith(HEADER):
            return True
        raw = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(raw, dict) and set(RunConfig.__dataclass_fields__) <= set(raw)
