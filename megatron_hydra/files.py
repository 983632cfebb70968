"""Writing outputs so that nothing is lost: written beside, then moved into place."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from megatron_hydra.errors import UserError

_RECORDED_PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "nemo-toolkit",
    "transformer-engine",
    "transformers",
    "fla-core",
)
# A line break is escaped inside a JSON string, so what follows this opening is never in one.
_NUMBER_LIST = re.compile(r'\[\n[^\[\]{}"]*\]')

OutputKind = Literal["file", "folder"]


def check_output(
    path: str | os.PathLike[str],
    overwrite: bool = False,
    kind: OutputKind | None = None,
    marker: str | None = None,
) -> Path:
    """Return ``path`` if an output may be written there; change nothing on disk.

    Args:
        path: Of the output.
        overwrite: Whether an earlier output may be replaced.
        kind: What is going to be written, where that is known before.
        marker: File that an earlier folder must hold, unless it is empty: no other is replaced.

    Raises:
        UserError: If it exists and ``overwrite`` is False, or is of another kind, if it is a
            folder without ``marker`` or one that the running command stands in, or if nothing
            can be created at its place.
    """
    target = Path(path)
    if kind is not None:
        _check_kind(target, kind)
    if target.exists() and not overwrite:
        raise UserError(f"output {target} exists: name another, or pass --overwrite")
    if target.is_dir() and Path.cwd().is_relative_to(target.resolve()):
        raise UserError(f"output {target} holds the current folder: name one inside it")
    if marker and target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise UserError(f"output {target} holds something else: it has no {marker}; not replaced")
    ancestor = target.absolute().parent
    while not ancestor.exists():
        ancestor = ancestor.parent
    try:
        # Permission bits do not tell (root, read-only mounts, /proc): try, and leave no trace.
        with tempfile.TemporaryFile(dir=ancestor):
            pass
    except OSError as error:
        raise UserError(f"cannot write {target}: {ancestor}: {error.strerror}") from error
    return target


def check_no_input(output: Path, inputs: Iterable[Path | None]) -> None:
    """Check that ``output`` is none of the inputs and no folder that holds one; None is none.

    Raises:
        UserError: Naming both.
    """
    for source in filter(None, inputs):
        if source.resolve().is_relative_to(output.resolve()):
            raise UserError(f"output {output} would replace the input {source}: name another")


@contextmanager
def write_beside(
    path: str | os.PathLike[str],
    overwrite: bool = False,
    kind: OutputKind | None = None,
    marker: str | None = None,
) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it into place when the block succeeds.

    The block writes a file or makes a folder there. If it raises, the temporary is removed and
    an earlier output stays as it was. Missing parent folders are made. Arguments as for
    :func:`check_output`.

    Raises:
        UserError: As :func:`check_output`, or if a file would take a folder's place or the other
            way round.
    """
    target = check_output(path, overwrite, kind, marker)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield temporary
        _replace(temporary, target)
    finally:
        _remove(temporary)


def write_json(path: str | os.PathLike[str], data: Any, overwrite: bool = False) -> None:
    """Write ``data`` as indented JSON, lists of numbers on one line, by :func:`write_beside`."""
    text = _NUMBER_LIST.sub(_on_one_line, json.dumps(data, indent=1))
    with write_beside(path, overwrite) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str], kind: str, schema_version: int) -> dict[str, Any]:
    """Read a JSON object that says it is ``kind`` of ``schema_version``.

    Raises:
        UserError: If the file is missing, no JSON object, of another kind or version.
    """
    source = Path(path)
    data: Any
    try:
        data = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{source} is not valid JSON: {error}") from error
    found = data.get("kind") if isinstance(data, dict) else type(data).__name__
    if not isinstance(data, dict) or found != kind:
        raise UserError(f"{source} holds {found!r}, but a file of kind {kind!r} is needed")
    if data.get("schema_version") != schema_version:
        raise UserError(
            f"{source} has schema version {data.get('schema_version')!r}; "
            f"this release reads version {schema_version}"
        )
    return data


def versions() -> dict[str, str]:
    """Versions of Python and the packages that decide a result, for provenance records."""
    found = {"python": platform.python_version()}
    for package in _RECORDED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _on_one_line(match: re.Match[str]) -> str:
    return "[" + " ".join(match.group()[1:-1].split()) + "]"


def _check_kind(target: Path, kind: OutputKind) -> None:
    if target.exists() and target.is_dir() != (kind == "folder"):
        found = "folder" if target.is_dir() else "file"
        raise UserError(
            f"output {target} is a {found}, and a {kind} is to be written: name another"
        )


def _replace(temporary: Path, target: Path) -> None:
    _check_kind(target, "folder" if temporary.is_dir() else "file")
    if target.is_dir() and not target.is_symlink():
        # A folder cannot be renamed over a full one: step the old one aside, so that at every
        # moment one complete version exists on disk.
        old_folder = target.with_name(f".{target.name}.{os.getpid()}.old")
        os.replace(target, old_folder)
        os.replace(temporary, target)
        _remove(old_folder)
    else:
        os.replace(temporary, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
