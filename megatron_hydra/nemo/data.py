"""Batches of token sequences from Megatron's indexed datasets, through NeMo's data module."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.packed_seq_params import PackedSeqParams
from nemo.collections import llm
from torch import Tensor

from megatron_hydra.errors import UserError
from megatron_hydra.model.sequence import pad_documents, padded_lengths
from megatron_hydra.teachers.token_ids import end_of_document
from megatron_hydra.training.config import DataSection
from megatron_hydra.training.dataset_checks import document_lengths, read_tokens, token_blocks
from megatron_hydra.training.document_lengths import epoch_tokens, repeats
from megatron_hydra.training.indexed_dataset import EndOfDocument, read_notes
from megatron_hydra.training.run_inputs import datasets_hash

logger = logging.getLogger(__name__)


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
    folder, dataset_class = datasets_hash(section)[:16], GPTDataset
    if section.long_document_tokens is not None:
        least, factor = section.long_document_tokens, section.long_document_factor
        folder, dataset_class = f"{folder}_{least}x{factor}", _up_sampled(section)
        logger.info("documents of %d tokens or more are seen %d times as often", least, factor)
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
        index_mapping_dir=str(index_folder / folder),
        output_log=False,
    )
    module.dataset_cls = dataset_class  # not an argument: NeMo would copy and record it
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


def _up_sampled(section: DataSection) -> type[GPTDataset]:
    """Megatron's dataset, with every long document several times among those of an epoch.

    Megatron takes any list of documents, shuffles it and cuts samples from it. So long and short
    documents are mixed as ever, all is drawn by the seed alone, a run goes on by counting samples,
    and nothing is written twice. Two datasets, one of the long documents, would need weights that
    a user has to work out, and preprocessing anew for every other length.
    """

    class UpSampledDataset(GPTDataset):
        def __init__(
            self, indexed_dataset: Any, dataset_path: str | None, indexed_indices: Any, *rest: Any
        ) -> None:
            times = repeats(indexed_dataset.sequence_lengths[indexed_indices], section)
            documents = np.repeat(indexed_indices, times)
            super().__init__(indexed_dataset, dataset_path, documents, *rest)

    return UpSampledDataset


class _EndOfDocument:
    """What a dataset asks of a tokenizer."""

    vocab_size = None

    def __init__(self, end_of_document: int) -> None:
        self.eod = end_of_document
        self.unique_identifiers = {"end_of_document": end_of_document}


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
    if not any((block == token_id).any() for block in token_blocks(read_tokens(path))):
        raise UserError(
            f"the dataset {path} has not a single {token}, so its documents have no end to reset "
            "or mask at: preprocess it anew, or name the token that ends them in "
            "data.end_of_document"
        )


def _blend(section: DataSection) -> list[Any]:
    """Paths, with a weight before each where there are several.

    Without weights Megatron would take the datasets' sizes too, but end with the first epoch: a run
    that needs more could not go on from there.
    """
    if len(section.paths) == 1:
        return list(section.paths)
    weights = section.weights or [
        float(epoch_tokens(document_lengths(path), section)) for path in section.paths
    ]
    return [item for pair in zip(weights, section.paths, strict=True) for item in pair]
