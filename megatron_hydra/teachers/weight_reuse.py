"""What a hybrid inherits from its teacher: weights head by head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_hydra.model.fusion import HeadFusion
from megatron_hydra.model.hydra_attention import HydraAttention
from megatron_hydra.model.mixers.kinds import KINDS

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

_PARTS = ("query", "key", "value")
# Parameters that no teacher has: they keep the layer's own start.
_NEW_PARAMETERS = {
    *(f"{kind.module_name}.{name}" for kind in KINDS.values() for name in kind.head_tensors),
    *(f"fusion.{name}" for name in HeadFusion.own_parameters),
}
_NORMS = {
    f"{kind.module_name}.{norm}.weight": f"{norm}.weight"
    for kind in KINDS.values()
    for norm in kind.teacher_norms
}


@dataclass
class ReuseSummary:
    """How many values of the hybrid came from the teacher, and how many are new, part by part."""

    reused: Counter[str] = field(default_factory=Counter)
    new: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Plain JSON."""
        return {"reused": dict(self.reused), "new": dict(self.new)}

    @classmethod
    def total(cls, parts: Iterable[Mapping[str, Mapping[str, int]]]) -> ReuseSummary:
        """Of parts of a model, each as :meth:`to_dict` gives it."""
        whole = cls()
        for part in parts:
            whole.reused.update(part["reused"])
            whole.new.update(part["new"])
        return whole


@torch.no_grad()
def reuse_teacher_weights(
    model: GPTModel,
    teacher_tensors: Mapping[str, Tensor],
    head_rms: Tensor | None = None,
    attention: bool = True,
) -> ReuseSummary:
    """Write the teacher's weights into a hybrid, or a layer of one, on one rank (TP=1, PP=1).

    Embeddings, norms and MLPs are copied. A head's query, and the output projection's columns,
    keep their place; a head that shares no keys and values gets a copy of its query group's. Rows
    that no teacher has keep the layer's own start. Every parameter of the hybrid is either written
    or new by name, and every tensor of the teacher is used, else an assertion fails.

    Args:
        model: The hybrid, of the `local` backend; its checkpoint loads into any backend.
        teacher_tensors: The teacher's, queries, keys and values head by head, as
            :func:`~megatron_hydra.teachers.conversion.tensors_by_head` returns them.
        head_rms: `[layers, heads]`, as :mod:`~megatron_hydra.teachers.calibration` measures it;
            becomes the fusion's scale per head, so that the copied output projection sees its old
            scale (after Eq 13-14 of arXiv 2606.20097). None, or a fusion without scales, leaves
            the layer's own start.
        attention: Whether attentions are written; without, they keep their own start, as a control
            for what the teacher's are worth.

    Returns:
        What was written, to report.
    """
    rest = dict(teacher_tensors)
    summary = ReuseSummary()
    written: set[str] = set()
    for index, layer in enumerate(model.decoder.layers):
        assert isinstance(layer.self_attention, HydraAttention), type(layer.self_attention)
        prefix = f"decoder.layers.{index}.self_attention."
        teacher = {
            name.removeprefix(prefix): rest.pop(name)
            for name in list(rest)
            if name.startswith(prefix)
        }
        rms = None if head_rms is None else head_rms[index]
        if attention:
            names = _write_attention(layer.self_attention, teacher, rms, summary)
        else:
            names = [name for name, _ in layer.self_attention.named_parameters()]
            count_new(layer.self_attention, summary)
        written |= {prefix + name for name in names}
    for name, parameter in model.named_parameters():
        if name not in written:
            assert name in rest, f"the teacher has no {name}"
            _copy(parameter, rest.pop(name), part_of_model(name), summary)
    assert not rest, f"teacher tensors without a place in the hybrid: {sorted(rest)}"
    return summary


def count_new(model: torch.nn.Module, summary: ReuseSummary) -> None:
    """Count a model, or a module of one, as new, part by part."""
    for name, parameter in model.named_parameters():
        is_attention = "self_attention." in name or isinstance(model, HydraAttention)
        summary.new["attentions" if is_attention else part_of_model(name)] += parameter.numel()


def _write_attention(
    attention: HydraAttention,
    teacher: dict[str, Tensor],
    head_rms: Tensor | None,
    summary: ReuseSummary,
) -> list[str]:
    """Fill one layer's attention; return the names of its parameters, each dealt with."""
    used = {"linear_proj.weight"}
    for name, parameter in attention.named_parameters():
        if name in ("in_proj.weight", "in_proj.bias"):
            kind = name.removeprefix("in_proj.")
            sources = {part: teacher[f"{part}.{kind}"] for part in _PARTS}
            used |= {f"{part}.{kind}" for part in _PARTS}
            _write_projection(attention, parameter, sources, summary)
        elif name == "linear_proj.weight":
            _copy(parameter, teacher["linear_proj.weight"], "output projections", summary)
        elif name in _NORMS:
            _copy(parameter, teacher[_NORMS[name]], "norms", summary)
            used.add(_NORMS[name])
        elif name == "fusion.head_scale" and head_rms is not None:
            _copy(parameter, head_rms, "head scales (teacher's RMS)", summary)
        else:
            assert name in _NEW_PARAMETERS, f"unknown attention parameter {name}"
            summary.new[name] += parameter.numel()
    assert set(teacher) == used, f"teacher's attention has {sorted(teacher)}"
    return [name for name, _ in attention.named_parameters()]


def _write_projection(
    attention: HydraAttention,
    parameter: Tensor,
    sources: Mapping[str, Tensor],
    summary: ReuseSummary,
) -> None:
    """Fill the in-projection's weight or bias.

    Args:
        attention: Its layer.
        parameter: `[rows, h]`, or `[rows]`.
        sources: The teacher's by part: `[heads, d, h]` of queries, `[groups, d, h]` of keys and
            values; without h for a bias.
        summary: Counts the values.
    """
    placement = attention.placement
    assert len(placement.heads_per_rank) == 1, "weights are reused on one tensor-parallel rank"
    per_group = placement.layer_plan.num_heads // placement.num_query_groups
    for section in attention.layout.sections:
        # Head h has its own copy of what group h // per_group has.
        is_copy = section.teacher in ("key", "value") and not section.is_by_group
        for unit in section.units:
            rows = parameter[attention.layout.rows(section.name, unit)]
            if section.teacher:
                rows.copy_(sources[section.teacher][unit // per_group if is_copy else unit])
            elif section.starts_at_zero:
                rows.zero_()
            counts = summary.reused if section.teacher else summary.new
            counts[section.name] += rows.numel()
    parameter[attention.layout.padding_rows] = 0


def _copy(target: Tensor, source: Tensor, part: str, summary: ReuseSummary) -> None:
    assert target.shape == source.shape, (part, target.shape, source.shape)
    target.copy_(source)
    summary.reused[part] += target.numel()


def part_of_model(name: str) -> str:
    """Of which part of the model, as a summary calls it, a parameter outside attentions is."""
    if "norm" in name:
        return "norms"
    return "MLPs" if ".mlp." in name else "embeddings"
