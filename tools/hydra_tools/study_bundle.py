"""Results and trained teachers of a study in one file, which carries it to another machine."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

from megatron_hydra.errors import UserError
from megatron_hydra.files import write_beside
from megatron_hydra.study.config import StudyConfig
from megatron_hydra.study.teacher import INPUTS, teacher_place


def _carried(study: StudyConfig) -> Iterator[tuple[Path, str]]:
    """What a bundle holds: where it lies, and its name there."""
    for run in study.runs():
        path = study.results / f"{run.name}.json"
        if path.is_file():
            yield path, f"results/{path.name}"
    for name, teacher in study.teachers.items():
        place = teacher_place(study, name)
        there = [place / INPUTS, place / "scores.json"]
        there += [] if teacher.folder else sorted((place / "hf").glob("*"))
        yield from ((p, f"teachers/{p.relative_to(place.parent)}") for p in there if p.is_file())


def pack(study: StudyConfig, bundle: Path) -> None:
    """Write what there is, in an earlier one's place."""
    with write_beside(bundle, overwrite=True) as temporary, tarfile.open(temporary, "w") as tar:
        for path, name in _carried(study):
            tar.add(path, name)


def unpack(study: StudyConfig, bundle: Path) -> None:
    """Put what a bundle holds where the study has it; what is there already stays.

    Raises:
        UserError: If it cannot be read, or holds something else.
    """
    try:
        with tarfile.open(bundle) as tar:
            for member in tar.getmembers():
                if member.isdir():  # as where somebody packed it anew
                    continue
                kind, _, rest = member.name.partition("/")
                is_inside = bool(rest) and not rest.startswith("/") and ".." not in rest.split("/")
                content = tar.extractfile(member) if member.isfile() else None
                if kind not in ("results", "teachers") or not is_inside or content is None:
                    raise UserError(f"{bundle} holds {member.name}: it is no bundle of a study")
                target = (study.results if kind == "results" else study.folder / kind) / rest
                if not target.exists():
                    # Not `tar.extract`, whose filters early releases of Python 3.11 lack.
                    with write_beside(target) as temporary, temporary.open("wb") as stream:
                        shutil.copyfileobj(content, stream)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"cannot read the bundle {bundle}: {error}") from error
