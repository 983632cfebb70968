"""What each rank found bad in a step, and the words that name where it began."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_hydra.model.hydra_attention import HydraAttention
from megatron_hydra.model.mixers.kinds import KINDS
from megatron_hydra.model.projection import Section
from megatron_hydra.transfer.hidden_states import unwrapped_model

_MAX_PARTS = 8
"""Ranks, or places on a rank, that a sentence names."""


@dataclass(frozen=True)
class Finding:
    """One bad number, or several alike."""

    place: int
    """The lower, the earlier: layers forward for head outputs, backward for gradients."""
    words: str
    """Where it is, and whether it is NaN or Inf."""


@dataclass(frozen=True)
class RankFindings:
    """What one rank found; plain data, gathered from all ranks."""

    rank: int
    coordinates: dict[str, int]
    """Its ranks in Megatron's groups."""
    heads: list[Finding]
    losses: list[Finding]
    """The place is the micro-batch."""
    gradients: list[Finding]
    is_gradient_source: bool
    """Whether its gradients were bad before they were summed over data-parallel ranks."""

    @classmethod
    def of_this_rank(
        cls,
        heads: list[Finding],
        losses: list[Finding],
        gradients: list[Finding],
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


def describe(ranks: Sequence[RankFindings], grad_norm: float) -> str:
    """Name where it began: head outputs of the first layer, else losses, else gradients.

    What a bad number spoils after it, forward and backward, is left out.

    Args:
        ranks: The findings of all ranks.
        grad_norm: Of the whole gradient, before clipping.
    """
    sources = [found for found in ranks if found.is_gradient_source] or list(ranks)
    kinds = (
        {found.rank: found.heads for found in ranks},
        {found.rank: found.losses for found in ranks},
        {found.rank: found.gradients for found in sources},
    )
    by_rank: dict[int, list[Finding]] = next((kind for kind in kinds if any(kind.values())), {})
    if not by_rank:
        return f"the gradient's norm is {_kind(grad_norm)}, though every gradient is finite"
    is_loss = by_rank is kinds[1]
    first = min(finding.place for findings in by_rank.values() for finding in findings)
    parts = []
    for found in ranks:
        words = [
            finding.words
            for finding in by_rank.get(found.rank, [])
            if is_loss or finding.place == first
        ]
        if words:
            where = ", ".join(f"{name} {rank}" for name, rank in found.coordinates.items())
            parts.append(f"{_shortened(words)} on rank {found.rank} ({where})")
    return _shortened(parts, "; ")


def bad_heads(attentions: Sequence[HydraAttention], largest: Sequence[Tensor]) -> list[Finding]:
    """The heads whose output is NaN or Inf.

    Args:
        attentions: This rank's layers.
        largest: For each layer the largest absolute output of each local head, `[n]`.
    """
    findings = []
    for attention, values in zip(attentions, largest, strict=True):
        layer = attention.layer_number - 1
        heads = attention.proj_section.units
        kinds = attention.placement.layer_plan.kinds
        bad = [(h, v) for h, v in zip(heads, values.tolist(), strict=True) if not math.isfinite(v)]
        for head, value in bad:
            words = f"{_kind(value)} in the output of head {head} ({KINDS[kinds[head]].label})"
            findings.append(Finding(layer, f"{words} of layer {layer}"))
    return findings


def bad_losses(micro_batches: Sequence[dict[str, Any]]) -> list[Finding]:
    """The parts of the loss that are NaN or Inf.

    Args:
        micro_batches: What the loss reduction made of each: `sums` `[1 + parts]`, with the number
            of tokens first, and the parts' `names`.
    """
    return [
        Finding(number, f"{_kind(value)} in the loss part {name} of micro-batch {number}")
        for number, micro_batch in enumerate(micro_batches)
        for name, value in zip(micro_batch["names"], micro_batch["sums"][1:].tolist(), strict=True)
        if not math.isfinite(value)
    ]


def bad_gradients(chunks: Sequence[torch.nn.Module]) -> list[Finding]:
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
                # Backward ends at the embedding, and begins at what else stands outside layers.
                place = 1 if name.startswith("embedding") else -model.config.num_layers
                words = f"{_kind(gradient)} in the gradient of {name}"
            else:
                place = 1 - layer.layer_number
                units = _bad_units(layer, inner_name, gradient)
                words = f"{_kind(gradient)} in the gradient of {inner_name}{units}"
                words += f" of layer {layer.layer_number - 1}"
            findings.append(Finding(place, words))
    return findings


def _bad_units(layer: Any, name: str, gradient: Tensor) -> str:
    """` (la_query of head 2)`; nothing for what heads share, or where every head's rows are bad."""
    attention = layer.self_attention
    inner_name = name.removeprefix("self_attention.")
    per_head = attention.per_head_parameters()
    if inner_name == name or inner_name not in per_head:
        return ""
    sections, axis = per_head[inner_name]
    rows = [(section, unit) for section in sections for unit in section.units]
    bad = [
        _unit_words(section, unit)
        for (section, unit), part in zip(rows, _cut(sections, gradient, axis), strict=True)
        if not torch.isfinite(part).all()
    ]
    return "" if len(bad) == len(rows) > 1 else f" ({_shortened(bad)})"


def _cut(sections: Sequence[Section], tensor: Tensor, axis: int) -> Iterator[Tensor]:
    widths = [section.width for section in sections for _ in section.units]
    yield from tensor.narrow(axis, 0, sum(widths)).split(widths, dim=axis)


def _unit_words(section: Section, unit: int) -> str:
    noun = section.unit_noun
    return f"{section.name} of {noun} {unit}" if section.name else f"{noun} {unit}"


def _kind(value: float | Tensor) -> str:
    if isinstance(value, Tensor):
        return "NaN" if torch.isnan(value).any() else "Inf"
    return "NaN" if math.isnan(value) else "Inf"


def _shortened(words: Sequence[str], separator: str = ", ") -> str:
    shown = list(words[:_MAX_PARTS])
    if len(words) > _MAX_PARTS:
        shown.append(f"{len(words) - _MAX_PARTS} more")
    return separator.join(shown)
