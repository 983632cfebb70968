"""Text files of every kind that a user may name, read as documents: the one reader of all verbs.

Plain text, JSON lines and parquet, compressed or not; memory does not grow with a file's size.
"""

from __future__ import annotations

import argparse
import codecs
import glob
import gzip
import io
import json
import logging
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from megatron_hydra.errors import UserError
from megatron_hydra.tasks.broken_lines import BrokenLines

logger = logging.getLogger(__name__)

TextFormat = Literal["auto", "text", "jsonl", "parquet"]

_FORMATS = {
    ".txt": "text", ".text": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
_COMPRESSED = (".gz", ".zst")
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_TAR_PLACE = 257
# How files begin that hold text, but are none; many a tar passes for UTF-8.
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf": "a 7z archive", b"%PDF-": "a PDF document",
    b"\xfd7zXZ\x00": "compressed by xz", b"BZh91AY&SY": "compressed by bzip2",
}  # fmt: skip
_JSON_OBJECT = re.compile(r'\s*(\[\s*)?\{\s*"(?:[^"\\]|\\.)*"\s*:')
_PIECE_CHARACTERS = 2**18
_HEAD_BYTES = 2**16
_BATCH_ROWS = 256
_CHECKED_FILES = 100
"""Files that are looked into before the work starts; each is checked again when it is read."""


class Piece(NamedTuple):
    """A running part of a document's text, and whether the document ends with it."""

    text: str
    is_end: bool


@dataclass(frozen=True)
class TextOptions:
    """How files are read.

    Attributes:
        key: Field of a JSON line, or column of a parquet file, that holds the text.
        format: `auto` goes by a file's name: `.jsonl`, `.ndjson`, `.json` and `.parquet` are what
            they say, all else is plain text.
    """

    key: str = "text"
    format: TextFormat = "auto"


FILES_HELP = (
    "files, folders or quoted patterns, read in the order given, those of a folder or pattern in "
    "the order of their names; plain text or JSON lines (.jsonl, .ndjson, .json), also as .gz or "
    ".zst, or .parquet"
)


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of :class:`TextOptions`, which :func:`text_options` reads."""
    parser.add_argument(
        "--text-key",
        metavar="KEY",
        default="text",
        help="field or column of the text in JSON lines and parquet (default: text)",
    )
    parser.add_argument(
        "--text-format",
        choices=("auto", "text", "jsonl", "parquet"),
        default="auto",
        help="what the files hold (default: auto, by their names)",
    )


def text_options(args: argparse.Namespace) -> TextOptions:
    """What :func:`add_text_options` has read."""
    return TextOptions(args.text_key, args.text_format)


def find_texts(names: Iterable[str | os.PathLike[str]], options: TextOptions) -> list[Path]:
    """The files that files, folders and patterns name, each once; none of them is read yet.

    Names keep their order; the files of a folder, with those of its folders, and of a pattern are
    sorted by their paths. Hidden files are left out, in a folder also files of other types.

    Raises:
        UserError: If a file is missing or not what ``options`` say, or a folder or pattern holds
            none.
    """
    found: dict[Path, Path] = {}
    for name in names:
        for path in _expand(Path(name)):
            found.setdefault(path.resolve(), path)
    files = list(found.values())
    for path in files[:_CHECKED_FILES]:
        _check_start(path, options)
    return files


def read_pieces(
    files: Sequence[Path],
    options: TextOptions,
    separator: str | None = None,
    advance: Callable[[int], object] | None = None,
    broken: BrokenLines | None = None,
) -> Iterator[Piece]:
    """The documents of files, in pieces.

    A plain text file is one document, or several where ``separator`` stands between them; a JSON
    line or a row is one. A byte-order mark is dropped.

    Args:
        files: As :func:`find_texts` returns them.
        options: How they are read.
        separator: Text between the documents of a plain text file.
        advance: Called with the number of bytes read from disk since the call before.
        broken: Counts JSON lines and rows without a text, and says how many may be left out; None:
            the first ends the reading.

    Raises:
        UserError: If a file cannot be read or is not what its name says, naming file and line;
            or if all of them are empty.
    """
    is_empty, broken = True, broken or BrokenLines()
    for path in files:
        for piece in _read(path, options, separator, advance, broken):
            is_empty = is_empty and not piece.text.strip()
            yield piece
    if is_empty:
        raise UserError(
            f"the text file {files[0]} is empty"
            if len(files) == 1
            else f"all {len(files)} text files are empty, from {files[0]} to {files[-1]}"
        )


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        return _files_below(path)
    if not path.exists() and glob.has_magic(str(path)):
        matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not matches:
            raise UserError(f"no file matches the pattern {path}")
        return [file for match in matches for file in _expand(match)]
    with _said(path):
        path.stat()
    return [path]


def _files_below(folder: Path) -> list[Path]:
    found: list[Path] = []
    others: list[Path] = []
    seen = {folder.resolve()}
    for parent, folders, names in os.walk(folder, followlinks=True):
        # Corpora are put together of links to folders; one may lead back up, or be there twice.
        places = {name: Path(parent, name).resolve() for name in sorted(folders) if name[0] != "."}
        folders[:] = [name for name, place in places.items() if place not in seen]
        seen.update(places.values())
        for name in names:
            if not name.startswith("."):
                is_text = _bare_suffix(Path(name)) in _FORMATS
                (found if is_text else others).append(Path(parent, name))
    if not found:
        raise UserError(
            f"the folder {folder} holds no text: files ending in {', '.join(_FORMATS)} are read, "
            f"the first also with {' or '.join(_COMPRESSED)} after it"
        )
    if others:
        logger.warning(
            "%s: %d files of other types are not read, %s the first", folder, len(others),
            min(others).relative_to(folder),
        )  # fmt: skip
    return sorted(found)


def _check_start(path: Path, options: TextOptions) -> None:
    with _said(path):
        if stat.S_ISREG(path.stat().st_mode):  # a pipe can be read once only
            with _open(path) as stream:
                _kind(path, stream.peek(_HEAD_BYTES), options)


def _bare_suffix(path: Path) -> str:
    """The suffix in small letters, of a compressed file the one before."""
    path = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    return path.suffix.lower()


def _kind(path: Path, head: bytes, options: TextOptions) -> str:
    """What the file holds; UserError if its beginning is another thing."""
    kind: str = options.format
    if kind == "auto":
        kind = _FORMATS.get(_bare_suffix(path), "text")
        if head.startswith(_PARQUET):
            kind = "parquet"
    if kind == "parquet" and not head.startswith(_PARQUET):
        raise UserError(f"{path} is no parquet file")
    if what := _archive(head):
        raise UserError(f"{path} is {what}, not text: unpack it, and name the text in it")
    start = head.decode("utf-8-sig", "ignore")
    match = _JSON_OBJECT.match(start)
    if kind == "text" and match and options.format == "auto":
        raise UserError(
            f"the text file {path} starts with a JSON object: pass --text-format jsonl (or name it "
            ".jsonl) for the text in each line's object, --text-format text to take it as it stands"
        )
    if kind == "jsonl" and start.lstrip().startswith("["):
        raise UserError(
            f"{path} is one JSON array, not JSON lines: put one object on each line, as "
            f"jq -c '.[]' {path} does"
        )
    return kind


def _archive(head: bytes) -> str | None:
    """What kind of archive or document begins like this, if any does."""
    if head[_TAR_PLACE:].startswith(b"ustar"):
        return "a tar archive"
    return next((what for start, what in _ARCHIVES.items() if head.startswith(start)), None)


def _read(
    path: Path,
    options: TextOptions,
    separator: str | None,
    advance: Callable[[int], object] | None,
    broken: BrokenLines,
) -> Iterator[Piece]:
    with _said(path), _open(path, advance) as stream:
        kind = _kind(path, stream.peek(_HEAD_BYTES), options)
        if kind == "parquet":
            yield from _rows(path, options.key, advance, broken)
        elif kind == "jsonl":
            yield from _json_lines(path, stream, options.key, broken)
        else:
            yield from _split(_parts(stream), separator)


class _Counted(io.FileIO):
    """A file that tells of the bytes read from it."""

    advance: Callable[[int], object] | None = None

    def readinto(self, buffer: Any) -> int | None:
        num_bytes = super().readinto(buffer)
        if self.advance and num_bytes:
            self.advance(num_bytes)
        return num_bytes


@contextmanager
def _open(
    path: Path, advance: Callable[[int], object] | None = None
) -> Iterator[io.BufferedReader]:
    """The file's bytes, uncompressed whatever its name."""
    with _Counted(path) as raw:
        raw.advance = advance
        stream: Any = io.BufferedReader(raw, _HEAD_BYTES)
        head = stream.peek(len(_ZSTD))
        if head.startswith(_GZIP):
            stream = io.BufferedReader(gzip.GzipFile(fileobj=stream), _HEAD_BYTES)
        elif head.startswith(_ZSTD):
            arrow = _arrow("", path)
            source = arrow.CompressedInputStream(arrow.PythonFile(stream, "r"), "zstd")
            stream = io.BufferedReader(source, _HEAD_BYTES)
        yield stream


@contextmanager
def _said(path: Path) -> Iterator[None]:
    """Say in a sentence what goes wrong with a file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"the text file {path} is not UTF-8: {error}") from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"the compressed file {path} is cut off or damaged: {error}") from error
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot read the text file {path}: {reason}") from error


def _parts(stream: BinaryIO) -> Iterator[str]:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig")
    while part := text.read(_PIECE_CHARACTERS):
        yield part


def _split(parts: Iterable[str], separator: str | None) -> Iterator[Piece]:
    """Documents between separators; a separator may lie across two parts."""
    rest = ""
    kept = len(separator) - 1 if separator else 0
    for part in parts:
        *documents, rest = (rest + part).split(separator) if separator else [rest + part]
        yield from (Piece(document, True) for document in documents)
        cut = max(0, len(rest) - kept)
        if cut:
            yield Piece(rest[:cut], False)
            rest = rest[cut:]
    yield Piece(rest, True)


def _json_lines(path: Path, stream: BinaryIO, key: str, broken: BrokenLines) -> Iterator[Piece]:
    # As bytes, so that only a line feed ends a line (JSON strings may hold U+2028 and other line
    # separators), and a byte that is no UTF-8 spoils its own line alone.
    for number, line in enumerate(stream, start=1):
        if not (line := line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip():
            continue
        text = broken.attempt(path, number, partial(_json_text, line, key))
        if text is not None:
            yield Piece(text, True)


def _json_text(line: bytes, key: str, place: str) -> str:
    try:
        data = json.loads(line.decode().rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos + 1}"
        raise UserError(f"{place} is no JSON object: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is no JSON object that can be read: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{place} is no JSON object, but a {type(data).__name__}")
    if key not in data:
        raise UserError(_no_key(place, key, data))
    return _checked(data[key], key, place)


def _no_key(place: str, key: str, keys: Iterable[str]) -> str:
    return (
        f'{place} has no "{key}", but {", ".join(map(str, keys)) or "nothing"}: name the one to '
        "read with --text-key (when scoring: probes.text_key)"
    )


def _checked(text: Any, key: str, place: str) -> str:
    if not isinstance(text, str):
        raise UserError(f'{place} has {text!r:.40} as "{key}"; a text is needed')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f'{place} has half a character (a surrogate) in "{key}"') from error
    return text


def _rows(
    path: Path, key: str, advance: Callable[[int], object] | None, broken: BrokenLines
) -> Iterator[Piece]:
    arrow = _arrow("parquet", path)
    try:
        with arrow.ParquetFile(path) as file:
            if key not in file.schema_arrow.names:
                raise UserError(_no_key(str(path), key, file.schema_arrow.names))
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[key]):
                for row in batch.column(0).to_pylist():
                    number += 1
                    text = broken.attempt(path, number, partial(_checked, row, key), "row")
                    if text is not None:
                        yield Piece(text, True)
                if advance:
                    advance(path.stat().st_size * batch.num_rows // file.metadata.num_rows)
    except _arrow("", path).ArrowException as error:
        raise UserError(f"cannot read the parquet file {path}: {error}") from error


def _arrow(module: str, path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs the package pyarrow: pip install pyarrow") from error
    return pyarrow.parquet if module else pyarrow
