"""What a long command but a training has finished so far, beside its output, to go on from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from megatron_hydra.disk import disk_full_named
from megatron_hydra.errors import UserError
from megatron_hydra.files import lock, parse_json, remove, short_name, write_json
from megatron_hydra.schema import flat

_RECORD, _LOCK = "run.json", ".lock"
_HALF_WRITTEN = r"\..*\.\d+\.partial"


class UnfinishedWork:
    """The folder ``OUT.partial``; what a unit of work is, and how it is written, its users say.

    Args:
        out: The output.
        fingerprint: JSON values that make two runs the same; a folder of another run is refused.
        start_anew: Whether units of an earlier run are to go.
    """

    what: ClassVar[str]
    """As messages call the unfinished work."""
    writer: ClassVar[str]
    """As messages call what writes such a folder."""
    units: ClassVar[str]
    """A pattern of the names of the units' files or folders."""
    words: ClassVar[Mapping[str, str]] = {}
    """How a message calls what makes two runs the same, where its key would not be understood."""

    def __init__(self, out: Path, fingerprint: Mapping[str, Any], start_anew: bool = False) -> None:
        self.path = _folder(out)
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.start_anew = start_anew
        self._lock = ExitStack()

    def open(self) -> None:
        """Make the folder, or check that it is of the same run; for one rank.

        It is locked until :meth:`remove` or the end of the process.

        Raises:
            UserError: If it is in use, of another run, or holds what no run has written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(
                f"{self.path} is a file, and unfinished results would go there: move it, or name "
                "another output"
            )
        if foreign := sorted(p.name for p in self._entries() if not self._is_own(p.name)):
            raise UserError(
                f"{self.path} holds {foreign[0]}, which no {self.writer} wrote, and unfinished "
                "results would go there: move it, or name another output"
            )
        self._lock.enter_context(lock(self.path / _LOCK, f"the unfinished {self.what} {self.path}"))
        try:
            self._begin()
        except UserError:
            self._lock.close()
            raise

    def remove(self) -> None:
        """Delete the folder; for the rank that opened it."""
        self._remove_units()
        (self.path / _LOCK).unlink(missing_ok=True)
        self._lock.close()
        with suppress(OSError):  # something else has come to lie there
            self.path.rmdir()

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Around the work of one rank: goes on if it is killed, leaves nothing if it fails."""
        with disk_full_named(self.path):
            self.open()
        try:
            with disk_full_named(self.path):
                yield
        except Exception:
            self.remove()
            raise
        self.remove()

    def parsed(self, name: str) -> dict[str, Any]:
        """The JSON object in one of the folder's files; UserError if it holds none."""
        path = self.path / name
        try:
            found = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}, of an unfinished {self.what}: {error}") from error
        if not isinstance(found, dict):
            raise UserError(f"cannot read {path}, of an unfinished {self.what}: it holds no object")
        return found

    def _begin(self) -> None:
        for path in self._entries():
            if re.fullmatch(_HALF_WRITTEN, path.name):  # by a process that was killed
                remove(path)
        if self.start_anew or not (self.path / _RECORD).is_file():
            self._remove_units()  # of a run that was killed as it began, if there are any
            write_json(self.path / _RECORD, self.fingerprint)
            return
        found, own = (
            {key: value for key, value in flat(record) if value != {}}
            for record in (self.parsed(_RECORD), self.fingerprint)
        )
        for key in {**found, **own}:
            if found.get(key) != own.get(key):
                raise UserError(
                    f"{self.path} holds an unfinished {self.what} with another "
                    f"{self.words.get(key, key)}: run that to its end, name another output, or "
                    "pass --overwrite to leave what it measured"
                )

    def _entries(self) -> list[Path]:
        return list(self.path.iterdir()) if self.path.is_dir() else []

    def _is_own(self, name: str) -> bool:
        return name in (_RECORD, _LOCK) or any(
            re.fullmatch(pattern, name) for pattern in (self.units, _HALF_WRITTEN)
        )

    def _remove_units(self) -> None:
        for path in self._entries():
            if self._is_own(path.name) and path.name != _LOCK:
                remove(path)


def num_finished(out: Path) -> int:
    """How many units of an output that is not there yet are finished."""
    names = (path.name for path in _folder(out).glob("[!.]*"))
    return sum(name != _RECORD for name in names)


def num_bytes_kept(out: Path) -> int:
    """What the unfinished work of an output takes of the disk, half-written units not counted."""
    units = _folder(out).glob("[!.]*")
    with suppress(FileNotFoundError):  # another process is at work there, which `open` refuses
        return sum(p.stat().st_blocks * 512 for unit in units for p in (unit, *unit.glob("*")))
    return 0


def forget_unfinished(out: Path) -> None:
    """Have the next run of an output begin anew, whatever another has left of it."""
    (_folder(out) / _RECORD).unlink(missing_ok=True)


def _folder(out: Path) -> Path:
    # Beside what a link points to: finished files are moved, which only one file system can do.
    place = out.resolve() if out.is_symlink() else out
    return place.with_name(f"{short_name(place.name)}.partial")
