"""Head scores: how much each attention head of a teacher matters, as a JSON file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

from megatron_hydra.errors import UserError
from megatron_hydra.files import read_json, write_json

SCHEMA_VERSION = 1
_FILE_KIND = "head_scores"

# One number a head: [num_layers][num_heads].
HeadTable = Sequence[Sequence[float]]


@dataclass(frozen=True)
class HeadScores:
    """What a scorer found for every query head; layers and heads count from 0.

    Attributes:
        num_layers: Layers of the teacher.
        num_heads: Query heads a layer.
        num_query_groups: Query groups (KV heads) a layer.
        teacher_config_hash: Hash of the teacher's shape-giving configuration.
        scorer: Name of the scorer.
        scores: [num_layers][num_heads], the final score; higher keeps full attention first.
        effects: Probe name -> [num_layers][num_heads], mean indirect effect (Eq 10).
        consistency: [num_layers][num_heads], share of sub-probes with a notable effect (kappa,
            Eq 12).
        provenance: Probes with their counts and seeds, versions, command; JSON values.

    Raises:
        UserError: If a table has another shape or a number that is not finite.
    """

    num_layers: int
    num_heads: int
    num_query_groups: int
    teacher_config_hash: str
    scorer: str
    scores: HeadTable
    effects: Mapping[str, HeadTable]
    consistency: HeadTable
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "num_query_groups"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} of the head scores must be a positive integer: {value!r}")
        if self.num_heads % self.num_query_groups:
            raise UserError(
                f"{self.num_heads} heads do not divide into {self.num_query_groups} query groups"
            )
        for name in ("teacher_config_hash", "scorer"):
            if not isinstance(getattr(self, name), str):
                raise UserError(f"{name} of the head scores must be a string")
        for name in ("effects", "provenance"):
            if not isinstance(getattr(self, name), Mapping):
                raise UserError(f"{name} of the head scores must be a JSON object")
        object.__setattr__(self, "scores", self._table(self.scores, "scores"))
        effects = {
            probe: self._table(t, f"effects[{probe!r}]") for probe, t in self.effects.items()
        }
        object.__setattr__(self, "effects", effects)
        object.__setattr__(self, "consistency", self._table(self.consistency, "consistency"))

    def _table(self, rows: HeadTable, name: str) -> tuple[tuple[float, ...], ...]:
        shape = f"[{self.num_layers}][{self.num_heads}]"
        try:
            table = tuple(tuple(_number(value) for value in row) for row in rows)
        except TypeError as error:
            raise UserError(f"{name} of the head scores must be numbers {shape}") from error
        if len(table) != self.num_layers or any(len(row) != self.num_heads for row in table):
            raise UserError(f"{name} of the head scores must have shape {shape}")
        for layer, row in enumerate(table):
            for head, value in enumerate(row):
                if not math.isfinite(value):
                    raise UserError(f"{name} of layer {layer}, head {head} is {value}, not finite")
        return table

    def effect_size(self, layer: int, head: int) -> float:
        """Mean over the probes of the head's absolute indirect effect; 0 without probes."""
        sizes = [abs(table[layer][head]) for table in self.effects.values()]
        return math.fsum(sizes) / len(sizes) if sizes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The scores as JSON values."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {"schema_version": SCHEMA_VERSION, "kind": _FILE_KIND, **values}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadScores:
        """Read scores from a JSON file.

        Raises:
            UserError: If the file cannot be read or is no such file; names the file.
        """
        data = read_json(path, _FILE_KIND, SCHEMA_VERSION)
        names = [item.name for item in fields(cls)]
        for key in data:
            if key not in ("schema_version", "kind", *names):
                raise UserError(f"{os.fspath(path)}: unknown key {key!r}: use {', '.join(names)}")
        for name in names:
            if name not in data:
                raise UserError(f"{os.fspath(path)}: key {name!r} is missing")
        try:
            return cls(**{name: data[name] for name in names})
        except UserError as error:
            raise UserError(f"{os.fspath(path)}: {error}") from error

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the scores as JSON.

        Raises:
            UserError: If ``path`` exists and ``overwrite`` is False, or cannot be written.
        """
        write_json(path, self.to_dict(), overwrite)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{value!r} is not a number")
    return float(value)
