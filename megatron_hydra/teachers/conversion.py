"""A teacher's tensors under transformers' names and under Megatron's, from one table both ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_hydra.teachers.families import family_of
from megatron_hydra.teachers.weight_names import EMBEDDING, FINAL_NORM, OUTPUT_LAYER, Weight

_SECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}


def expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Every tensor of a teacher in transformers' names, with its shape.

    Args:
        config: Has the attributes of HydraConfig that a teacher decides.
    """
    sizes = _sizes(config)
    return {
        name: tuple(sizes[word] for word in shape)
        for weight in _table(config)
        for name, shape in weight.hugging_face.items()
    }


def megatron_tensors(
    config: Any, tensors: Mapping[str, Tensor], ends: bool = True
) -> dict[str, Tensor]:
    """Rename and lay out a teacher's tensors as Megatron's GPTModel at TP=1 names them.

    ``linear_qkv`` holds, query group by query group, the group's query heads, its key and its
    value; ``linear_fc1`` holds the gate above the up projection.

    Args:
        config: As for :func:`expected_shapes`.
        tensors: As :func:`~megatron_hydra.teachers.weights.read_weights` returns them; all are
            used.
        ends: Whether the tensors beside the layers' are among them.
    """
    result = {}
    for weight, parts in _parts(config, tensors, ends):
        if weight.by_group:
            by_group = [part.unflatten(0, (config.num_query_groups, -1)) for part in parts.values()]
            result[weight.megatron] = torch.cat(by_group, dim=1).flatten(0, 1)
        else:
            result[weight.megatron] = _stacked(parts)
    return result


def hugging_face_tensors(
    config: Any, tensors: Mapping[str, Tensor], ends: bool = True
) -> dict[str, Tensor]:
    """The way back: a teacher's tensors as transformers names them.

    Args:
        config: As for :func:`expected_shapes`.
        tensors: As :func:`megatron_tensors` returns them; all are used.
        ends: As there.
    """
    rest, shapes = dict(tensors), expected_shapes(config)
    result = {}
    for weight in _table(config, ends):
        joined, groups = rest.pop(weight.megatron), config.num_query_groups
        rows = [shapes[name][0] for name in weight.hugging_face]
        if weight.by_group:
            by_group = joined.unflatten(0, (groups, -1)).split([n // groups for n in rows], dim=1)
            parts = [part.flatten(0, 1) for part in by_group]
        else:
            parts = list(joined.split(rows))
        result |= dict(zip(weight.hugging_face, parts, strict=True))
    assert not rest, f"tensors left over: {sorted(rest)}"
    return result


def tensors_by_head(
    config: Any, tensors: Mapping[str, Tensor], ends: bool = True
) -> dict[str, Tensor]:
    """As :func:`megatron_tensors`, but queries, keys and values apart and head by head.

    In place of ``linear_qkv.weight`` there are ``query.weight`` `[heads, d, h]`, ``key.weight`` and
    ``value.weight`` `[groups, d, h]`; the same, without h, of biases. They are views.
    """
    result = {}
    for weight, parts in _parts(config, tensors, ends):
        if not weight.by_group:
            result[weight.megatron] = _stacked(parts)
            continue
        prefix, _, kind = weight.megatron.rpartition("linear_qkv.")
        for name, part in parts.items():
            section = _SECTIONS[name.split(".")[-2]]
            result[f"{prefix}{section}.{kind}"] = part.unflatten(0, (-1, config.kv_channels))
    return result


def _parts(
    config: Any, tensors: Mapping[str, Tensor], ends: bool
) -> Iterator[tuple[Weight, dict[str, Tensor]]]:
    """Megatron's parameters in turn, each with transformers' tensors in it; all are used."""
    rest = dict(tensors)
    for weight in _table(config, ends):
        yield weight, {name: rest.pop(name) for name in weight.hugging_face}
    assert not rest, f"tensors left over: {sorted(rest)}"


def _stacked(parts: Mapping[str, Tensor]) -> Tensor:
    first, *others = parts.values()
    return torch.cat((first, *others)) if others else first


def ends_of(config: Any) -> tuple[list[Weight], list[Weight]]:
    """The parameters of a model before its layers, and those after them."""
    tied = config.share_embeddings_and_output_weights
    return [EMBEDDING], [FINAL_NORM, *([] if tied else [OUTPUT_LAYER])]


def _table(config: Any, ends: bool = True) -> list[Weight]:
    """All parameters of the model, with whole names."""
    layers = range(config.num_layers)
    rows = [weight.of_layer(layer) for layer in layers for weight in family_of(config).layer]
    first, last = ends_of(config) if ends else ([], [])
    return [*first, *rows, *last]


def _sizes(config: Any) -> dict[str, int]:
    """What the words of a shape mean."""
    return {
        "vocabulary": config.vocab_size,
        "hidden": config.hidden_size,
        "ffn": config.ffn_hidden_size,
        "head": config.kv_channels,
        "queries": config.num_attention_heads * config.kv_channels,
        "keys": config.num_query_groups * config.kv_channels,
    }
