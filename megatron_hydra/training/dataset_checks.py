"""Reads Megatron's indexed datasets without Megatron, and checks that a run can train on them."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_hydra.errors import UserError
from megatron_hydra.training.config import DataSection, RunConfig
from megatron_hydra.training.indexed_dataset import dataset_files, read_notes

# Magic and version, the type of a token, the number of sequences and of documents. Then follow
# the sequences' lengths (int32) and places (int64), and each document's first sequence (int64).
_INDEX_HEADER = struct.Struct("<17sBQQ")
_INDEX_START = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1)
# Megatron's codes of the types that a token may have; 6 and 7 are floating point.
_INTEGER_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_SCANNED_TOKENS = 2**24
"""Tokens of a dataset that are looked at in one go."""


def check_all_datasets(config: RunConfig, vocab_size: int) -> None:
    """As :func:`check_datasets`, of what a run trains on and of what it holds out.

    Raises:
        UserError: On the first that is wrong, or if less is held out than is asked for.
    """
    check_datasets(config.data, vocab_size)
    _check_up_sampling(config.data)
    held_out = config.data.validation
    if not held_out.paths:
        return
    check_datasets(held_out, vocab_size)
    num_samples = config.trainer.validation_steps * held_out.global_batch_size
    there = sum((len(read_tokens(path)) - 1) // held_out.seq_length for path in held_out.paths)
    if there < num_samples:
        raise UserError(
            f"trainer.validation_steps {config.trainer.validation_steps} takes {num_samples:,} "
            f"samples, but data.validation_paths hold {there:,}: choose fewer steps or more text"
        )


def check_datasets(section: DataSection, vocab_size: int) -> None:
    """Check that every dataset is there and whole, long enough, and made for this vocabulary.

    Raises:
        UserError: On the first that is not.
    """
    for path in section.paths:
        try:
            tokens = read_tokens(path)
        except OSError as error:
            raise UserError(f"cannot read the dataset {path}: {error.strerror}") from error
        if len(tokens) < section.seq_length + 1:
            raise UserError(
                f"data.seq_length is {section.seq_length}, but the dataset {path} has "
                f"{len(tokens)} tokens: at least data.seq_length + 1 are needed"
            )
        _check_vocabulary(path, tokens, vocab_size)


def read_tokens(prefix: str) -> np.ndarray:
    """All tokens of the indexed dataset ``prefix``, mapped from disk.

    Raises:
        UserError: If one of its two files is missing, cut off, or no such dataset.
    """
    index, tokens, _ = dataset_files(prefix)
    for file in (index, tokens):
        if not file.is_file():
            bare = re.sub(r"\.(bin|idx)$", "", prefix)
            way_out = f"name its prefix, {bare}" if bare != prefix else "see preprocess --help"
            raise UserError(f"no indexed dataset {prefix}: {file} is missing; {way_out}")
    dtype, lengths = _read_index(index)
    num_tokens = int(lengths.sum(dtype=np.int64))
    if tokens.stat().st_size != num_tokens * dtype.itemsize:
        raise UserError(
            f"{tokens} has {tokens.stat().st_size:,} bytes, but {index} tells of {num_tokens:,} "
            f"tokens of {dtype.itemsize} bytes: write the dataset anew"
        )
    return np.memmap(tokens, dtype, "r") if num_tokens else np.empty(0, dtype)


def document_lengths(prefix: str) -> np.ndarray:
    """Tokens of each document of a dataset that :func:`check_datasets` has passed.

    int32 `[num_documents]`, mapped from disk. A document is what Megatron deals as one: where
    another tool divided documents into sequences, each of these.
    """
    return _read_index(dataset_files(prefix)[0])[1]


def _read_index(index: Path) -> tuple[np.dtype, np.ndarray]:
    """The type of a token, and the tokens of each sequence."""
    with index.open("rb") as stream:
        header = stream.read(_INDEX_HEADER.size)
    if not header.startswith(_INDEX_START) or len(header) < _INDEX_HEADER.size:
        raise UserError(f"{index} is no index of a Megatron dataset")
    _, code, num_sequences, num_documents = _INDEX_HEADER.unpack(header)
    if code not in _INTEGER_TYPES:
        raise UserError(f"{index} says that tokens are of type {code}, which is no integer type")
    dtype = np.dtype(_INTEGER_TYPES[code])
    if index.stat().st_size < len(header) + 12 * num_sequences + 8 * num_documents:
        raise UserError(f"{index} is cut off: write the dataset anew")
    if num_sequences == 0:
        return dtype, np.empty(0, np.int32)
    return dtype, np.memmap(index, "<i4", "r", offset=len(header), shape=(num_sequences,))


def _check_up_sampling(section: DataSection) -> None:
    """Check that there are long documents, and others beside which they can be seen more often."""
    least = section.long_document_tokens
    if least is None:
        return
    ends = [(int(lengths.min()), int(lengths.max())) for lengths in
            map(document_lengths, section.paths)]  # fmt: skip
    longest = max(end for _, end in ends)
    said = f"data.long_document_tokens is {least}"
    if longest < least:
        raise UserError(
            f"{said}, but the longest document of data.paths has {longest} tokens: choose a "
            "smaller number, or text with longer documents"
        )
    if min(start for start, _ in ends) >= least:
        raise UserError(
            f"{said}, but all documents of data.paths are that long or longer: seeing all of them "
            "more often changes nothing"
        )
    if section.weights and not any(start < least <= end for start, end in ends):
        raise UserError(
            f"{said}, but no dataset has both longer and shorter documents, and data.weights fix "
            "how often each dataset is seen: change data.weights instead"
        )


def _check_vocabulary(path: str, tokens: np.ndarray, vocab_size: int) -> None:
    notes = read_notes(path)
    if notes is not None:
        if notes["num_tokens"] != len(tokens):
            raise UserError(
                f"{dataset_files(path)[2]} tells of {notes['num_tokens']:,} tokens, but the "
                f"dataset {path} has {len(tokens):,}: write it anew, or remove the notes of another"
            )
        if notes["vocab_size"] > vocab_size:
            raise UserError(
                f"the dataset {path} was made with a tokenizer whose ids go up to "
                f"{notes['vocab_size'] - 1}, but the model has {vocab_size} tokens"
            )
        if notes["largest_token"] is not None:
            return
    # What another tool or an earlier release has written does not say what it holds; an id outside
    # the embedding would end the run midway.
    for block in token_blocks(tokens):
        for token in (block.min(), block.max()):
            if not 0 <= token < vocab_size:
                raise UserError(
                    f"the dataset {path} holds token {token}, but the model has {vocab_size} "
                    f"tokens: allowed are 0 to {vocab_size - 1}"
                )


def token_blocks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """The tokens in pieces that fit into memory."""
    for start in range(0, len(tokens), _SCANNED_TOKENS):
        yield tokens[start : start + _SCANNED_TOKENS]
