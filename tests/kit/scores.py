"""Head scores made of arrays, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megatron_hydra.selection.combination import Combination
from megatron_hydra.selection.scores import HeadScores, ProbeRecord
from megatron_hydra.selection.shape import ModelShape

SCORER, PROBE, CAPABILITY = "scorer", "probe", "retrieval"
"""Names that :func:`make_scores` gives where it is handed none."""

Effects = Mapping[str, Mapping[str, ArrayLike]]


def make_scores(
    values: ArrayLike | Effects,
    num_query_groups: int | None = None,
    capabilities: Mapping[str, str] | None = None,
    combination: Combination | None = None,
    teacher_config_hash: str = "0" * 16,
    provenance: Mapping[str, Any] | None = None,
    **shape_fields: Any,
) -> HeadScores:
    """Valid head scores, with as little said as a test needs.

    Args:
        values: One of
            scores [layers, heads], 0 or more: `make_scores(x).scores` equals `x`;
            effects [kept pairs, layers, heads] of one scorer on one sub-probe, whose scores are
            the absolute means; or scorer -> sub-probe -> effects [kept pairs, layers, heads].
        num_query_groups: Default: two heads per group, or one where the heads are odd.
        capabilities: Sub-probe -> capability; `"retrieval"` where it is not named.
        combination: Default: for arrays neither consistency nor normalisation; for mappings the
            paper's, over all scorers.
        teacher_config_hash: As in the file.
        provenance: As in the file.
        shape_fields: Other fields of :class:`ModelShape`.
    """
    by_scorer: Effects
    if isinstance(values, Mapping):
        by_scorer = values
        combination = combination or Combination(tuple(values))
    else:
        array = np.asarray(values, np.float64)
        if array.ndim == 2:
            assert (array >= 0).all(), "scores are means of absolute effects: none is negative"
            array = array[None]
        by_scorer = {SCORER: {PROBE: array}}
        combination = combination or Combination((SCORER,), consistency=False, normalise=False)
    effects = {
        scorer: {probe: np.asarray(array, np.float64) for probe, array in by_probe.items()}
        for scorer, by_probe in by_scorer.items()
    }
    num_pairs = {probe: len(array) for by in effects.values() for probe, array in by.items()}
    num_layers, num_heads = next(
        array.shape[1:] for by in effects.values() for array in by.values()
    )
    records = tuple(
        _record(name, (capabilities or {}).get(name, CAPABILITY), pairs)
        for name, pairs in num_pairs.items()
    )
    if num_query_groups is None:
        num_query_groups = num_heads // 2 if num_heads % 2 == 0 else num_heads
    shape = _shape(num_layers, num_heads, num_query_groups, **shape_fields)
    return HeadScores(
        shape, teacher_config_hash, records, effects, combination, dict(provenance or {})
    )


def _record(name: str, capability: str, num_pairs: int) -> ProbeRecord:
    """A sub-probe whose pairs are all kept."""
    return ProbeRecord(
        name=name,
        capability=capability,
        readout="logit_difference",
        num_pairs=num_pairs,
        kept=tuple(range(num_pairs)),
        gaps=(4.0,) * num_pairs,
        length_tokens=256,
        seed=0,
    )


def _shape(num_layers: int, num_heads: int, num_query_groups: int, **fields: Any) -> ModelShape:
    """A small model with heads of 8 channels."""
    defaults: dict[str, Any] = dict(
        head_dim=8,
        hidden_size=8 * num_heads,
        ffn_hidden_size=16 * num_heads,
        vocab_size=64,
        tied_embeddings=True,
    )
    return ModelShape(num_layers, num_heads, num_query_groups, **{**defaults, **fields})
