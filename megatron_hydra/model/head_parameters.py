"""Per-head parameters: a rank's own, with the same initial values in every layout.

A rank's tensor holds its own heads' rows. What Megatron must know of such a tensor is set here: it
is one rank's own, not a replica. How a checkpoint names and stores it, `checkpoint_shards` says.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_hydra.model.config import HydraConfig
from megatron_hydra.model.projection import Section

InitHead = Callable[[Tensor, torch.Generator], Any]


class HeadModule(MegatronModule):
    """A module some of whose per-head parameters stay float32 in a model of lower precision.

    Megatron casts whole models to bfloat16; a decay rate or a scale of one number per head loses
    its updates there, and costs nothing in float32.
    """

    float32_parameters: tuple[str, ...] = ()

    def _apply(self, fn: Callable, recurse: bool = True) -> HeadModule:
        names = [name for name in self.float32_parameters if name in self._parameters]
        before = {name: self._parameters[name].data for name in names}
        super()._apply(fn, recurse)
        for name, data in before.items():
            parameter = self._parameters[name]
            parameter.data = data.to(parameter.device)
        return self


def mark_rank_local(parameter: torch.nn.Parameter) -> None:
    """Tell Megatron that the tensor is this rank's own, so that gradient norms count every rank."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = 0  # type: ignore[attr-defined]
    parameter.partition_stride = 1  # type: ignore[attr-defined]


def initial_device(config: HydraConfig) -> torch.device | None:
    """Where Megatron's modules make their tensors: None is PyTorch's default device."""
    return None if config.use_cpu_initialization else torch.cuda.current_device()


def head_parameter(config: HydraConfig, tensor: Tensor) -> torch.nn.Parameter:
    """A parameter that holds this rank's heads along dimension 0, from its initial values."""
    parameter = torch.nn.Parameter(tensor.to(initial_device(config)))
    mark_rank_local(parameter)
    return parameter


def init_heads(
    section: Section,
    init: InitHead,
    *,
    seed: int,
    layer_number: int,
    num_columns: int | None = None,
) -> Tensor:
    """Initial values of a section's units, float32 on the CPU.

    Each unit draws from a generator of its own, seeded by layer, section and the teacher's index.
    So a head starts the same on any rank, and no rank draws from a shared generator more often
    than another, which would leave the ranks' later draws apart.

    Args:
        section: Names the units and their rows.
        init: Fills one unit's tensor in place from a generator.
        seed: `HydraFields.head_init_seed`.
        layer_number: Counts from 1.
        num_columns: Columns of a matrix; None for a vector.

    Returns:
        `[units * width, num_columns]`, or `[units * width]`.
    """
    columns = () if num_columns is None else (num_columns,)
    values = torch.empty(len(section.units), section.width, *columns)
    for value, unit in zip(values, section.units, strict=True):
        key = f"{seed}/{layer_number}/{section.name}/{unit}"
        init(value, torch.Generator().manual_seed(zlib.crc32(key.encode())))
    return values.flatten(0, 1)
