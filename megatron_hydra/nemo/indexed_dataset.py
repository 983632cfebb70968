"""Writes Megatron's indexed datasets (`PREFIX.bin`, `PREFIX.idx`) from token documents.

`PREFIX.json` beside them says how they came to be.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_hydra.errors import UserError
from megatron_hydra.files import check_output, write_beside

_COUNTS = ("vocab_size", "num_documents", "num_tokens")


def write_indexed_dataset(
    prefix: str | Path,
    documents: Iterable[Sequence[int]],
    vocab_size: int,
    provenance: Mapping[str, Any],
    overwrite: bool = False,
) -> tuple[int, int]:
    """Write `PREFIX.bin`, `PREFIX.idx` and `PREFIX.json`; all three appear when all are complete.

    Args:
        prefix: Path without ending.
        documents: Token ids, each document in one piece.
        vocab_size: Decides the integer type of a token.
        provenance: Plain JSON: how the documents came to be.
        overwrite: Replace an existing dataset.

    Returns:
        Number of documents and of tokens.

    Raises:
        UserError: If the output exists or cannot be written, or there is no document.
    """
    overwrite = overwrite or _is_left_over(prefix)
    with ExitStack() as stack:
        # Moved into place in the opposite order, the index last: without it there is no dataset.
        index, tokens, notes = (
            stack.enter_context(write_beside(path, overwrite, kind="file"))
            for path in dataset_files(prefix)
        )
        builder = IndexedDatasetBuilder(str(tokens), dtype=DType.optimal_dtype(vocab_size))
        num_documents = num_tokens = 0
        for document in documents:
            builder.add_document(torch.tensor(document), [len(document)])
            num_documents, num_tokens = num_documents + 1, num_tokens + len(document)
        if num_tokens == 0:
            raise UserError(f"nothing to write to {prefix}: the input has no tokens")
        builder.finalize(str(index))
        counts = dict(zip(_COUNTS, (vocab_size, num_documents, num_tokens), strict=True))
        notes.write_text(
            json.dumps({**counts, **provenance}, indent=1) + "\n",
            encoding="utf-8",
        )
        # An earlier index must never stand beside new tokens, even if this process is killed.
        dataset_files(prefix)[0].unlink(missing_ok=True)
    return num_documents, num_tokens


def dataset_files(prefix: str | Path) -> tuple[Path, Path, Path]:
    """The files of a dataset: index, tokens, provenance."""
    return Path(f"{prefix}.idx"), Path(f"{prefix}.bin"), Path(f"{prefix}.json")


def read_notes(prefix: str | Path) -> dict[str, Any] | None:
    """`PREFIX.json` as :func:`write_indexed_dataset` writes it; None where there is no such file.

    Raises:
        UserError: If the file is damaged.
    """
    path = dataset_files(prefix)[2]
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}, which describes a dataset: {error}") from error
    if not isinstance(notes, dict) or not set(_COUNTS) <= set(notes):
        return None  # a file of the user's own
    for name in _COUNTS:
        if type(notes[name]) is not int:
            raise UserError(f"{path} has {name} {notes[name]!r}; a whole number is needed")
    return notes


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


def read_texts(path: str | Path, end_of_text: str | None) -> Iterator[str]:
    """The documents of a `.jsonl` file (its `text` fields) or of a text file.

    A text file is one document, or several where ``end_of_text`` stands between them.

    Raises:
        UserError: If the file cannot be read, is empty, or a line is no such object.
    """
    path = Path(path)
    texts = _json_texts(path) if path.suffix == ".jsonl" else _plain_texts(path, end_of_text)
    is_empty = True
    try:
        for text in texts:
            is_empty = is_empty and not text.strip()
            yield text
    except OSError as error:
        raise UserError(f"cannot read the text file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the text file {path} is not UTF-8: {error}") from error
    if is_empty:
        raise UserError(f"the text file {path} is empty")


def _plain_texts(path: Path, end_of_text: str | None) -> Iterator[str]:
    content = path.read_text(encoding="utf-8")
    yield from content.split(end_of_text) if end_of_text else [content]


def _json_texts(path: Path) -> Iterator[str]:
    # Only a line feed ends a line: JSON strings may hold U+2028 and other line separators.
    with path.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            text = _json_text(line)
            if text is None:
                raise UserError(f'line {number} of {path} is no JSON object with a "text" string')
            yield text


def _json_text(line: str) -> str | None:
    """The object's text; None if there is none, or it holds half a character (a surrogate)."""
    try:
        text = json.loads(line)["text"]
        if isinstance(text, str):
            text.encode()
            return text
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return None
