"""Batches of token sequences from Megatron's indexed datasets, through NeMo's data module."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from nemo.collections import llm

from megatron_hydra.errors import UserError
from megatron_hydra.nemo.config import DataSection

_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # Megatron's codes of integer types


def make_data_module(
    section: DataSection, end_of_document: int, index_folder: Path
) -> llm.PreTrainingDataModule:
    """The data module of the YAML's section, all of the data used for training.

    Samples run over document ends: position ids and attention are not reset there.

    Args:
        section: Paths, lengths and batch sizes.
        end_of_document: Token that ends a document; read only to mask its loss.
        index_folder: Where Megatron keeps its sample indices.
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
        index_mapping_dir=str(index_folder),
        output_log=False,
    )
    module.create_attention_mask = False  # causal attention makes its own
    return module


class _EndOfDocument:
    """What a dataset asks of a tokenizer."""

    vocab_size = None

    def __init__(self, end_of_document: int) -> None:
        self.eod = end_of_document
        self.unique_identifiers = {"end_of_document": end_of_document}


def check_datasets(section: DataSection, vocab_size: int) -> None:
    """Check that every dataset is there, long enough, and made for this vocabulary.

    Raises:
        UserError: On the first that is not.
    """
    for path in section.paths:
        num_tokens = count_tokens(path)
        if num_tokens < section.seq_length + 1:
            raise UserError(
                f"data.seq_length is {section.seq_length}, but the dataset {path} has "
                f"{num_tokens} tokens: at least data.seq_length + 1 are needed"
            )
        provenance = Path(f"{path}.json")
        if provenance.is_file():
            made_for = json.loads(provenance.read_text("utf-8")).get("vocab_size", 0)
            if made_for > vocab_size:
                raise UserError(
                    f"the dataset {path} was made with a tokenizer of {made_for} tokens, but the "
                    f"model has {vocab_size}"
                )


def count_tokens(prefix: str) -> int:
    """Tokens in the indexed dataset ``prefix``.

    Raises:
        UserError: If one of its two files is missing or no such dataset.
    """
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for file in (index, tokens):
        if not file.is_file():
            raise UserError(
                f"no indexed dataset {prefix}: {file} is missing (see megatron-hydra preprocess)"
            )
    with index.open("rb") as stream:
        header = stream.read(len(_INDEX_MAGIC) + 9)
    if not header.startswith(_INDEX_MAGIC) or len(header) < len(_INDEX_MAGIC) + 9:
        raise UserError(f"{index} is no index of a Megatron dataset")
    (code,) = struct.unpack_from("<B", header, len(_INDEX_MAGIC) + 8)
    if code not in _TOKEN_BYTES:
        raise UserError(f"{index} says that tokens are of type {code}, which is no integer type")
    return tokens.stat().st_size // _TOKEN_BYTES[code]


def _blend(section: DataSection) -> list[Any]:
    if not section.weights:
        return list(section.paths)
    return [item for pair in zip(section.weights, section.paths, strict=True) for item in pair]
