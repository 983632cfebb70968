"""Files, so that nothing is lost: checked, locked, written beside, moved into place, hashed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import shutil
import socket
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from megatron_hydra.disk import disk_full_named, existing_folder
from megatron_hydra.errors import UserError

logger = logging.getLogger(__name__)

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

# Of a file that is larger than both together, a hash reads evenly spaced blocks alone.
_HASH_BLOCK_BYTES = 2**16
_HASH_BLOCKS = 1024
# File systems take 255; the rest is for what a temporary name adds.
_LONGEST_NAME_BYTES = 224
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
    try:
        exists = target.exists()
    except OSError as error:  # a name that is too long, a folder above that may not be searched
        raise UserError(f"cannot write {target}: {error.strerror}") from error
    if exists and not (target.is_file() or target.is_dir()):
        # A move would put a file in the device's place, for every program on the machine.
        raise UserError(f"output {target} is a device or a pipe, not a file: name another")
    if kind is not None:
        _check_kind(target, kind)
    if exists and not overwrite:
        raise UserError(f"output {target} exists: name another, or pass --overwrite")
    if target.is_dir() and Path.cwd().is_relative_to(target.resolve()):
        raise UserError(f"output {target} holds the current folder: name one inside it")
    if marker and target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise UserError(f"output {target} holds something else: it has no {marker}; not replaced")
    ancestor = existing_folder(target)
    try:
        # Permission bits do not tell (root, read-only mounts, /proc): try, and leave no trace.
        with tempfile.TemporaryFile(dir=ancestor):
            pass
    except OSError as error:
        raise UserError(f"cannot write {target}: {ancestor}: {error.strerror}") from error
    return target


def expand(path: str | os.PathLike[str], what: str = "path") -> Path:
    """``path`` with the home folder for `~` and the environment's values for `$NAME`.

    Shells do so for a word's start alone: not in YAML, in quotes or behind an `=`.

    Args:
        path: As a user wrote it.
        what: How the message calls it.

    Raises:
        UserError: If it is empty, the environment has no such variable, or no such user's home is
            known.
    """
    text = os.path.expandvars(os.fspath(path))
    if not text.strip():
        raise UserError(f"{what} is empty: name a path; the current folder is .")
    if unset := re.search(r"\$(\w+|\{\w+\})", text):
        raise UserError(f"{what} is {os.fspath(path)}, but {unset[0]} is not set")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{what} is {os.fspath(path)}: {error}") from error


def check_outputs(
    outputs: Iterable[str | os.PathLike[str] | None],
    inputs: Iterable[str | os.PathLike[str] | None],
    way_out: str | None = None,
) -> None:
    """Check that no output is an input, holds one or lies in one, nor is another output.

    Symbolic links are followed. What is None is passed over.

    Args:
        outputs: What a command writes; nothing else of a folder is held to be at risk.
        inputs: What it reads. A folder is one piece: nothing may be written into it.
        way_out: What to do, where the outputs have no option each.

    Raises:
        UserError: Naming both.
    """
    targets = [Path(output) for output in outputs if output is not None]
    sources = [Path(source) for source in inputs if source is not None]
    for position, target in enumerate(targets):
        place = target.resolve()
        if place in [other.resolve() for other in targets[:position]]:
            raise UserError(f"two outputs would be written to {target}: name another for one")
        for source in sources:
            if source.resolve().is_relative_to(place):
                hint = way_out or "name another"
                raise UserError(f"output {target} would replace the input {source}: {hint}")
            if place.is_relative_to(source.resolve()):
                hint = way_out or "name a place outside"
                raise UserError(f"output {target} lies in the input {source}: {hint}")


@contextmanager
def write_beside(
    path: str | os.PathLike[str],
    overwrite: bool = False,
    kind: OutputKind | None = None,
    marker: str | None = None,
) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it into place when the block succeeds.

    The block writes a file or makes a folder there. If it raises, the temporary is removed and
    an earlier output stays as it was. Missing parent folders are made. A symbolic link stays: what
    it points to is written. Arguments as for :func:`check_output`.

    Raises:
        UserError: As :func:`check_output`, or if a file would take a folder's place or the other
            way round.
    """
    target = check_output(path, overwrite, kind, marker)
    if target.is_symlink():
        target = target.resolve()
    temporary = _beside(target, "partial")
    try:
        with disk_full_named(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _replace(temporary, target)
    finally:
        remove(temporary)


@contextmanager
def lock(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Hold the file ``path`` locked, so that one process at a time works on ``what``.

    A POSIX record lock: the kernel drops it when the process ends, however that ends, and a
    shared file system (NFS, Lustre) knows it on every machine. The file itself says who holds it.
    A process that holds it is not kept from taking it again, and gives it up with the first that
    ends: the kernel drops a process's lock with any file object that it closes.

    Raises:
        UserError: If another process holds it; says which.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a+", encoding="utf-8") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                stream.seek(0)
                holder = stream.read().strip() or "another process"
                raise UserError(
                    f"{what} is in use by {holder}: wait until that ends, or choose another"
                ) from error
            logger.warning(
                "%s cannot be locked (%s): see to it that nothing else works on it",
                what,
                error.strerror,
            )
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        try:
            yield
        finally:
            stream.truncate(0)


def lock_holder(path: str | os.PathLike[str]) -> str:
    """Who holds the lock on a file, as :func:`lock` words it; empty if nobody does.

    The lock is not touched. A file system whose machines do not know one another's locks shows
    those of this machine alone.
    """
    try:
        with Path(path).open(encoding="utf-8") as stream:
            # Linux's struct flock: type, whence, start, length, process.
            asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, *_ = struct.unpack("hhqqi4x", fcntl.fcntl(stream, fcntl.F_GETLK, asked))
            if kind == fcntl.F_UNLCK:
                return ""
            return stream.read().strip() or "another process"
    except OSError:
        return ""


def write_json(path: str | os.PathLike[str], data: Any, overwrite: bool = False) -> None:
    """Write ``data`` as indented JSON, lists of numbers on one line, by :func:`write_beside`."""
    text = _NUMBER_LIST.sub(_on_one_line, json.dumps(data, indent=1, allow_nan=False))
    with write_beside(path, overwrite) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(
    path: str | os.PathLike[str], kind: str | tuple[str, ...], schema_version: int
) -> dict[str, Any]:
    """Read a JSON object that says it is ``kind``, or one of several, of ``schema_version``.

    Raises:
        UserError: If the file is missing, no JSON object, of another kind or version.
    """
    source = Path(path)
    data: Any
    try:
        data = parse_json(source.read_text(encoding="utf-8-sig"))  # an editor may add the mark
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not valid JSON: {error}") from error
    found = data.get("kind") if isinstance(data, dict) else type(data).__name__
    kinds = (kind,) if isinstance(kind, str) else kind
    if not isinstance(data, dict) or found not in kinds:
        needed = " or ".join(map(repr, kinds))
        raise UserError(f"{source} holds {found!r}, but a file of kind {needed} is needed")
    if data.get("schema_version") != schema_version:
        raise UserError(
            f"{source} has schema version {data.get('schema_version')!r}; "
            f"this release reads version {schema_version}"
        )
    return data


def parse_json(text: str | bytes) -> Any:
    """Parse JSON as its standard has it: Python's reader also takes NaN, and the last of two keys.

    Raises:
        ValueError: For text that is no JSON, NaN, a number beyond double precision (1e999), or a
            key that stands twice in one object.
    """
    return json.loads(
        text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_no_repeats
    )


def short_name(name: str) -> str:
    """A file's name, or its hash (hex) where no ending could be put to it."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= _LONGEST_NAME_BYTES else hashlib.sha256(encoded).hexdigest()


def content_hash(files: Iterable[str | os.PathLike[str]]) -> str:
    """A hash (hex) of the files' names, sizes and contents, in the order of their names.

    Of a file above 64 MiB 1,024 evenly spaced blocks of 64 KiB are read, the first and the last
    bytes among them: two trainings of a model differ in every matrix, and a change of a few bytes
    may go unseen.

    Raises:
        UserError: If a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(map(Path, files), key=lambda path: path.name):
        try:
            with path.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                digest.update(f"{path.name} {size}\n".encode())
                for place in _hashed_places(size):
                    stream.seek(place)
                    digest.update(stream.read(_HASH_BLOCK_BYTES))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


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


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is too large")
    return value


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice in one object")
        found[key] = value
    return found


def _hashed_places(size: int) -> Iterable[int]:
    """Where in a file of ``size`` bytes the blocks that a hash reads begin."""
    if size <= _HASH_BLOCKS * _HASH_BLOCK_BYTES:
        return range(0, size, _HASH_BLOCK_BYTES)
    last = size - _HASH_BLOCK_BYTES
    return (last * index // (_HASH_BLOCKS - 1) for index in range(_HASH_BLOCKS))


def _check_kind(target: Path, kind: OutputKind) -> None:
    if target.exists() and target.is_dir() != (kind == "folder"):
        found = "folder" if target.is_dir() else "file"
        raise UserError(
            f"output {target} is a {found}, and a {kind} is to be written: name another"
        )


def _beside(target: Path, ending: str) -> Path:
    """A hidden name of this process in the same folder, which no file system finds too long."""
    return target.with_name(f".{short_name(target.name)}.{os.getpid()}.{ending}")


def _replace(temporary: Path, target: Path) -> None:
    _check_kind(target, "folder" if temporary.is_dir() else "file")
    if target.is_dir():
        # A folder cannot be renamed over a full one: step the old one aside, so that at every
        # moment one complete version exists on disk.
        old_folder = _beside(target, "old")
        os.replace(target, old_folder)
        os.replace(temporary, target)
        remove(old_folder)
    else:
        os.replace(temporary, target)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
