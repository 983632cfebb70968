"""`preprocess`: text, with or without retrieval, to a Megatron indexed dataset."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hydra.disk import check_space
from megatron_hydra.errors import UserError
from megatron_hydra.files import check_outputs
from megatron_hydra.progress import Progress, no_progress
from megatron_hydra.provenance import origin
from megatron_hydra.tasks.broken_lines import BrokenLines
from megatron_hydra.tasks.text_files import TextOptions, find_texts, read_pieces
from megatron_hydra.teachers.tokenizer import find_tokenizer, load_tokenizer
from megatron_hydra.training.indexed_dataset import check_dataset_output, dataset_files

logger = logging.getLogger(__name__)

_LEAST_TOKEN_BYTES = 2

Pieces = Iterator[tuple[np.ndarray, bool]]


@dataclass(frozen=True)
class Retrieval:
    """Documents of one length, some of which ask for what they said before.

    Attributes:
        fraction: Share of retrieval documents, 0 to 1.
        seq_length: Tokens per document.
        num_documents: How many.
        seed: Of the draws.
    """

    fraction: float
    seq_length: int
    num_documents: int
    seed: int = 0


@dataclass(frozen=True)
class Source:
    """Where the text comes from, and how it is read.

    Attributes:
        texts: Files, folders or patterns; empty for Python's documentation.
        text_options: How they are read.
        end_of_document: Token after each document, at which a plain text file is divided too; None
            for `<|endoftext|>` or `<|end_of_text|>` where the tokenizer has it, else its eos_token.
        special_tokens_as_text: Take special tokens that are spelt in the text for text, and each
            plain text file for one document.
        max_broken_lines: So many JSON lines and parquet rows without a text are left out, of all
            files together; the next one is an error.
    """

    texts: tuple[str, ...] = ()
    text_options: TextOptions = field(default_factory=TextOptions)
    end_of_document: str | None = None
    special_tokens_as_text: bool = False
    max_broken_lines: int = 0


@dataclass(frozen=True)
class Dataset:
    """What was written.

    Attributes:
        prefix: Of its files.
        num_documents: How many.
        num_tokens: Of all.
        broken: The lines that were left out.
    """

    prefix: Path
    num_documents: int
    num_tokens: int
    broken: BrokenLines


def preprocess(
    tokenizer: Path,
    out: Path,
    source: Source = Source(),
    retrieval: Retrieval | None = None,
    *,
    num_processes: int = 1,
    overwrite: bool = False,
    progress: Progress = no_progress,
    on_bytes: Callable[[int, int], object] = lambda num, total: None,
    tell: Callable[[str], None] = logger.info,
) -> Dataset:
    """Write a dataset that training reads.

    Args:
        tokenizer: Folder of a tokenizer, model or checkpoint.
        out: Prefix of the files.
        source: The text.
        retrieval: Make documents of one length of it; None takes each text for a document.
        num_processes: That tokenise; the dataset is the same for any number.
        overwrite: Replace an existing dataset.
        progress: Shows how many retrieval documents are made.
        on_bytes: Told how many more bytes of the texts are read, and how many there are; 0 where
            that is unknown.
        tell: Gets a line on the text that is read.

    Raises:
        UserError: For a text or tokenizer that cannot be used, or an output that is in the way.
    """
    files = find_texts(source.texts, source.text_options)
    if retrieval is not None:
        _check_retrieval(retrieval)
    if num_processes < 1:
        raise UserError(f"the number of processes is {num_processes}; it must be 1 or more")
    if source.max_broken_lines < 0:
        raise UserError(f"--max-broken-lines is {source.max_broken_lines}; it must be 0 or more")
    check_outputs(dataset_files(out), (*source.texts, *files, tokenizer))
    check_dataset_output(out, overwrite)
    find_tokenizer(tokenizer)
    if retrieval is not None:
        num_tokens = retrieval.num_documents * retrieval.seq_length
        check_space(out, num_tokens * _LEAST_TOKEN_BYTES)
    if files:
        name = files[0] if len(files) == 1 else f"{len(files)} files"
        tell(f"text: {name}, {sum(path.stat().st_size for path in files) / 2**20:,.1f} MiB")
    from megatron_hydra import cpu

    cpu.install_if_needed()
    from megatron_hydra.teachers.encoding import encode_pieces
    from megatron_hydra.teachers.token_ids import end_of_document, num_token_ids
    from megatron_hydra.training.indexed_dataset import write_pieces

    loaded = load_tokenizer(tokenizer)
    end = end_of_document(loaded, source.end_of_document)

    def encode(texts: Any) -> Pieces:
        return encode_pieces(loaded, texts, source.special_tokens_as_text, num_processes)

    broken = BrokenLines(source.max_broken_lines)
    if retrieval is None:
        pieces = _plain_documents(source, files, broken, encode, end, on_bytes)
    else:
        pieces = _mixed_documents(
            source, files, broken, encode, end[1], loaded, retrieval, progress
        )
    # The broken lines are written when all is read.
    seed = 0 if retrieval is None else retrieval.seed
    provenance = origin(seed=seed, broken_lines=broken.found)
    counts = write_pieces(out, pieces, num_token_ids(loaded), provenance, overwrite, end)
    return Dataset(out, *counts, broken)


def _check_retrieval(retrieval: Retrieval) -> None:
    if not 0.0 <= retrieval.fraction <= 1.0:
        raise UserError(f"the retrieval fraction is {retrieval.fraction}; allowed: 0 to 1")
    for name, value in (
        ("sequence length", retrieval.seq_length),
        ("number of documents", retrieval.num_documents),
    ):
        if value < 1:
            raise UserError(f"the {name} is {value}; it must be 1 or more")


def _plain_documents(
    source: Source,
    files: Sequence[Path],
    broken: BrokenLines,
    encode: Callable[[Any], Pieces],
    end: tuple[str, int],
    on_bytes: Callable[[int, int], object],
) -> Pieces:
    """Each text with the end-of-document token after it."""
    separator = None if source.special_tokens_as_text else end[0]
    total = sum(path.stat().st_size for path in files)  # nothing is known of a pipe's size
    texts = (
        read_pieces(files, source.text_options, separator, lambda num: on_bytes(num, total), broken)
        if files
        else iter([(_local_text(), True)])
    )
    last = None
    for tokens, is_end in encode(texts):
        last = tokens[-1] if len(tokens) else last
        is_open = is_end and last not in (None, end[1])  # else empty, or it has its end
        yield (np.append(tokens, end[1]) if is_open else tokens), is_end
        last = None if is_end else last


def _mixed_documents(
    source: Source,
    files: Sequence[Path],
    broken: BrokenLines,
    encode: Callable[[Any], Pieces],
    end: int,
    tokenizer: Any,
    retrieval: Retrieval,
    progress: Progress,
) -> Pieces:
    """Documents of equal length, so that training samples and documents coincide."""
    from megatron_hydra.tasks.text import read_text, split_held_out
    from megatron_hydra.tasks.training_documents import (
        make_text_document,
        make_training_document,
    )

    text = read_text(files, source.text_options, broken=broken) if files else _local_text()
    pieces = [tokens for tokens, _ in encode([(text, True)])]
    tokens, _ = split_held_out(np.concatenate(pieces).tolist())
    rng, length = random.Random(retrieval.seed), retrieval.seq_length
    for _ in progress(range(retrieval.num_documents), "documents", "document"):
        if rng.random() < retrieval.fraction:
            document = make_training_document(rng, tokenizer, tokens, length, end=end)
        else:
            document = make_text_document(rng, tokens, length, end)
        yield np.array(document.tokens), True


def _local_text() -> str:
    from megatron_hydra.tasks.text import stand_in_text

    return stand_in_text("--input")
