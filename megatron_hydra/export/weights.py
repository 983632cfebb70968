"""A hybrid's parameters under Megatron's names and under those of the exported model.

Both ways go by one table: rows of the fused in-projection, parameters of a kind's own, and the rest
of a layer, which is the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_hydra.errors import UserError
from megatron_hydra.model.hydra_attention import HydraAttention
from megatron_hydra.model.mixers.base import Mixer
from megatron_hydra.teachers.base import EMBEDDING, FINAL_NORM, LAYER, OUTPUT_LAYER, Weight

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

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


def hybrid_tensors(
    model: GPTModel, progress: Callable[[Sequence[Any]], Iterable[Any]] = iter
) -> Iterator[tuple[str, Tensor]]:
    """A hybrid's tensors under the exported model's names, a layer after the other.

    Norms of a kind without a head in their layer are left out: no output depends on them.

    Args:
        model: Whole on one rank (TP=1, PP=1), of the `local` backend.
        progress: Wraps the iteration over layers, as tqdm does.

    Raises:
        UserError: If the weight of a fusion's norm is not one, which the exported model has not.
    """
    for name, places in _places(model, progress):
        yield name, torch.cat(places) if len(places) > 1 else places[0]


@torch.no_grad()
def load_hybrid_tensors(
    model: GPTModel,
    read: Callable[[str], Tensor],
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> list[str]:
    """The way back: fill a hybrid with tensors, each read once and written before the next.

    Args:
        model: As :func:`hybrid_tensors`.
        read: Gives the tensor of a name.
        progress: As :func:`hybrid_tensors`.

    Returns:
        The names that were read.

    Raises:
        UserError: If a tensor has another shape than its place.
    """
    names = []
    for name, places in _places(model, progress):
        tensor, rows = read(name), [len(place) for place in places]
        expected = (sum(rows), *places[0].shape[1:])
        if tuple(tensor.shape) != expected:
            raise UserError(
                f"tensor {name} has shape {tuple(tensor.shape)}; config.json asks for {expected}"
            )
        for place, part in zip(places, tensor.split(rows), strict=True):
            place.copy_(part)
        names.append(name)
    return names


def _places(
    model: GPTModel, progress: Callable[[Sequence[Any]], Iterable[Any]]
) -> Iterator[tuple[str, list[Tensor]]]:
    """By the exported names, views of parameters that lie above each other in the tensor."""
    parameters = dict(model.named_parameters())
    yield from _named([EMBEDDING], parameters)
    for index, layer in enumerate(progress(list(model.decoder.layers))):
        prefix = f"model.layers.{index}.self_attn."
        attention = layer.self_attention
        for name, places in _attention_places(attention):
            yield prefix + name, places
        yield f"{prefix}o_proj.weight", [attention.linear_proj.weight]
        yield from _named([row.of_layer(index) for row in _rows_beside_attention()], parameters)
    yield from _named([FINAL_NORM], parameters)
    if not model.share_embeddings_and_output_weights:
        yield from _named([OUTPUT_LAYER], parameters)


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
