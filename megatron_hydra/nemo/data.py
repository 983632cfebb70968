"""Batches of token sequences from Megatron's indexed datasets, through NeMo's data module."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.datasets.indexed_dataset import DType
from megatron.core.packed_seq_params import PackedSeqParams
from nemo.collections import llm
from torch import Tensor

from megatron_hydra.errors import UserError
from megatron_hydra.model.sequence import pad_documents, padded_lengths
from megatron_hydra.teachers.token_ids import end_of_document
from megatron_hydra.training.config import DataSection
from megatron_hydra.training.indexed_dataset import EndOfDocument, dataset_files, read_notes
from megatron_hydra.training.run_inputs import datasets_hash

# Magic and version, the type of a token, the number of sequences and of documents. Then follow
# the sequences' lengths (int32) and places (int64), and each document's first sequence (int64).
_INDEX_HEADER = struct.Struct("<17sBQQ")
_INDEX_START = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1)
_SCANNED_TOKENS = 2**24
"""Tokens of a dataset that are looked at in one go."""


def make_data_module(
    section: DataSection, end_of_document: int, index_folder: Path
) -> llm.PreTrainingDataModule:
    """The data module of the YAML's section, all of the data used for training.

    Samples run over document ends: position ids and attention are not reset here, see
    :func:`pack_documents`.

    Args:
        section: Paths, lengths and batch sizes.
        end_of_document: Token that ends a document; read only to mask its loss.
        index_folder: Where Megatron keeps its sample indices. It knows them by the datasets' paths;
            a folder below, named by the contents, keeps those of other tokens apart.
    """
    module = llm.PreTrainingDataModule(
        paths=_blend(section),
        seq_length=section.seq_length,
        tokenizer=_EndOfDocument(end_of_document),
        micro_batch_size=section.micro_batch_size,
        global_batch_size=section.global_batch_size,
        num_workers=section.num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=section.num_workers > 0,
        eod_mask_loss=section.mask_end_of_document,
        seed=section.seed,
        split="1,0,0",
        index_mapping_dir=str(index_folder / datasets_hash(section)[:16]),
        output_log=False,
    )
    module.create_attention_mask = False  # causal attention makes its own
    return module


def pack_documents(
    batch: Mapping[str, Tensor],
    end_of_document: int,
    cp_size: int = 1,
    multiple_of: int = 1,
) -> tuple[dict[str, Tensor], PackedSeqParams]:
    """Lay a batch's documents into one row, where none sees another.

    A document ends with its end-of-document token or with its row; the token after the former
    belongs to another document, so predicting it does not count.

    Args:
        batch: `tokens` and `labels` `[b, s]` int64, `loss_mask` `[b, s]` floating point.
        end_of_document: The token that ends a document.
        cp_size: Context-parallel ranks, for which every document is padded.
        multiple_of: What each context-parallel rank's number of tokens must be divisible by; what
            it lacks is a document of padding.

    Returns:
        `tokens`, `position_ids`, `labels`, `loss_mask` and `token_weights`, which is 0 where a
        token is padding, `[1, t]` each; and where the documents lie.
    """
    ends = batch["tokens"] == end_of_document
    row = {name: batch[name].flatten() for name in ("tokens", "labels")}
    row["loss_mask"] = batch["loss_mask"].masked_fill(ends, 0).flatten()
    row["token_weights"] = torch.ones_like(row["loss_mask"])
    ends[:, -1] = True
    cu_seqlens = F.pad(ends.flatten().nonzero().squeeze(1) + 1, (1, 0))
    unit = 1 if cp_size == 1 else 2 * cp_size
    num_padded = int(padded_lengths(cu_seqlens.diff(), cp_size).sum())
    num_lacking = -num_padded % math.lcm(unit, cp_size * multiple_of)
    if num_lacking:
        row = {name: F.pad(values, (0, num_lacking)) for name, values in row.items()}
        cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1:] + num_lacking])
    lengths = cu_seqlens.diff()
    starts = torch.repeat_interleave(cu_seqlens[:-1], lengths)
    row["position_ids"] = torch.arange(len(starts), device=starts.device) - starts
    return pad_documents({name: values[None] for name, values in row.items()}, cu_seqlens, cp_size)


class _EndOfDocument:
    """What a dataset asks of a tokenizer."""

    vocab_size = None

    def __init__(self, end_of_document: int) -> None:
        self.eod = end_of_document
        self.unique_identifiers = {"end_of_document": end_of_document}


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
    dtype, num_tokens = _read_index(index)
    if tokens.stat().st_size != num_tokens * dtype.itemsize:
        raise UserError(
            f"{tokens} has {tokens.stat().st_size:,} bytes, but {index} tells of {num_tokens:,} "
            f"tokens of {dtype.itemsize} bytes: write the dataset anew"
        )
    return np.memmap(tokens, dtype, "r") if num_tokens else np.empty(0, dtype)


def _read_index(index: Path) -> tuple[np.dtype, int]:
    """The type of a token and the number of tokens."""
    with index.open("rb") as stream:
        header = stream.read(_INDEX_HEADER.size)
    if not header.startswith(_INDEX_START) or len(header) < _INDEX_HEADER.size:
        raise UserError(f"{index} is no index of a Megatron dataset")
    _, code, num_sequences, num_documents = _INDEX_HEADER.unpack(header)
    is_known = code in [kind.value for kind in DType]
    dtype = np.dtype(DType.dtype_from_code(code) if is_known else np.float32)
    if dtype.kind not in "iu":
        raise UserError(f"{index} says that tokens are of type {code}, which is no integer type")
    if index.stat().st_size < len(header) + 12 * num_sequences + 8 * num_documents:
        raise UserError(f"{index} is cut off: write the dataset anew")
    if num_sequences == 0:
        return dtype, 0
    lengths = np.memmap(index, "<i4", "r", offset=len(header), shape=(num_sequences,))
    return dtype, int(lengths.sum(dtype=np.int64))


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
    for block in _blocks(tokens):
        for token in (block.min(), block.max()):
            if not 0 <= token < vocab_size:
                raise UserError(
                    f"the dataset {path} holds token {token}, but the model has {vocab_size} "
                    f"tokens: allowed are 0 to {vocab_size - 1}"
                )


def find_end_of_document(section: DataSection, tokenizer: Any) -> tuple[str, int]:
    """The token that ends the documents of all datasets, each of which holds it: its text and id.

    It is the one that the section names, else the one noted beside the datasets, else the
    tokenizer's (:func:`~megatron_hydra.teachers.token_ids.end_of_document`).

    Raises:
        UserError: If the datasets' notes say another, the tokenizer does not have it, or a dataset
            holds not a single one.
    """
    name, named_by = section.end_of_document, "data.end_of_document is"
    noted: dict[str, EndOfDocument] = {}
    for path in section.paths:
        notes = read_notes(path)
        if notes is None or notes["end_of_document"] is None:
            continue
        noted[path] = notes["end_of_document"]
        if name not in (None, noted[path].token):
            raise UserError(
                f"{named_by} {name}, but the documents of {path} end with {noted[path].token}: "
                "preprocess one of them anew with --end-of-document"
            )
        name, named_by = noted[path].token, f"the end of a document of {path} is"
    token, token_id = end_of_document(tokenizer, name)
    for path in section.paths:
        _check_ends(path, token, token_id, noted.get(path))
    return token, token_id


def _check_ends(path: str, token: str, token_id: int, noted: EndOfDocument | None) -> None:
    if noted and noted.id != token_id:
        raise UserError(
            f"{token} is token {noted.id} in the dataset {path}, but {token_id} in the run's "
            "tokenizer: preprocess with the tokenizer of transfer.init_from"
        )
    if noted and noted.num_documents:
        return
    if not any((block == token_id).any() for block in _blocks(read_tokens(path))):
        raise UserError(
            f"the dataset {path} has not a single {token}, so its documents have no end to reset "
            "or mask at: preprocess it anew, or name the token that ends them in "
            "data.end_of_document"
        )


def _blocks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(tokens), _SCANNED_TOKENS):
        yield tokens[start : start + _SCANNED_TOKENS]


def _blend(section: DataSection) -> list[Any]:
    if not section.weights:
        return list(section.paths)
    return [item for pair in zip(section.weights, section.paths, strict=True) for item in pair]
