"""The layer: one in-projection, heads of several kinds, their fusion, one output projection.

Legend: s = sequence, b = batch, h = hidden size, n = heads on the tensor-parallel rank,
d = head dimension.

    hidden [s, b, h] -> in_proj -> sections by kind and head (`projection.py`)
        fa_* -> FullAttention [s, b, n_fa, d] -\\
        la_* -> GatedDeltaNet [s, b, n_la, d] --> HeadFusion [s, b, n d] -> linear_proj
        and so on for all kinds that the layer has
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from megatron_hydra.head_plan import LayerHeadPlan
from megatron_hydra.model.checkpoint_shards import sharded_heads
from megatron_hydra.model.config import HydraConfig
from megatron_hydra.model.context_parallel import Pieces
from megatron_hydra.model.decoding import LayerState, check_decoding
from megatron_hydra.model.fusion import HeadFusion
from megatron_hydra.model.head_parameters import init_heads
from megatron_hydra.model.kernel_choice import choose_fused_kernels, choose_la_kernel
from megatron_hydra.model.mixers.base import Mixer, Stream
from megatron_hydra.model.mixers.kinds import kinds_of_layer, lay_out
from megatron_hydra.model.placement import place_heads
from megatron_hydra.model.projection import Section

logger = logging.getLogger(__name__)

# Measured on an H100, see kernels/benchmarks/RESULTS.md: beyond it either kind fills the GPU.
_OVERLAP_TOKENS = 32768


@dataclass
class HydraAttentionSubmodules:
    """The backend's modules that the layer is built of."""

    in_proj: ModuleSpec | type
    core_attention: ModuleSpec | type
    q_layernorm: ModuleSpec | type
    k_layernorm: ModuleSpec | type
    head_norm: ModuleSpec | type
    linear_proj: ModuleSpec | type


class HydraAttention(MegatronModule):
    """Attention with heads of several kinds; takes the place of Megatron's SelfAttention.

    Args:
        config: The model's configuration.
        submodules: The backend's modules.
        layer_plan: The kind of each head of this layer.
        layer_number: Counts from 1.
        pg_collection: Process groups, of which `tp`, `cp` and `dp_cp` are used; None takes
            Megatron's global groups.
        cp_comm_type: As :class:`~megatron_hydra.model.mixers.base.Mixer`.
    """

    def __init__(
        self,
        config: HydraConfig,
        submodules: HydraAttentionSubmodules,
        layer_plan: LayerHeadPlan,
        layer_number: int,
        pg_collection: ProcessGroupCollection | None = None,
        cp_comm_type: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(
                required_pgs=["tp", "cp", "dp_cp"]
            )
        self.pg_collection, self.layer_number = pg_collection, layer_number
        tp_rank, tp_size = pg_collection.tp.rank(), pg_collection.tp.size()
        self.kinds = kinds_of_layer(layer_plan, config.la_kind)
        self.placement = place_heads(
            layer_plan.resolved(config.la_kind),
            config.num_query_groups,
            tp_size,
            config.placement,
            config.seq_length,
            config.cost_model,
        )
        self._log_placement()
        self.layout = lay_out(config, config.kv_channels, self.placement, tp_rank)
        heads = self.placement.heads_per_rank[tp_rank]
        self.proj_section = Section(
            "", heads, tuple(range(config.num_attention_heads)), config.kv_channels
        )
        # Ranks may have different numbers of rows. Megatron's and Transformer Engine's linears
        # divide by the TP size, so they are told this rank's size times it.
        self.in_proj = build_module(
            submodules.in_proj,
            config.hidden_size,
            self.layout.num_rows * tp_size,
            config=config,
            init_method=_leave,
            gather_output=False,
            bias=config.add_qkv_bias,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=pg_collection.tp,
        )
        shared = (config, submodules, self.placement, layer_number, pg_collection, cp_comm_type)
        for kind in self.kinds:
            self.add_module(kind.module_name, kind(*shared))
        if tp_rank == 0:
            core = submodules.core_attention
            name = getattr(core, "__name__", str(core))
            fused = choose_fused_kernels(config.fused_kernels)
            _log_choice(name, choose_la_kernel(config.la_kernel), fused)
        self.fusion = HeadFusion(config, submodules, self.kinds, self.placement, pg_collection)
        self.linear_proj = build_module(
            submodules.linear_proj,
            len(heads) * config.kv_channels * tp_size,
            config.hidden_size,
            config=config,
            init_method=_leave,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=pg_collection.tp,
        )
        # Megatron's selective recomputation, which means softmax attention there.
        self.recomputes_mixing = (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )
        if config.perform_initialization:
            self._init_projections()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Run the layer.

        Args:
            hidden_states: `[s, b, h]`; `[s / tp, b, h]` under sequence parallelism. s counts this
                context-parallel rank's tokens, cut as `sequence.py` says. Not normed yet
                where the in-projection brings the norm (`layer_specs.py`).
            attention_mask: Ignored: attention is causal.
            rotary_pos_emb: Megatron's rotary angles `[s, 1, 1, d]`, of this rank's tokens; for a
                packed row of positions 0 and up instead, `[longest document, 1, 1, d]`, and with an
                inference context too, `[its longest sequence, 1, 1, d]`.
            inference_context: Megatron's `StaticInferenceContext`, which holds what the layer keeps
                of the tokens before (`decoding.py`); any number of tokens may come. None for whole
                sequences.
            packed_seq_params: Where a packed row's documents lie (`thd`), with b = 1; see
                `sequence.packed_sequence`.

        Returns:
            The output, shaped as `hidden_states`, and no bias.

        Raises:
            ValueError: Without rotary angles where a kind needs them.
            UserError: With an inference context that does not fit, or beside what decoding does not
                know.
        """
        if inference_context is not None:
            check_decoding(self.config, inference_context, self.training, packed_seq_params)
        if isinstance(rotary_pos_emb, tuple):
            rotary_pos_emb = rotary_pos_emb[0]
        if rotary_pos_emb is None and (self.config.fa_rope or self.config.la_rope):
            raise ValueError("fa_rope or la_rope is on, but the model passes no rotary_pos_emb")
        projected, _ = self.in_proj(hidden_states)
        state = None
        if inference_context is not None:
            state = LayerState.of(inference_context, self.layer_number, self.mixers(), projected)

        def mix(projected: Tensor, hidden_states: Tensor) -> Tensor:
            return self._mix(projected, hidden_states, rotary_pos_emb, packed_seq_params, state)

        if self.recomputes_mixing and self.training:
            fused = checkpoint(mix, False, projected, hidden_states)
        else:
            fused = mix(projected, hidden_states)
        if state is not None:
            state.advance(len(projected))
        return self.linear_proj(fused)

    def _mix(
        self,
        projected: Tensor,
        hidden_states: Tensor,
        rotary_pos_emb: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
        state: LayerState | None,
    ) -> Tensor:
        """What lies between the projections: `[s, b, rows]` to `[s, b, n d]`."""
        sections = self.layout.split(projected)
        first_position = 0 if state is None else state.num_tokens
        cp_group = self.pg_collection.cp
        pieces = Pieces.of(len(projected), packed_seq_params, cp_group, first_position)
        stream = Stream.of(pieces, packed_seq_params, rotary_pos_emb, state)
        first, *others = self.mixers()
        if state is None and self._overlaps(projected):
            main, side = torch.cuda.current_stream(), _side_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                beside = [mixer(sections, stream) for mixer in others]
            outputs = [first(sections, stream), *beside]
            main.wait_stream(side)
            # Both passes read these on the stream that did not make them: their memory must not
            # be given to others as soon as the stream that did is through with them.
            for shared in (projected, stream.angles, stream.piece_angles):
                if shared is not None:
                    shared.record_stream(side)
            for output in beside:
                output.record_stream(main)
        else:
            outputs = [mixer(sections, stream) for mixer in (first, *others)]
        return self.fusion(outputs, sections, hidden_states)

    def mixers(self) -> list[Mixer]:
        """Of the layer's kinds, in order."""
        return [getattr(self, kind.module_name) for kind in self.kinds]

    def _overlaps(self, projected: Tensor) -> bool:
        if not projected.is_cuda:
            return False
        if self.config.overlap_branches is not None:
            return self.config.overlap_branches
        num_tokens = projected.shape[0] * projected.shape[1]
        return num_tokens <= _OVERLAP_TOKENS and self.pg_collection.cp.size() == 1

    def per_head_parameters(self) -> dict[str, tuple[Sequence[Section], int]]:
        """Which rows of a parameter belong to which head.

        Returns:
            By the parameter's name: its sections in order, and the dimension that they lie on.
            The in-projection's padding comes after them. A name without a parameter on this rank
            may be among them.
        """
        of_kinds = {
            f"{mixer.module_name}.{name}": (sections, 0)
            for mixer in self.mixers()
            for name, sections in mixer.parameter_sections().items()
        }
        return {
            "in_proj.weight": (self.layout.sections, 0),
            "in_proj.bias": (self.layout.sections, 0),
            "linear_proj.weight": ([self.proj_section], 1),
            **of_kinds,
            "fusion.head_scale": ([self.fusion.head_section], 0),
        }

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Describe the parameters to Megatron's distributed checkpoints, one shard per head."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        replica_id = (0, 0, metadata["dp_cp_group"].rank())
        by_head = self.per_head_parameters()
        result: dict[str, Any] = {}
        replicated: dict[str, Any] = {}
        for name, value in self.state_dict(keep_vars=True).items():
            if name not in by_head:
                replicated[name] = value
                continue
            sections, axis = by_head[name]
            result[prefix + name] = sharded_heads(
                prefix + name,
                value,
                sections,
                axis=axis,
                num_padding=self.layout.num_padding_rows if name.startswith("in_proj.") else 0,
                sharded_offsets=sharded_offsets,
                replica_id=replica_id,
            )
        result.update(
            make_sharded_tensors_for_checkpoint(
                replicated,
                prefix,
                sharded_offsets=sharded_offsets,
                tp_group=self.pg_collection.tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
        )
        return result

    def _init_projections(self) -> None:
        """Fill both projections head by head, the same for every layout."""
        config = self.config
        fill = dict(seed=config.head_init_seed, layer_number=self.layer_number)

        def normal(tensor: Tensor, generator: torch.Generator) -> None:
            tensor.normal_(0.0, config.init_method_std, generator=generator)

        parts = []
        for section in self.layout.sections:
            init = _zero if section.starts_at_zero else normal
            parts.append(init_heads(section, init, num_columns=config.hidden_size, **fill))
        parts.append(torch.zeros(self.layout.num_padding_rows, config.hidden_size))
        columns = init_heads(self.proj_section, normal, num_columns=config.hidden_size, **fill)
        with torch.no_grad():
            self.in_proj.weight.copy_(torch.cat(parts))
            if config.add_qkv_bias:
                self.in_proj.bias.zero_()
            self.linear_proj.weight.copy_(columns.t() / (2.0 * config.num_layers) ** 0.5)

    def _log_placement(self) -> None:
        placement = self.placement
        if self.pg_collection.tp.rank() == 0 and placement.tp_size > 1:
            dearest = max(placement.predicted_costs)
            logger.info(
                "layer %d, placement %s at %d tokens: FA heads per rank %s, "
                "predicted cost per rank %s",
                self.layer_number - 1,
                self.config.placement,
                self.config.seq_length,
                [placement.fa_heads(rank) for rank in range(placement.tp_size)],
                [f"{cost / dearest:.2f}" for cost in placement.predicted_costs],
            )


@cache
def _side_stream() -> torch.cuda.Stream:
    """One for all layers of a process."""
    return torch.cuda.Stream()


@cache
def _log_choice(core_attention: str, la_kernel: str, fused_kernels: str) -> None:
    """Once per process and choice: all layers of a model run alike."""
    logger.info(
        "FA heads run on %s, LA heads on the kernel %r, what surrounds both on %r",
        core_attention,
        la_kernel,
        fused_kernels,
    )


def _leave(tensor: Tensor) -> None:
    """The projections are filled head by head afterwards."""


def _zero(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.zero_()
