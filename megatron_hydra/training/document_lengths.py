"""How the tokens of datasets lie over documents of each length, and how often a run sees these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_hydra.training.config import DataSection
from megatron_hydra.training.dataset_checks import document_lengths

_BOUNDS = (0, 4096, 16384, 32768, 65536, 131072, 2**31)
"""Tokens of a document, its end-of-document token included, at which the next class begins."""


@dataclass(frozen=True)
class UpSampling:
    """What `data.long_document_factor` makes of a run's data.

    Attributes:
        num_long: Documents of `data.long_document_tokens` or more.
        num_documents: All.
        share: Of the datasets' tokens, those that lie in the long ones, 0 to 1; blended as the run
            blends them.
        share_seen: The same of the tokens that the run trains on.
        times_seen: How often the run sees a long document; with weights, one of the dataset that it
            repeats most.
    """

    num_long: int
    num_documents: int
    share: float
    share_seen: float
    times_seen: float


def repeats(lengths: np.ndarray, section: DataSection) -> np.ndarray:
    """How often each document stands in one epoch of its dataset.

    Args:
        lengths: Tokens of each document `[num_documents]`.
        section: Says from which length on, and how often.

    Returns:
        int64 `[num_documents]`, 1 or `data.long_document_factor`.
    """
    if section.long_document_tokens is None:
        return np.ones(len(lengths), np.int64)
    is_long = lengths >= section.long_document_tokens
    return np.where(is_long, section.long_document_factor, 1).astype(np.int64)


def epoch_tokens(lengths: np.ndarray, section: DataSection) -> int:
    """Tokens of one epoch of a dataset; arguments as of :func:`repeats`."""
    return _tokens(lengths * repeats(lengths, section))


def up_sampling(section: DataSection, num_tokens: int) -> UpSampling | None:
    """What up-sampling makes of a run of ``num_tokens``; None where there is none."""
    least = section.long_document_tokens
    if least is None:
        return None
    datasets = [document_lengths(path) for path in section.paths]
    long = np.array([_tokens(lengths[lengths >= least]) for lengths in datasets])
    total = np.array([_tokens(lengths) for lengths in datasets])
    epoch = np.array([epoch_tokens(lengths, section) for lengths in datasets])
    weights = np.array(section.weights or epoch, np.float64)
    weights /= weights.sum()
    passes = num_tokens * weights / epoch
    unsampled = weights if section.weights else total / total.sum()
    return UpSampling(
        num_long=sum(int((lengths >= least).sum()) for lengths in datasets),
        num_documents=sum(map(len, datasets)),
        share=float((unsampled * long / total).sum()),
        share_seen=float((weights * section.long_document_factor * long / epoch).sum()),
        times_seen=float(section.long_document_factor * passes[long > 0].max()),
    )


def describe_lengths(prefixes: Sequence[str]) -> str:
    """`tokens by length of document: 62% below 4,096, 38% from 16,384`, of all datasets together.

    Classes begin at 4,096, 16,384 and each doubling up to 131,072 tokens; empty ones are left out.

    Raises:
        UserError: As `dataset_checks.document_lengths`.
    """
    found = np.zeros(len(_BOUNDS) - 1, np.int64)
    for prefix in prefixes:
        lengths = document_lengths(prefix)
        found += np.histogram(lengths, _BOUNDS, weights=lengths)[0].astype(np.int64)
    parts = [
        f"{100 * tokens / found.sum():.3g}% " + (f"from {start:,}" if start else f"below {end:,}")
        for tokens, (start, end) in zip(found, pairwise(_BOUNDS), strict=True)
        if tokens
    ]
    return f"tokens by length of document: {', '.join(parts)}"


def _tokens(lengths: np.ndarray) -> int:
    return int(lengths.sum(dtype=np.int64))
