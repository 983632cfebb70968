"""What is made once of a teacher for all its arms: weights, data, scores, and their hashes."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from megatron_hydra.errors import UserError
from megatron_hydra.files import content_hash, read_json, write_json
from megatron_hydra.processes import end_with_parent
from megatron_hydra.selection.scores import HeadScores
from megatron_hydra.study.config import Run, StudyConfig
from megatron_hydra.study.results import OF_TEACHER
from megatron_hydra.study.sections import Teacher
from megatron_hydra.study.watch import Watch

INPUTS = "inputs.json"
_KIND, _SCHEMA_VERSION = "study_teacher", 1
_DATASETS = ("short", "long")


def teacher_place(study: StudyConfig, name: str) -> Path:
    """Folder of what is made of a teacher."""
    return study.folder / "teachers" / name


def prepare_teacher(study: StudyConfig, name: str, watch: Watch, seconds: float) -> None:
    """Make what is not there yet.

    Args:
        study: The study.
        name: Of the teacher.
        watch: Of the steps.
        seconds: Left for a script that trains it, as its `--max-seconds`.

    Raises:
        StoppedError: If it was asked to stop.
        UserError: If a step cannot be done, or gives another result than it gave before; if the
            teacher is lost.
    """
    from megatron_hydra.api.convert import convert
    from megatron_hydra.api.preprocess import Retrieval, preprocess
    from megatron_hydra.api.score import score

    place, folder, data = teacher_place(study, name), study.teacher_folder(name), study.data
    if is_lost(study, name):
        raise UserError(loss_of(study, name))
    if not folder.exists():
        with watch.part("teacher"):
            _train_teacher(study, name, folder, seconds)
    sizes = ((data.length, data.documents), (data.long_length, data.long_documents))
    for seed, (key, (length, documents)) in enumerate(zip(_DATASETS, sizes, strict=True)):
        if not _dataset(place, key).exists():
            wanted = Retrieval(data.retrieval_fraction, length, documents, seed)
            with watch.part(f"data, {key}"):
                out = place / "data" / key
                preprocess(folder, out, retrieval=wanted, progress=watch.progress)
    if not (place / "scores.json").exists():
        with watch.part("score"):
            score(study.scoring(folder, place / "scores.json"), progress=watch.progress)
    if not (place / "checkpoint").exists():
        with watch.part("convert"):
            convert(folder, place / "checkpoint")
    _record(study, name)


def _record(study: StudyConfig, name: str) -> None:
    """Note what the teacher's arms are made of, or hold it to what was noted before."""
    from megatron_hydra.teachers.model_folder import weights_hash

    place, common = teacher_place(study, name), study.common_inputs()
    found = {
        "weights": weights_hash(study.teacher_folder(name)),
        "scores": scores_hash(place / "scores.json"),
        "datasets": content_hash(_dataset(place, key).with_suffix(".bin") for key in _DATASETS),
        "data": common["data"],
        "score": common["score"],
    }
    if (place / INPUTS).exists():
        known = teacher_inputs(study, name)
        if changed := [key for key in found if found[key] != known[key]]:
            raise UserError(
                f"{', '.join(changed)} of teacher {name} changed since {place / INPUTS} was "
                "written, so that arms could not be compared: choose another run.folder"
            )
    heading = {"schema_version": _SCHEMA_VERSION, "kind": _KIND}
    write_json(place / INPUTS, heading | found, overwrite=True)


def scores_hash(path: Path) -> str:
    """Of what was measured: where and by which command says nothing of an arm."""
    measured = replace(HeadScores.load(path), provenance={}).to_dict()
    return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()


def _dataset(place: Path, key: str) -> Path:
    return place / "data" / f"{key}.idx"


def is_lost(study: StudyConfig, name: str) -> bool:
    """Whether results are of a trained teacher that is not here: a new one is another network."""
    if study.teachers[name].folder or study.teacher_folder(name).exists():
        return False
    runs = (run for run in study.runs() if run.teacher == name)
    return any((study.results / f"{run.name}.json").is_file() for run in runs)


def loss_of(study: StudyConfig, name: str) -> str:
    """What there is to know of a lost teacher, in a sentence."""
    return (
        f"teacher {name} is not in {study.teacher_folder(name)}, though {study.results} has "
        "results of it, and one trained anew is another network: name the --bundle that holds it, "
        "or another folder as run.results"
    )


def is_prepared(study: StudyConfig, name: str) -> bool:
    """Whether a teacher's arms can run; of one that was carried here, some parts are lacking."""
    place = teacher_place(study, name)
    there = [*(_dataset(place, key) for key in _DATASETS), place / "checkpoint", place / INPUTS]
    return all(path.exists() for path in there)


def teacher_inputs(study: StudyConfig, name: str) -> dict[str, str]:
    """Hashes and settings of a prepared teacher.

    Raises:
        UserError: Where it is not prepared, or was for other settings.
    """
    path, common = teacher_place(study, name) / INPUTS, study.common_inputs()
    found = read_json(path, _KIND, _SCHEMA_VERSION)
    for key in ("data", "score"):
        if found[key] != common[key]:
            raise UserError(f"{path} was made with another {key}: choose another run.folder")
    return {key: value for key, value in found.items() if key not in ("kind", "schema_version")}


def all_inputs(study: StudyConfig, run: Run) -> dict[str, str]:
    """Everything that decides a run's result, by name."""
    of_teacher = teacher_inputs(study, run.teacher)
    return study.inputs(run) | {
        f"{OF_TEACHER}{key}": of_teacher[key] for key in ("weights", "scores", "datasets")
    }


def script_arguments(teacher: Teacher, folder: Path, seconds: float) -> list[str]:
    """The command line of a teacher's script after its name; a true option is a flag."""
    longest = min(seconds, float(teacher.options.get("max_seconds", seconds)))
    options = {**teacher.options, "max_seconds": longest, "out": folder}
    flags = {f"--{key.replace('_', '-')}": value for key, value in options.items()}
    return [key if value is True else f"{key}={value}" for key, value in flags.items()]


def _train_teacher(study: StudyConfig, name: str, folder: Path, seconds: float) -> None:
    """Beside its place, where one stays that its script finds too weak: no arm starts from it."""
    teacher, unchecked = study.teachers[name], folder.with_name(f"{folder.name}.unchecked")
    shutil.rmtree(unchecked, ignore_errors=True)
    words = script_arguments(teacher, unchecked, seconds)
    folder.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, str(teacher.script), *words], check=False,
        preexec_fn=functools.partial(end_with_parent, os.getpid()),
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"{teacher.script} ended with code {done.returncode}")
    unchecked.rename(folder)
