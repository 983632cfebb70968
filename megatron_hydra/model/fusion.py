"""Fusion of the kinds' outputs: gates, per-head norm and scale, the teacher's head order.

Legend: s = sequence, b = batch, n = heads on the rank, of all kinds, d = head dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from hydra_kernels.head_fusion import head_fusion
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from megatron_hydra.model.config import HydraConfig
from megatron_hydra.model.head_parameters import HeadModule, head_parameter, initial_device
from megatron_hydra.model.kernel_choice import choose_fused_kernels
from megatron_hydra.model.mixers.base import Mixer
from megatron_hydra.model.placement import LayerPlacement
from megatron_hydra.model.projection import Section, Sections

logger = logging.getLogger(__name__)


class HeadFusion(HeadModule):
    """Scale-normalised fusion (arXiv 2606.20097, Eq 13-14) and its ablations by `config.fusion`.

    `scale`: RMSNorm of each head times a learnable scalar of the head; `norm`: no scalar;
    `none`: neither; `gate`: as `scale`, and the first kind, full attention, and the others weighted
    by a softmax over the two that depends on the token (twice its weight, so that both start at 1).

    The RMSNorm's weight by channel stays at one: the output projection's columns absorb it. So
    where `config.fused_kernels` comes to `triton`, one kernel computes all of it and leaves that
    weight out; but for `gate` and for layers of more than two kinds, which have no kernel and
    always run on PyTorch and the backend's norm.

    Args:
        config: The model's configuration.
        submodules: A `HydraAttentionSubmodules`.
        kinds: The layer's kinds in order, full attention first.
        placement: The layer's heads on all ranks.
        pg_collection: Process groups, of which `tp` is used.
    """

    own_parameters = ("norm.weight", "head_scale", "gate_weight")
    """No teacher has them."""
    float32_parameters = ("head_scale", "gate_weight")

    def __init__(
        self,
        config: HydraConfig,
        submodules: Any,
        kinds: Sequence[type[Mixer]],
        placement: LayerPlacement,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
        rank = self.tp_group.rank()
        heads = placement.heads_per_rank[rank]
        all_heads = tuple(range(placement.layer_plan.num_heads))
        self.head_section = Section("", heads, all_heads, 1)
        self.kinds = tuple(kinds)
        by_kind = [head for kind in kinds for head in placement.heads_of(rank, kind.kind)]
        order = [by_kind.index(head) for head in heads]
        device = initial_device(config)
        self.register_buffer("order", torch.tensor(order, device=device), persistent=False)
        positions = torch.tensor([heads.index(head) for head in by_kind], device=device)
        self.register_buffer("positions", positions, persistent=False)
        self.impl = choose_fused_kernels(config.fused_kernels)
        if self.impl == "triton" and (config.fusion == "gate" or len(kinds) != 2):
            self.impl = "reference"
            if rank == 0:
                _log_no_kernel(
                    "fusion 'gate'" if config.fusion == "gate" else f"a layer of {len(kinds)} kinds"
                )
        self.norm = None
        if config.fusion != "none":
            self.norm = build_module(
                submodules.head_norm,
                hidden_size=config.kv_channels,
                config=config,
                eps=config.layernorm_epsilon,
            )
            self.norm.requires_grad_(False)
        if config.has_head_scales:
            self.head_scale = head_parameter(config, torch.ones(len(heads)))
        if config.fusion == "gate":
            self.gate_weight = torch.nn.Parameter(torch.zeros(2, config.hidden_size, device=device))
            self.gate_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self, outputs: Sequence[Tensor], sections: Sections, hidden_states: Tensor
    ) -> Tensor:
        """Fuse the kinds.

        Args:
            outputs: Of each of the kinds, `[s, b, its heads, d]`.
            sections: The in-projection's parts, for the gates.
            hidden_states: The layer's input `[s, b, h]` (`[s / tp, b, h]` under sequence
                parallelism), for the dynamic gate.

        Returns:
            `[s, b, n * d]`, heads in the teacher's order.
        """
        if self.impl == "triton":
            return self._fuse_in_one(*outputs, sections)
        fused = [self._norm(output) for output in outputs]
        for index, kind in enumerate(self.kinds):
            if kind.gate_name in sections:
                is_silu = kind.gate_activation(self.config) == "silu"
                gate = F.silu if is_silu else _identity_gate
                fused[index] = fused[index] * gate(sections[kind.gate_name])
        if self.config.fusion == "gate":
            first, others = self._branch_weights(hidden_states)
            fused = [fused[0] * first, *(x * others for x in fused[1:])]
        heads = torch.cat(fused, dim=2).index_select(2, self.order)
        if self.config.has_head_scales:
            heads = heads * self.head_scale.to(heads.dtype).view(1, 1, -1, 1)
        return heads.flatten(2)

    def _fuse_in_one(self, fa: Tensor, la: Tensor, sections: Sections) -> Tensor:
        """All of `forward` in one kernel, of full attention's heads and those of another kind."""
        config, gradients = self.config, sections.gradients
        _, other = self.kinds
        names = [kind.gate_name for kind in self.kinds]
        gates = [name for name in names if name in sections]
        return head_fusion(
            fa,
            la,
            *(sections.get(name) for name in names),
            self.head_scale if config.fusion == "scale" else None,
            self.positions,
            eps=None if config.fusion == "none" else config.layernorm_epsilon,
            la_activation=other.gate_activation(config),
            empty_gradients=lambda: gradients.empty(*gates),
            impl="triton",
        )

    def _norm(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.norm is not None and x.shape[2] else x

    def _branch_weights(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Twice the softmax over the first kind and the others, two tensors `[s, b, 1, 1]`."""
        weights = 2.0 * F.linear(hidden_states.float(), self.gate_weight).softmax(dim=-1)
        # Each rank weighs its own heads, so the gradient is a sum over ranks either way.
        if self.config.sequence_parallel:
            weights = gather_from_sequence_parallel_region(weights, group=self.tp_group)
        else:
            weights = copy_to_tensor_model_parallel_region(weights, group=self.tp_group)
        weights = weights.to(hidden_states.dtype).unsqueeze(-1).unsqueeze(-1)
        return weights[:, :, 0], weights[:, :, 1]


def _identity_gate(x: Tensor) -> Tensor:
    """A gate in (0, 2) that is 1 at zero."""
    return 2.0 * x.sigmoid()


@cache
def _log_no_kernel(what: str) -> None:
    """Once per process and reason."""
    logger.info("%s has no Triton kernel: heads are fused by PyTorch", what)
