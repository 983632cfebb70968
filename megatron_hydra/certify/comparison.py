"""How far two records are apart, quantity by quantity, and where: which tensor, which head."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hydra.certify.training import Record
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.mixers.kinds import KINDS
from megatron_hydra.model.options import HydraFields

QUANTITIES = ("logits", "loss", "gradient norm", "gradients", "parameters")
# A head's values are measured against the head's largest, but not below this part of its tensor's
# largest, nor this part of the largest of all: there is only the rounding of larger numbers.
_LEAST_OF_TENSOR, _LEAST_OF_ALL = 0.1, 1e-6
_ATTENTION = re.compile(r"decoder\.layers\.(\d+)\.self_attention\.(.*)")


@dataclass(frozen=True)
class Difference:
    """The largest relative difference of one quantity, and where it is."""

    value: float
    at: str = ""


def differences(found: Record, expected: Record, plan: HeadPlan) -> dict[str, Difference]:
    """The worst difference of each of :data:`QUANTITIES`.

    Tensors head by head: the largest difference over the largest value of the head.
    """
    return {
        "logits": logit_difference(found.logits, expected.logits),
        "loss": _worst_number(found.losses, expected.losses),
        "gradient norm": _worst_number(found.grad_norms, expected.grad_norms),
        "gradients": _worst(found.gradients, expected.gradients, plan),
        "parameters": _worst(found.parameters, expected.parameters, plan),
    }


def logit_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Difference:
    """The worst document: the largest difference over the largest logit of the document."""
    return _worst(found, expected, None)


def bit_differences(found: Record, expected: Record) -> Difference:
    """The worst absolute difference of two records that should have the same bits."""
    pairs = [("loss", torch.tensor(found.losses), torch.tensor(expected.losses))]
    pairs.append(
        ("gradient norm", torch.tensor(found.grad_norms), torch.tensor(expected.grad_norms))
    )
    for kind in ("logits", "gradients", "parameters", "optimizer_state"):
        ours, theirs = getattr(found, kind), getattr(expected, kind)
        _check_names(ours, theirs)
        pairs += [(f"{kind} {key}", ours[key], theirs[key]) for key in theirs]
    return _worst_bits(pairs)


def bit_differences_of_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Difference:
    """The same for named tensors."""
    _check_names(found, expected)
    return _worst_bits([(key, found[key], expected[key]) for key in expected])


def heads_of(key: str, plan: HeadPlan) -> tuple[int, list[str]] | None:
    """The axis of a stored tensor that heads lie on, and their names; None if it has no heads.

    Every head of the plan has the name of its kind (`HeadPlan.resolved`).
    """
    match = _ATTENTION.fullmatch(key)
    if match is None:
        return None
    layer, name = plan.layers[int(match[1])], match[2]
    every = range(layer.num_heads)
    if name.startswith("linear_proj.weight"):
        return 1, [f"head {head}" for head in every]
    if name.startswith("fusion.head_scale"):
        return 0, [f"head {head}" for head in every]
    groups = plan.fa_groups(int(match[1]))
    for kind in KINDS.values():
        heads = layer.heads_of(kind.kind)
        for section in kind.sections(HydraFields(), 1, (heads, heads), (groups, groups)):
            if name in (f"in_proj.weight.{section.name}", f"in_proj.bias.{section.name}"):
                return 0, [f"{section.unit_noun} {unit}" for unit in section.units]
        tensors = [f"{kind.module_name}.{tensor}" for tensor in kind.head_tensors]
        if any(name == tensor or name.startswith(f"{tensor}.") for tensor in tensors):
            return 0, [f"head {head}" for head in heads]
    return None


def _worst(
    found: dict[str, Tensor], expected: dict[str, Tensor], plan: HeadPlan | None
) -> Difference:
    _check_names(found, expected)
    largest = max((_size(value) for value in expected.values()), default=0.0)
    worst = Difference(0.0)
    for key, theirs in expected.items():
        least = max(_LEAST_OF_TENSOR * _size(theirs), _LEAST_OF_ALL * largest)
        for name, ours_part, theirs_part in _parts(key, found[key], theirs, plan):
            distance = (ours_part.double() - theirs_part.double()).abs().max().item()
            scale = max(_size(theirs_part), least)
            value = distance / scale if scale else (math.inf if distance else 0.0)
            if math.isnan(value):
                value = math.inf
            if value > worst.value:
                worst = Difference(value, name)
    return worst


def _parts(
    key: str, ours: Tensor, theirs: Tensor, plan: HeadPlan | None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    heads = heads_of(key, plan) if plan is not None else None
    if heads is None:
        yield key, ours, theirs
        return
    axis, names = heads
    parts = (tensor.chunk(len(names), dim=axis) for tensor in (ours, theirs))
    for name, ours_part, theirs_part in zip(names, *parts, strict=True):
        yield f"{key}, {name}", ours_part, theirs_part


def _worst_number(found: list[float], expected: list[float]) -> Difference:
    values = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]
    values = [math.inf if math.isnan(value) else value for value in values]
    worst = max(values)
    return Difference(worst, f"step {values.index(worst)}" if worst else "")


def _worst_bits(pairs: list[tuple[str, Tensor, Tensor]]) -> Difference:
    worst = Difference(0.0)
    for name, ours, theirs in pairs:
        if not torch.equal(ours, theirs):
            distance = (ours.double() - theirs.double()).abs().max().item()
            if not distance > 0:  # NaN
                distance = math.inf
            if distance > worst.value:
                worst = Difference(distance, name)
    return worst


def _check_names(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    odd = found.keys() ^ expected.keys()
    assert not odd, f"the runs have different tensors: {sorted(odd)[:5]}"


def _size(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
