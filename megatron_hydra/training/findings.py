"""What each rank found bad in a step, as fields, and the sentence that they make."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_hydra.head_plan import HeadKind
from megatron_hydra.model.hydra_attention import HydraAttention
from megatron_hydra.model.mixers.kinds import KINDS
from megatron_hydra.model.projection import Section
from megatron_hydra.transfer.hidden_states import unwrapped_model

_MAX_PARTS = 8
"""Ranks, or places on a rank, that a sentence names."""


Value = Literal["NaN", "Inf"]


@dataclass(frozen=True)
class BadOutput:
    """A head's output; layers and heads count from 0."""

    value: Value
    layer: int
    head: int
    kind: HeadKind
    what: str = field(default="head_output", init=False)

    @property
    def place(self) -> float:
        """The lower, the earlier in the step."""
        return self.layer

    @property
    def words(self) -> str:
        """Where it is, and whether it is NaN or Inf."""
        head = f"head {self.head} ({KINDS[self.kind].label})"
        return f"{self.value} in the output of {head} of layer {self.layer}"


@dataclass(frozen=True)
class BadLoss:
    """A part of the loss; micro-batches count from 0."""

    value: Value
    part: str
    micro_batch: int
    what: str = field(default="loss", init=False)

    @property
    def place(self) -> float:
        """As :attr:`BadOutput.place`; of losses none comes of another."""
        return 0

    @property
    def words(self) -> str:
        """As :attr:`BadOutput.words`."""
        return f"{self.value} in the loss part {self.part} of micro-batch {self.micro_batch}"


@dataclass(frozen=True)
class Rows:
    """A head's, or a query group's, part of a parameter."""

    section: str
    """Of the in-projection; empty for a parameter of another kind."""
    owner: str
    """`head` or `query group`."""
    number: int

    @property
    def words(self) -> str:
        """`la_query of head 2`."""
        owner = f"{self.owner} {self.number}"
        return f"{self.section} of {owner}" if self.section else owner


@dataclass(frozen=True)
class BadGradient:
    """A parameter's gradient."""

    value: Value
    parameter: str
    layer: int | None
    """That has it, counted from 0; None outside layers."""
    rows: tuple[Rows, ...]
    """That are bad; empty for what heads share, or where every head's are."""
    what: str = field(default="gradient", init=False)

    @property
    def place(self) -> float:
        """As :attr:`BadOutput.place`: backward, which begins outside layers and ends at the
        embedding."""
        if self.layer is not None:
            return -self.layer
        return 1 if self.parameter.startswith("embedding") else -math.inf

    @property
    def words(self) -> str:
        """As :attr:`BadOutput.words`."""
        rows = f" ({_shortened([rows.words for rows in self.rows])})" if self.rows else ""
        layer = "" if self.layer is None else f" of layer {self.layer}"
        return f"{self.value} in the gradient of {self.parameter}{rows}{layer}"


Finding = BadOutput | BadLoss | BadGradient


@dataclass(frozen=True)
class RankFindings:
    """What one rank found; plain data, gathered from all ranks."""

    rank: int
    coordinates: dict[str, int]
    """Its ranks in Megatron's groups."""
    heads: list[BadOutput]
    losses: list[BadLoss]
    gradients: list[BadGradient]
    is_gradient_source: bool
    """Whether its gradients were bad before they were summed over data-parallel ranks."""

    @classmethod
    def of_this_rank(
        cls,
        heads: list[BadOutput],
        losses: list[BadLoss],
        gradients: list[BadGradient],
        is_gradient_source: bool,
    ) -> RankFindings:
        """Findings with this rank's coordinates."""
        coordinates = {
            "tensor": parallel_state.get_tensor_model_parallel_rank(),
            "pipeline": parallel_state.get_pipeline_model_parallel_rank(),
            "data": parallel_state.get_data_parallel_rank(),
            "context": parallel_state.get_context_parallel_rank(),
        }
        rank = torch.distributed.get_rank()
        return cls(rank, coordinates, heads, losses, gradients, is_gradient_source)


def where_it_began(ranks: Sequence[RankFindings]) -> dict[int, Sequence[Finding]]:
    """By rank, head outputs of the first layer, else losses, else the first gradients.

    What a bad number spoils after it, forward and backward, is left out.

    Args:
        ranks: The findings of all ranks.
    """
    sources = [found for found in ranks if found.is_gradient_source] or list(ranks)
    kinds: tuple[dict[int, Sequence[Finding]], ...] = (
        {found.rank: found.heads for found in ranks},
        {found.rank: found.losses for found in ranks},
        {found.rank: found.gradients for found in sources},
    )
    by_rank = next((kind for kind in kinds if any(kind.values())), {})
    first = min((x.place for findings in by_rank.values() for x in findings), default=0)
    began = {
        rank: [finding for finding in findings if finding.place == first]
        for rank, findings in by_rank.items()
    }
    return {rank: findings for rank, findings in began.items() if findings}


def describe(ranks: Sequence[RankFindings], grad_norm: float) -> str:
    """Name where it began.

    Args:
        ranks: The findings of all ranks.
        grad_norm: Of the whole gradient, before clipping.
    """
    began = where_it_began(ranks)
    if not began:
        return f"the gradient's norm is {value_of(grad_norm)}, though every gradient is finite"
    parts = []
    for found in ranks:
        if found.rank in began:
            words = _shortened([finding.words for finding in began[found.rank]])
            where = ", ".join(f"{name} {rank}" for name, rank in found.coordinates.items())
            parts.append(f"{words} on rank {found.rank} ({where})")
    return _shortened(parts, "; ")


def records(ranks: Sequence[RankFindings]) -> list[dict[str, Any]]:
    """The same as JSON values: of each finding its rank, the rank's coordinates, its fields."""
    began = where_it_began(ranks)
    return [
        {"rank": found.rank, **found.coordinates, **asdict(finding)}
        for found in ranks
        for finding in began.get(found.rank, ())
    ]


def bad_heads(attentions: Sequence[HydraAttention], largest: Sequence[Tensor]) -> list[BadOutput]:
    """The heads whose output is NaN or Inf.

    Args:
        attentions: This rank's layers.
        largest: For each layer the largest absolute output of each local head, `[n]`.
    """
    findings = []
    for attention, values in zip(attentions, largest, strict=True):
        heads = attention.proj_section.units
        kinds = attention.placement.layer_plan.kinds
        findings += [
            BadOutput(value_of(value), attention.layer_number - 1, head, kinds[head])
            for head, value in zip(heads, values.tolist(), strict=True)
            if not math.isfinite(value)
        ]
    return findings


def bad_losses(micro_batches: Sequence[dict[str, Any]]) -> list[BadLoss]:
    """The parts of the loss that are NaN or Inf.

    Args:
        micro_batches: What the loss reduction made of each: `sums` `[1 + parts]`, with the number
            of tokens first, and the parts' `names`.
    """
    return [
        BadLoss(value_of(value), name, number)
        for number, micro_batch in enumerate(micro_batches)
        for name, value in zip(micro_batch["names"], micro_batch["sums"][1:].tolist(), strict=True)
        if not math.isfinite(value)
    ]


def bad_gradients(chunks: Sequence[torch.nn.Module]) -> list[BadGradient]:
    """The parameters whose gradient is NaN or Inf, and where rows belong to heads, which heads.

    Args:
        chunks: This rank's DDP-wrapped parts of the model.
    """
    findings = []
    for chunk in chunks:
        model = unwrapped_model(chunk)
        owners = {
            parameter: (layer, name)
            for layer in model.decoder.layers
            for name, parameter in layer.named_parameters()
        }
        for name, parameter in model.named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            if gradient is None or torch.isfinite(gradient).all():
                continue
            layer, inner_name = owners.get(parameter, (None, name))
            if layer is None:
                findings.append(BadGradient(value_of(gradient), name, None, ()))
                continue
            rows = tuple(_bad_rows(layer, inner_name, gradient))
            number = layer.layer_number - 1
            findings.append(BadGradient(value_of(gradient), inner_name, number, rows))
    return findings


def _bad_rows(layer: Any, name: str, gradient: Tensor) -> list[Rows]:
    """None for what heads share, or where every head's rows are bad."""
    inner_name = name.removeprefix("self_attention.")
    per_head = layer.self_attention.per_head_parameters()
    if inner_name == name or inner_name not in per_head:
        return []
    sections, axis = per_head[inner_name]
    every = [(section, unit) for section in sections for unit in section.units]
    bad = [
        Rows(section.name, section.unit_noun, unit)
        for (section, unit), part in zip(every, _cut(sections, gradient, axis), strict=True)
        if not torch.isfinite(part).all()
    ]
    return [] if len(bad) == len(every) > 1 else bad


def _cut(sections: Sequence[Section], tensor: Tensor, axis: int) -> Iterator[Tensor]:
    widths = [section.width for section in sections for _ in section.units]
    yield from tensor.narrow(axis, 0, sum(widths)).split(widths, dim=axis)


def value_of(value: float | Tensor) -> Value:
    """What a number, or a tensor, that is not finite is."""
    if isinstance(value, Tensor):
        return "NaN" if torch.isnan(value).any() else "Inf"
    return "NaN" if math.isnan(value) else "Inf"


def _shortened(words: Sequence[str], separator: str = ", ") -> str:
    shown = list(words[:_MAX_PARTS])
    if len(words) > _MAX_PARTS:
        shown.append(f"{len(words) - _MAX_PARTS} more")
    return separator.join(shown)
