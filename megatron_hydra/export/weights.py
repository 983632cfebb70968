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
_NORM_OF_FUSION = "fusion.norm.weight"


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
    parameters = dict(model.named_parameters())
    yield from _named([EMBEDDING], parameters)
    for index, layer in enumerate(progress(list(model.decoder.layers))):
        prefix = f"model.layers.{index}.self_attn."
        attention = layer.self_attention
        for name, tensor in attention_tensors(attention).items():
            yield prefix + name, tensor
        yield f"{prefix}o_proj.weight", attention.linear_proj.weight
        yield from _named([row.of_layer(index) for row in _rows_beside_attention()], parameters)
    yield from _named([FINAL_NORM], parameters)
    if not model.share_embeddings_and_output_weights:
        yield from _named([OUTPUT_LAYER], parameters)


def attention_tensors(attention: HydraAttention) -> dict[str, Tensor]:
    """What a layer's attention has beside its output projection, by the exported names."""
    assert len(attention.placement.heads_per_rank) == 1, "one tensor-parallel rank holds all heads"
    result = {}
    for kind in ("weight", "bias"):
        joined = getattr(attention.in_proj, kind, None)
        if joined is None:
            continue
        for section in attention.layout.sections:
            if section.units:
                prefix, _, part = section.name.rpartition("_")
                rows = [joined[attention.layout.rows(section.name, u)] for u in section.units]
                result[f"{prefix}.{_PROJECTIONS[part]}.{kind}"] = torch.cat(rows)
    for mixer in _mixers(attention):
        prefix = mixer.gate_name.removesuffix("_gate")
        for name, parameter in mixer.named_parameters():
            result[f"{prefix}.{_NORMS.get(name, name)}"] = parameter
    fusion = attention.fusion
    result |= {name: getattr(fusion, name) for name in _FUSION if hasattr(fusion, name)}
    if fusion.norm is not None and not torch.all(fusion.norm.weight == 1):
        raise UserError(
            f"{_NORM_OF_FUSION} of layer {attention.layer_number - 1} is not 1 everywhere: no "
            "release of this package trains it, and the exported model has no place for it"
        )
    return result


def _mixers(attention: HydraAttention) -> list[Mixer]:
    """Of the kinds that have a head in the layer."""
    mixers = [getattr(attention, kind.module_name) for kind in attention.kinds]
    return [mixer for mixer in mixers if mixer.heads]


def _rows_beside_attention() -> list[Weight]:
    return [row for row in LAYER if not row.megatron.startswith("self_attention.")]


def _named(rows: list[Weight], parameters: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Megatron's parameters by transformers' names; several lie in one, in equal parts."""
    for row in rows:
        parts = parameters[row.megatron].chunk(len(row.hugging_face))
        yield from zip(row.hugging_face, parts, strict=True)
