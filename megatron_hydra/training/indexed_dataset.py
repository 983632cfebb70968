"""Writes Megatron's indexed datasets (`PREFIX.bin`, `PREFIX.idx`) from token documents.

`PREFIX.json` beside them says how they came to be.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_hydra.errors import UserError
from megatron_hydra.files import check_output, parse_json, write_beside

_COUNTS = ("vocab_size", "num_documents", "num_tokens")
_MAX_DOCUMENT_TOKENS = 2**31 - 1
"""The index keeps a document's length in 32 bits."""


class EndOfDocument(NamedTuple):
    """The token that ends documents, and of how many it is the last."""

    token: str
    id: int
    num_documents: int


def write_indexed_dataset(
    prefix: str | Path,
    documents: Iterable[Sequence[int]],
    vocab_size: int,
    provenance: Mapping[str, Any],
    overwrite: bool = False,
    end_of_document: tuple[str, int] | None = None,
) -> tuple[int, int]:
    """Write documents, each in one piece; see :func:`write_pieces`."""
    pieces = ((document, True) for document in documents)
    return write_pieces(prefix, pieces, vocab_size, provenance, overwrite, end_of_document)


def write_pieces(
    prefix: str | Path,
    pieces: Iterable[tuple[Sequence[int] | np.ndarray, bool]],
    vocab_size: int,
    provenance: Mapping[str, Any],
    overwrite: bool = False,
    end_of_document: tuple[str, int] | None = None,
) -> tuple[int, int]:
    """Write `PREFIX.bin`, `PREFIX.idx` and `PREFIX.json`; all three appear when all are complete.

    Args:
        prefix: Path without ending.
        pieces: Token ids, running parts of documents; True where a document ends. A document
            without tokens is left out.
        vocab_size: The largest id that can occur, plus one; decides the integer type of a token.
        provenance: Plain JSON: how the documents came to be.
        overwrite: Replace an existing dataset.
        end_of_document: Text and id of the token that ends documents, noted for the training.

    Returns:
        Number of documents and of tokens.

    Raises:
        UserError: If the output exists or cannot be written, there is no document, or an id is
            outside the vocabulary.
    """
    overwrite = overwrite or _is_left_over(prefix)
    with ExitStack() as stack:
        # Moved into place in the opposite order, the index last: without it there is no dataset.
        index, tokens, notes = (
            stack.enter_context(write_beside(path, overwrite, kind="file"))
            for path in dataset_files(prefix)
        )
        writer = _Writer(tokens, vocab_size, end_of_document and end_of_document[1])
        with contextlib.closing(writer):
            for piece, is_end in pieces:
                writer.add(np.asarray(piece, np.int64), is_end)
            if writer.num_tokens == 0:
                raise UserError(f"nothing to write to {prefix}: the input has no tokens")
            writer.builder.finalize(str(index))
        counts = (vocab_size, writer.num_documents, writer.num_tokens)
        found: dict[str, Any] = {
            **dict(zip(_COUNTS, counts, strict=True)),
            "largest_token": writer.largest_token,
        }
        if end_of_document:
            end = EndOfDocument(*end_of_document, writer.num_ended)
            found["end_of_document"] = end._asdict()
        notes.write_text(
            json.dumps({**found, **provenance}, indent=1, allow_nan=False) + "\n",
            encoding="utf-8",
        )
        # An earlier index must never stand beside new tokens, even if this process is killed.
        dataset_files(prefix)[0].unlink(missing_ok=True)
    return writer.num_documents, writer.num_tokens


class _Writer:
    """Megatron's builder, fed with checked pieces of documents."""

    def __init__(self, tokens: Path, vocab_size: int, end: int | None) -> None:
        # Slow to import, and not needed to see whether a dataset may be written.
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.builder = IndexedDatasetBuilder(str(tokens), dtype=DType.optimal_dtype(vocab_size))
        self.num_documents = self.num_tokens = self.num_ended = 0
        self.largest_token = -1
        self._vocab_size, self._end = vocab_size, end
        self._length, self._last = 0, -1

    def add(self, piece: np.ndarray, is_end: bool) -> None:
        """Write a document's next tokens, and its length where it ends."""
        if len(piece):
            for token in (piece.min(), piece.max()):
                # The builder would cut it to the type's bits without a word.
                if not 0 <= token < self._vocab_size:
                    raise UserError(
                        f"document {self.num_documents} holds token {token}; allowed are 0 to "
                        f"{self._vocab_size - 1}"
                    )
            self.builder.data_file.write(piece.astype(self.builder.dtype).tobytes())
            self.largest_token = max(self.largest_token, int(piece.max()))
            self._length, self._last = self._length + len(piece), int(piece[-1])
        if is_end and self._length:
            self._end_document()

    def close(self) -> None:
        """Close the file, which a full disk has made useless already when it fails here."""
        with contextlib.suppress(OSError):
            self.builder.data_file.close()

    def _end_document(self) -> None:
        if self._length > _MAX_DOCUMENT_TOKENS:
            raise UserError(
                f"document {self.num_documents} has {self._length:,} tokens; at most "
                f"{_MAX_DOCUMENT_TOKENS:,} are possible: divide it"
            )
        self.builder.sequence_lengths.append(self._length)
        self.builder.end_document()
        self.num_documents, self.num_tokens = self.num_documents + 1, self.num_tokens + self._length
        self.num_ended += self._last == self._end
        self._length = 0


def dataset_files(prefix: str | Path) -> tuple[Path, Path, Path]:
    """The files of a dataset: index, tokens, provenance."""
    return Path(f"{prefix}.idx"), Path(f"{prefix}.bin"), Path(f"{prefix}.json")


def read_notes(prefix: str | Path) -> dict[str, Any] | None:
    """`PREFIX.json` as :func:`write_pieces` writes it; None where there is no such file.

    `largest_token` and `end_of_document` are None where an earlier release wrote it.

    Raises:
        UserError: If the file is damaged.
    """
    path = dataset_files(prefix)[2]
    try:
        notes = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}, which describes a dataset: {error}") from error
    if not isinstance(notes, dict) or not set(_COUNTS) <= set(notes):
        return None  # a file of the user's own
    notes.setdefault("largest_token", None)
    for name in (*_COUNTS, "largest_token"):
        is_old = name == "largest_token" and notes[name] is None
        if type(notes[name]) is not int and not is_old:
            raise UserError(f"{path} has {name} {notes[name]!r}; a whole number is needed")
    notes["end_of_document"] = _end_of_document(path, notes.get("end_of_document"))
    return notes


def _end_of_document(path: Path, noted: Any) -> EndOfDocument | None:
    if noted is None:
        return None
    try:
        end = EndOfDocument(**noted)
    except TypeError:
        end = EndOfDocument("", -1, -1)
    if [type(value) for value in end] != [str, int, int] or min(end[1:]) < 0:
        raise UserError(
            f"{path} has end_of_document {noted!r}; token, id and num_documents are needed"
        )
    return end


def check_dataset_output(prefix: str | Path, overwrite: bool) -> None:
    """Check that a dataset may be written, before any work is done.

    What a killed command has left, files of ours without an index, is no dataset and may go.

    Raises:
        UserError: If it exists and ``overwrite`` is False, or the folder cannot be written to.
    """
    overwrite = overwrite or _is_left_over(prefix)
    for path in dataset_files(prefix):
        check_output(path, overwrite, kind="file")


def _is_left_over(prefix: str | Path) -> bool:
    """Whether :func:`write_indexed_dataset` was killed after it had moved its first file."""
    index, _, notes = dataset_files(prefix)
    if index.exists() or not notes.is_file():
        return False
    try:
        return read_notes(prefix) is not None
    except UserError:
        return False  # no file of ours: those are moved when they are complete
