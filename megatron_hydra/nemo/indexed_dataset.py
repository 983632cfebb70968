"""Writes Megatron's indexed datasets (`PREFIX.bin`, `PREFIX.idx`) from token documents."""

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
    with ExitStack() as stack:
        # Moved into place in the opposite order, the index last: without it there is no dataset.
        index, tokens, notes = (
            stack.enter_context(write_beside(path, overwrite)) for path in dataset_files(prefix)
        )
        builder = IndexedDatasetBuilder(str(tokens), dtype=DType.optimal_dtype(vocab_size))
        num_documents = num_tokens = 0
        for document in documents:
            builder.add_document(torch.tensor(document), [len(document)])
            num_documents, num_tokens = num_documents + 1, num_tokens + len(document)
        if num_tokens == 0:
            raise UserError(f"nothing to write to {prefix}: the input has no tokens")
        builder.finalize(str(index))
        counts = {"num_documents": num_documents, "num_tokens": num_tokens}
        notes.write_text(
            json.dumps({"vocab_size": vocab_size, **counts, **provenance}, indent=1) + "\n",
            encoding="utf-8",
        )
    return num_documents, num_tokens


def dataset_files(prefix: str | Path) -> tuple[Path, Path, Path]:
    """The files of a dataset: index, tokens, provenance."""
    return Path(f"{prefix}.idx"), Path(f"{prefix}.bin"), Path(f"{prefix}.json")


def check_dataset_output(prefix: str | Path, overwrite: bool) -> None:
    """Check that a dataset may be written, before any work is done.

    Raises:
        UserError: If it exists and ``overwrite`` is False, or the folder cannot be written to.
    """
    for path in dataset_files(prefix):
        check_output(path, overwrite)


def read_texts(path: str | Path, end_of_text: str | None) -> Iterator[str]:
    """The documents of a `.jsonl` file (its `text` fields) or of a text file.

    A text file is one document, or several where ``end_of_text`` stands between them.

    Raises:
        UserError: If the file cannot be read, is empty, or a line is no such object.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the text file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the text file {path} is not UTF-8: {error}") from error
    if not content.strip():
        raise UserError(f"the text file {path} is empty")
    if path.suffix == ".jsonl":
        return _read_lines(path, content)
    return iter(content.split(end_of_text) if end_of_text else [content])


def _read_lines(path: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'line {number} of {path} is no JSON object with a "text" field'
            ) from error
