"""The head plan: which attention heads keep full attention (FA) and which become linear (LA).

A plan calls a head FA or LA. What an LA head is made of is the model's choice, its `la_kind`; a
plan may also name the kind of single heads, one of `megatron_hydra.model.mixers.kinds.KINDS`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from megatron_hydra.errors import UserError
from megatron_hydra.files import read_json, write_json
from megatron_hydra.schema import MAY_LACK, Count, from_json, named

HeadKind = str
"""`fa`, `la` (of the model's `la_kind`) or the name of a kind."""


@dataclass(frozen=True)
class _FileLayer:
    layer: int
    fa_heads: list[int]
    kinds: dict[str, list[int]] = field(default_factory=dict, metadata=MAY_LACK)
    """Heads that are neither FA nor LA of the model's kind, by the name of their kind."""


@dataclass(frozen=True)
class _File:
    """The keys of a plan's file, in their order."""

    schema_version: Literal[1]
    kind: Literal["head_plan"]
    num_layers: Count
    num_heads: Count
    num_query_groups: Count
    teacher_config_hash: str
    layers: list[_FileLayer]
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class LayerHeadPlan:
    """The kind of each query head of one layer, in the teacher's head order."""

    kinds: tuple[HeadKind, ...]

    @property
    def num_heads(self) -> int:
        """Number of query heads of the layer."""
        return len(self.kinds)

    @property
    def fa_heads(self) -> tuple[int, ...]:
        """Indices of the heads with full attention, ascending."""
        return self.heads_of("fa")

    @property
    def la_heads(self) -> tuple[int, ...]:
        """Indices of all other heads, ascending."""
        return tuple(head for head, name in enumerate(self.kinds) if name != "fa")

    def heads_of(self, kind: HeadKind) -> tuple[int, ...]:
        """Indices of the heads of a kind, ascending."""
        return tuple(head for head, name in enumerate(self.kinds) if name == kind)

    def resolved(self, la_kind: HeadKind) -> LayerHeadPlan:
        """The same with the name of a kind for each head: ``la`` means ``la_kind``."""
        return LayerHeadPlan(tuple(la_kind if kind == "la" else kind for kind in self.kinds))


@dataclass(frozen=True)
class HeadPlan:
    """The kind of every query head of a model; layers and heads count from 0.

    Query head ``h`` belongs to query group ``h // heads_per_group``, as in Megatron and in
    Hugging Face's grouped-query attention.

    Attributes:
        layers: One plan per layer; all have the same number of heads.
        num_query_groups: Query groups (KV heads) per layer.
        teacher_config_hash: Hash of the teacher's shape-giving configuration; empty for a plan
            that was written without a teacher at hand.
        provenance: What the plan was made from (scorer, probes, seed, versions); JSON values.

    Raises:
        UserError: If the layers disagree in size, a kind is unknown, or the heads are not
            divisible by the query groups.
    """

    layers: tuple[LayerHeadPlan, ...]
    num_query_groups: int
    teacher_config_hash: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers or not self.layers[0].kinds:
            raise UserError("a head plan needs at least one layer with at least one head")
        for index, layer in enumerate(self.layers):
            if layer.num_heads != self.num_heads:
                raise UserError(
                    f"layer {index} of the head plan has {layer.num_heads} heads, "
                    f"but layer 0 has {self.num_heads}"
                )
            for kind in layer.kinds:
                if not isinstance(kind, str) or not kind:
                    raise UserError(f"layer {index} has a head of kind {kind!r}: it must be a name")
        if self.num_query_groups < 1 or self.num_heads % self.num_query_groups:
            raise UserError(
                f"{self.num_heads} heads are not divisible by {self.num_query_groups} query groups"
            )

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        """Number of query heads per layer."""
        return self.layers[0].num_heads

    @property
    def heads_per_group(self) -> int:
        """Number of query heads that share one key and value."""
        return self.num_heads // self.num_query_groups

    @property
    def num_fa_heads(self) -> int:
        """Number of heads with full attention in the whole model."""
        return sum(len(layer.fa_heads) for layer in self.layers)

    def fa_groups(self, layer: int) -> tuple[int, ...]:
        """Query groups of ``layer`` that some FA head uses: the ones whose KV cache is kept."""
        return tuple(sorted({head // self.heads_per_group for head in self.layers[layer].fa_heads}))

    @classmethod
    def from_fa_heads(
        cls,
        fa_heads: Mapping[int, Sequence[int]],
        num_layers: int,
        num_heads: int,
        num_query_groups: int,
        teacher_config_hash: str = "",
        provenance: Mapping[str, Any] | None = None,
        other_kinds: Mapping[int, Mapping[HeadKind, Sequence[int]]] | None = None,
    ) -> HeadPlan:
        """Build a plan from the FA heads of each layer; heads not named become LA.

        Args:
            fa_heads: By layer.
            num_layers: Layers.
            num_heads: Query heads per layer.
            num_query_groups: Query groups per layer.
            teacher_config_hash: As the attribute.
            provenance: As the attribute.
            other_kinds: By layer and name of a kind, heads that are of that kind.

        Raises:
            UserError: If a layer is unknown, or a head is out of range or named twice.
        """
        others = other_kinds or {}
        for layer in (*fa_heads, *others):
            _check_index(layer, num_layers, "layer", "the head plan")
        layers = tuple(
            LayerHeadPlan(_kinds({"fa": fa_heads.get(n, ()), **others.get(n, {})}, num_heads, n))
            for n in range(num_layers)
        )
        return cls(layers, num_query_groups, teacher_config_hash, dict(provenance or {}))

    @classmethod
    def from_dict(cls, data: Any, where: str = "the head plan") -> HeadPlan:
        """Read what :meth:`to_dict` wrote.

        Args:
            data: JSON values.
            where: What they are, for messages.

        Raises:
            UserError: If a key is unknown or missing, a value has the wrong type, the version is
                another, or a layer is missing, unknown or named twice.
        """
        file = from_json(_File, data, where)
        fa_heads: dict[int, list[int]] = {}
        with named(where):
            for entry in file.layers:
                if entry.layer in fa_heads:
                    raise UserError(f"layer {entry.layer} is named twice in the head plan")
                fa_heads[entry.layer] = entry.fa_heads
            plan = cls.from_fa_heads(
                fa_heads,
                file.num_layers,
                file.num_heads,
                file.num_query_groups,
                file.teacher_config_hash,
                file.provenance,
                {entry.layer: entry.kinds for entry in file.layers},
            )
            for layer in range(file.num_layers):
                if layer not in fa_heads:
                    raise UserError(f"layer {layer} is missing in the head plan")
        return plan

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values, every layer named."""
        file = _File(
            1,
            "head_plan",
            self.num_layers,
            self.num_heads,
            self.num_query_groups,
            self.teacher_config_hash,
            [
                _FileLayer(
                    index,
                    list(layer.fa_heads),
                    {
                        kind: list(layer.heads_of(kind))
                        for kind in dict.fromkeys(layer.kinds)
                        if kind not in ("fa", "la")
                    },
                )
                for index, layer in enumerate(self.layers)
            ],
            self.provenance,
        )
        data = asdict(file)
        for entry in data["layers"]:
            if not entry["kinds"]:  # as plans of FA and LA heads always were
                del entry["kinds"]
        return data

    def resolved(self, la_kind: HeadKind) -> HeadPlan:
        """The same with the name of a kind for each head: ``la`` means ``la_kind``."""
        return replace(self, layers=tuple(layer.resolved(la_kind) for layer in self.layers))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadPlan:
        """Read a plan from a JSON file.

        Raises:
            UserError: As :meth:`from_dict`, or if the file cannot be read; names the file.
        """
        return cls.from_dict(read_json(path, "head_plan", 1), os.fspath(path))

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the plan as JSON.

        Raises:
            UserError: If ``path`` exists and ``overwrite`` is False, or cannot be written.
        """
        write_json(path, self.to_dict(), overwrite)

    def check_teacher(
        self, num_layers: int, num_heads: int, num_query_groups: int, config_hash: str
    ) -> None:
        """Check that the plan was made for this teacher.

        The hashes are compared when both are known; a plan written by hand may leave its empty.

        Raises:
            UserError: If shape or hash differ.
        """
        plan_shape = (self.num_layers, self.num_heads, self.num_query_groups)
        if plan_shape != (num_layers, num_heads, num_query_groups):
            raise UserError(
                f"the head plan is for {_describe(*plan_shape)}, but the teacher has "
                f"{_describe(num_layers, num_heads, num_query_groups)}"
            )
        if self.teacher_config_hash and config_hash and self.teacher_config_hash != config_hash:
            raise UserError(
                f"the head plan was made for another teacher: its config hash is "
                f"{self.teacher_config_hash[:12]}…, this teacher's is {config_hash[:12]}…"
            )


def _describe(num_layers: int, num_heads: int, num_query_groups: int) -> str:
    return f"{num_layers} layers of {num_heads} heads in {num_query_groups} query groups"


def _kinds(
    heads_of: Mapping[HeadKind, Iterable[int]], num_heads: int, layer: int
) -> tuple[HeadKind, ...]:
    kinds: dict[int, HeadKind] = {}
    for kind, heads in heads_of.items():
        for head in heads:
            _check_index(head, num_heads, "head", f"layer {layer}")
            if head in kinds:
                raise UserError(f"head {head} of layer {layer} is named twice in the head plan")
            kinds[head] = kind
    return tuple(kinds.get(head, "la") for head in range(num_heads))


def _check_index(index: object, size: int, what: str, where: str) -> None:
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < size:
        raise UserError(f"unknown {what} {index!r} in {where}: use 0 to {size - 1}")
