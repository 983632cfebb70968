"""Head scores: what scorers found for every attention head of a teacher, as a JSON file.

The file keeps the raw effect of every head, pair and sub-probe, so that another combination, a
resampling of the pairs or a doubt needs no new run.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from megatron_hydra.errors import UserError
from megatron_hydra.files import write_json
from megatron_hydra.schema import MAY_LACK, ReadBy, load_json
from megatron_hydra.selection.combination import (
    Array,
    Combination,
    capability_scores,
    combine,
)
from megatron_hydra.selection.shape import ModelShape

SCHEMA_VERSION = 2
_FILE_KIND = "head_scores"
_DIGITS = 9  # kept of an effect: more than float32 holds


@dataclass(frozen=True)
class ProbeRecord:
    """What a scores file says of a sub-probe.

    Attributes:
        name: Name of the sub-probe.
        capability: What it probes.
        readout: `logit_difference` or `log_probability`.
        num_pairs: Pairs drawn.
        kept: Indices of the pairs that count; the others had too small a clean-corrupt gap.
        gaps: m(x) - m(x') of every pair drawn, in logits or nats; empty for controls, which
            measure nothing.
        length_tokens: Tokens of a sample with its answer.
        seed: The pairs were drawn from it.

    Raises:
        UserError: If ``kept`` or ``gaps`` do not fit the number of pairs.
    """

    name: str
    capability: str
    readout: str
    num_pairs: int
    kept: tuple[int, ...]
    gaps: tuple[float, ...]
    length_tokens: int
    seed: int

    def __post_init__(self) -> None:
        in_order = sorted(set(self.kept).intersection(range(self.num_pairs)))
        if list(self.kept) != in_order or len(self.gaps) not in (0, self.num_pairs):
            raise UserError(
                f"sub-probe {self.name!r} of the head scores has {self.num_pairs} pairs, which "
                f"{len(self.gaps)} gaps and kept pairs {list(self.kept)} do not fit"
            )

    @property
    def num_dropped(self) -> int:
        """Pairs that do not count."""
        return self.num_pairs - len(self.kept)


@dataclass(frozen=True)
class HeadScores:
    """What scorers found for every query head; layers and heads count from 0.

    Attributes:
        shape: Sizes of the teacher.
        teacher_config_hash: Hash of the teacher's shape-giving configuration.
        probes: The sub-probes.
        effects: Scorer -> sub-probe -> float64 [kept pairs, layers, heads]; a scorer may lack
            sub-probes that it cannot read.
        combination: How :attr:`scores` are made of the effects.
        provenance: Command, versions, seeds; JSON values.
        teacher_weights_hash: Hash of the Hugging Face weights that were measured, by which two
            trainings of one shape differ; empty if unknown, as in files of earlier releases.

    Raises:
        UserError: If an array has another shape or a number that is not finite.
    """

    shape: ModelShape
    teacher_config_hash: str
    probes: tuple[ProbeRecord, ...]
    effects: Mapping[str, Mapping[str, Annotated[Array, ReadBy(_to_array)]]]
    combination: Combination
    provenance: Mapping[str, Any] = field(default_factory=dict)
    teacher_weights_hash: str = field(default="", metadata=MAY_LACK)

    def __post_init__(self) -> None:
        records = {probe.name: probe for probe in self.probes}
        if len(records) < len(self.probes):
            raise UserError("two sub-probes of the head scores have the same name")
        for scorer, by_probe in self.effects.items():
            for name, values in by_probe.items():
                where = f"effects of {scorer} on {name!r} in the head scores"
                if name not in records:
                    raise UserError(f"{where}: no such sub-probe among {', '.join(records)}")
                shape = (len(records[name].kept), self.num_layers, self.num_heads)
                if not shape[0]:
                    raise UserError(f"{where}: the sub-probe keeps no pair, so it has no effects")
                if values.shape != shape:
                    raise UserError(f"{where} have shape {values.shape}, not {shape}")
                if not np.isfinite(values).all():
                    pair, layer, head = np.argwhere(~np.isfinite(values))[0]
                    raise UserError(f"{where}: layer {layer}, head {head}, pair {pair} not finite")
        self.scores.setflags(write=False)  # made here, so that a bad combination is said at once

    @property
    def num_layers(self) -> int:
        """Layers of the teacher."""
        return self.shape.num_layers

    @property
    def num_heads(self) -> int:
        """Query heads per layer."""
        return self.shape.num_heads

    @property
    def num_query_groups(self) -> int:
        """Query groups (KV heads) per layer."""
        return self.shape.num_query_groups

    @cached_property
    def scores(self) -> Array:
        """The final score, [layers, heads]; higher keeps full attention first."""
        return combine(self._means, self._capabilities, self.combination)

    @cached_property
    def effect_size(self) -> Array:
        """Mean absolute mean effect over the combination's scorers and probes, [layers, heads]."""
        sizes = [
            np.abs(mean)
            for scorer in self.combination.scorers
            for mean in self._means[scorer].values()
        ]
        return np.asarray(np.mean(sizes, axis=0))

    @cached_property
    def ranked_heads(self) -> NDArray[np.intp]:
        """All heads, best first, as indices into the flat map, [layers * heads].

        By score, then by the size of the effect, then by layer and head.
        """
        return np.lexsort((-self.effect_size.ravel(), -self.scores.ravel()))

    @property
    def capability_scores(self) -> dict[str, Array]:
        """The score of each head for each capability, before weights: [layers, heads] each."""
        return capability_scores(self._means, self._capabilities, self.combination)

    def mean_effects(self, scorer: str, probe: str) -> Array:
        """Mean effect over the kept pairs by :meth:`pair_weights`, [layers, heads]."""
        return self._means[scorer][probe]

    def pair_weights(self, probe: str) -> Array:
        """The weight of each kept pair in a mean: its gap, or 1 (``weigh_by_gap``)."""
        record = next(record for record in self.probes if record.name == probe)
        if record.gaps and self.combination.weigh_by_gap:
            return np.asarray(record.gaps)[list(record.kept)]
        return np.ones(len(record.kept))

    def with_combination(self, combination: Combination) -> HeadScores:
        """The same effects, combined in another way.

        Raises:
            UserError: If the combination names scorers or capabilities that are not there.
        """
        return dataclasses.replace(self, combination=combination)

    @cached_property
    def _means(self) -> dict[str, dict[str, Array]]:
        return {
            scorer: {
                name: np.average(values, axis=0, weights=self.pair_weights(name))
                for name, values in by_probe.items()
            }
            for scorer, by_probe in self.effects.items()
        }

    @property
    def _capabilities(self) -> dict[str, str]:
        return {probe.name: probe.capability for probe in self.probes}

    def to_dict(self) -> dict[str, Any]:
        """The scores as JSON values; ``scores`` is there for readers and made anew on loading."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": _FILE_KIND,
            "teacher_config_hash": self.teacher_config_hash,
            "teacher_weights_hash": self.teacher_weights_hash,
            "shape": dataclasses.asdict(self.shape),
            "combination": dataclasses.asdict(self.combination),
            "scores": _to_lists(self.scores),
            "probes": [dataclasses.asdict(probe) for probe in self.probes],
            "provenance": dict(self.provenance),
            "effects": {
                scorer: {name: _to_lists(values) for name, values in by_probe.items()}
                for scorer, by_probe in self.effects.items()
            },
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadScores:
        """Read scores from a JSON file.

        Raises:
            UserError: If the file cannot be read or is no such file; names the file.
        """
        return load_json(cls, path, _FILE_KIND, SCHEMA_VERSION, unread=("scores",))

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the scores as JSON.

        Raises:
            UserError: If ``path`` exists and ``overwrite`` is False, or cannot be written.
        """
        write_json(path, self.to_dict(), overwrite)


def _to_array(rows: Any, name: str) -> Array:
    try:
        values = np.asarray(rows)
    except ValueError as error:  # rows of unequal length
        raise UserError(f"{name} is no array of numbers: {error}") from error
    if values.dtype.kind not in "if":  # NumPy would read "0.5" and true as numbers
        raise UserError(f"{name} is no array of numbers")
    return values.astype(np.float64)


def _to_lists(values: Array) -> Any:
    if values.ndim == 0:
        return float(f"{values.item():.{_DIGITS}g}")
    return [_to_lists(row) for row in values]
