"""A hybrid's parameters under Megatron's names and under those of the exported model.

Both ways go by one table: rows of the fused in-projection, parameters of a kind's own, and the rest
of a layer, which is the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_hydra.errors import UserError
from megatron_hydra.model.hydra_attention import HydraAttention
from megatron_hydra.model.mixers.base import Mixer
from megatron_hydra.teachers.conversion import ends_of
from megatron_hydra.teachers.weight_names import LAYER, Weight

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerLayer

# Megatron's word after a kind's prefix -> the exported projection's.
_PROJECTIONS = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "gate": "gate_proj",
    "decay": "decay_proj",
    "beta": "beta_proj",
}
_NORMS = {"q_layernorm.weight": "q_norm.weight", "k_layernorm.weight": "k_norm.weight"}
_FUSION = ("head_scale", "gate_weight")


def hybrid_tensors(model: GPTModel) -> Iterator[tuple[str, Tensor]]:
    """A hybrid's tensors under the exported model's names, a layer after the other.

    Args:
        model: Whole on one rank (TP=1, PP=1), of the `local` backend.

    Raises:
        UserError: As :func:`layer_tensors`.
    """
    parameters = dict(model.named_parameters())
    first, last = ends_of(model.config)
    yield from ((name, part) for name, (part,) in _named(first, parameters))
    for index, layer in enumerate(model.decoder.layers):
        yield from layer_tensors(layer, index)
    yield from ((name, part) for name, (part,) in _named(last, parameters))


def layer_tensors(layer: TransformerLayer, index: int) -> Iterator[tuple[str, Tensor]]:
    """A hybrid's layer's tensors under the exported model's names.

    Norms of a kind without a head in their layer are left out: no output depends on them.

    Args:
        layer: As one rank holds it whole, of the `local` backend.
        index: Of the layer, from 0.

    Raises:
        UserError: If the weight of a fusion's norm is not one, which the exported model has not.
    """
    for name, places in _places(layer, index):
        yield name, torch.cat(places) if len(places) > 1 else places[0]


@torch.no_grad()
def load_layer_tensors(layer: TransformerLayer, index: int, read: Callable[[str], Tensor]) -> None:
    """The way back: fill a layer with tensors, each read once and written before the next.

    Args:
        layer: As :func:`layer_tensors`.
        index: As there.
        read: Gives the tensor of a name.
    """
    for name, places in _places(layer, index):
        parts = read(name).split([len(place) for place in places])
        for place, part in zip(places, parts, strict=True):
            place.copy_(part)


def _places(layer: TransformerLayer, index: int) -> Iterator[tuple[str, list[Tensor]]]:
    """By the exported names, views of parameters that lie above each other in the tensor."""
    prefix, parameters = f"model.layers.{index}.", dict(layer.named_parameters())
    attention = layer.self_attention
    for name, places in _attention_places(attention):
        yield f"{prefix}self_attn.{name}", places
    yield f"{prefix}self_attn.o_proj.weight", [attention.linear_proj.weight]
    for name, places in _named(_rows_beside_attention(), parameters):
        yield prefix + name, places


def _attention_places(attention: HydraAttention) -> Iterator[tuple[str, list[Tensor]]]:
    """What a layer's attention has beside its output projection."""
    assert len(attention.placement.heads_per_rank) == 1, "one tensor-parallel rank holds all heads"
    for kind in ("weight", "bias"):
        joined = getattr(attention.in_proj, kind, None)
        if joined is None:
            continue
        for section in attention.layout.sections:
            if section.units:
                prefix, _, part = section.name.rpartition("_")
                rows = [joined[attention.layout.rows(section.name, u)] for u in section.units]
                yield f"{prefix}.{_PROJECTIONS[part]}.{kind}", rows
    for mixer in _mixers(attention):
        prefix = mixer.gate_name.removesuffix("_gate")
        for name, parameter in mixer.named_parameters():
            yield f"{prefix}.{_NORMS.get(name, name)}", [parameter]
    fusion = attention.fusion
    yield from ((name, [getattr(fusion, name)]) for name in _FUSION if hasattr(fusion, name))
    if fusion.norm is not None and not torch.all(fusion.norm.weight == 1):
        raise UserError(
            f"fusion.norm.weight of layer {attention.layer_number - 1} is not 1 everywhere: no "
            "release of this package trains it, and the exported model has no place for it"
        )


def _mixers(attention: HydraAttention) -> list[Mixer]:
    """Of the kinds that have a head in the layer."""
    mixers = [getattr(attention, kind.module_name) for kind in attention.kinds]
    return [mixer for mixer in mixers if mixer.heads]


def _rows_beside_attention() -> list[Weight]:
    return [row for row in LAYER if not row.megatron.startswith("self_attention.")]


def _named(rows: list[Weight], parameters: Mapping[str, Any]) -> Iterator[tuple[str, list[Tensor]]]:
    """Megatron's parameters by transformers' names; several lie in one, in equal parts."""
    for row in rows:
        parts = parameters[row.megatron].chunk(len(row.hugging_face))
        yield from ((name, [part]) for name, part in zip(row.hugging_face, parts, strict=True))
