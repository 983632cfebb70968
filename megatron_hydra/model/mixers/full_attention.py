"""Full attention: softmax over all that came before, keys and values shared by query groups.

Legend: s = sequence, b = batch, n = FA heads on the rank, d = head dimension, g = query groups.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from megatron_hydra.errors import UserError
from megatron_hydra.model.config import HydraConfig
from megatron_hydra.model.decoding import FOR_ONE_TOKEN, LayerState
from megatron_hydra.model.head_parameters import initial_device
from megatron_hydra.model.mixers.base import Mixer, Stream
from megatron_hydra.model.mixers.costs import FullAttentionCosts
from megatron_hydra.model.options import HydraFields
from megatron_hydra.model.projection import Section, Sections, Units
from megatron_hydra.model.sequence import SequenceLayout


class FullAttention(Mixer):
    """Softmax attention of the FA heads that one tensor-parallel rank owns.

    Raises:
        UserError: With `cp_comm_type` `a2a`, if the number of the rank's FA heads is not divisible
            by the context-parallel size.
    """

    label = "FA"
    module_name = "full_attention"
    costs = FullAttentionCosts()
    kind = costs.kind
    gate_name = "fa_gate"

    @classmethod
    def sections(
        cls, config: HydraFields, head_dim: int, heads: Units, groups: Units
    ) -> list[Section]:
        """Query and gate of each head, key and value of each query group that some head uses."""
        sections = [Section("fa_query", *heads, head_dim, teacher="query")]
        if config.fa_output_gate:
            sections.append(Section("fa_gate", *heads, head_dim, starts_at_zero=True))
        for name in ("key", "value"):
            shared = dict(teacher=name, is_by_group=True)
            sections.append(Section(f"fa_{name}", *groups, head_dim, **shared))
        return sections

    def _build(self, submodules: Any, cp_comm_type: str | None) -> None:
        config, groups = self.config, self.pg_collection
        self._build_norms(submodules)
        places, num_groups = self._key_index()
        self.has_key_each = places == list(range(num_groups))
        index = torch.tensor(places, dtype=torch.long, device=initial_device(config))
        self.register_buffer("key_index", index, persistent=False)
        self._build_kept(places, index.device)
        self.core_attention = None
        if cp_comm_type == "a2a" and len(self.heads) % groups.cp.size():
            raise UserError(
                f"cp_comm_type is a2a, but the {len(self.heads)} FA heads of layer "
                f"{self.layer_number - 1} on tensor-parallel rank {groups.tp.rank()} are not "
                f"divisible by the context-parallel size {groups.cp.size()}; p2p and all_gather "
                "need not"
            )
        if self.heads:
            self.core_attention = build_module(
                submodules.core_attention,
                config=_with_local_heads(config, len(self.heads), self.tp_group.size()),
                layer_number=self.layer_number,
                attn_mask_type=AttnMaskType.causal,
                attention_type="self",
                cp_comm_type=cp_comm_type,
                pg_collection=groups,
            )

    def forward(self, sections: Sections, stream: Stream) -> Tensor:
        """Attend.

        Args:
            sections: `fa_query` [s, b, n, d], `fa_key` and `fa_value` [s, b, owned groups, d].
            stream: The rank's tokens; the angles are used if `config.fa_rope`.

        Returns:
            `[s, b, n, d]`.
        """
        query, key, value = (sections[f"fa_{name}"] for name in ("query", "key", "value"))
        if self.placement.shares_groups:
            key, value = self._exchange_groups(key, value)
        if self.core_attention is None:
            # The exchange's backward collective runs on every rank.
            return self._stay_in_graph(query, key)
        query = self._scale_query(self.q_layernorm(query), stream.pieces.layout)
        query = self._rotated(query, stream)
        if stream.state is not None:
            keys, values = self._keep(key, value, stream, stream.state)
            if stream.state.num_tokens:
                return self._attend_to_kept(query, keys, values)
        if not self.has_key_each:
            key, value = key[:, :, self.key_index], value[:, :, self.key_index]
        key = self._rotated(self.k_layernorm(key), stream)
        # Where neither norm nor RoPE has made new tensors these are views of the projection, as the
        # value is, and Transformer Engine may take views of one buffer for another layout.
        query, key = query.contiguous(), key.contiguous()
        shape, mask_type = query.shape, AttnMaskType.causal
        if stream.packed_seq_params is not None:  # [t, n, d], as Megatron's thd format has it
            query, key, value = (t.squeeze(1) for t in (query, key, value))
            mask_type = AttnMaskType.padding_causal
        output = self.core_attention(
            query,
            key,
            value,
            None,
            attn_mask_type=mask_type,
            packed_seq_params=stream.packed_seq_params,
        )
        return output.view(shape)

    def empty_state(self, num_rows: int, num_tokens: int, like: Tensor) -> dict[str, Tensor]:
        """`keys` and `values` `[num_rows, g, num_tokens, d]`, g the groups that heads here use."""
        if not self.heads:
            return {}
        shape = (num_rows, len(self.kept_groups), num_tokens, self.config.kv_channels)
        return {name: like.new_zeros(shape) for name in ("keys", "values")}

    def _build_kept(self, places: list[int], device: torch.device) -> None:
        """Which of the groups at hand decoding keeps, and where heads find theirs among them.

        Of the groups kept, each has as many places for heads as the largest has heads.

        Args:
            places: Of :meth:`_key_index`.
            device: Of the indices.
        """
        groups = sorted(set(places))
        of_head = [groups.index(place) for place in places]
        most = max((of_head.count(group) for group in of_head), default=0)
        slots = [group * most + of_head[:i].count(group) for i, group in enumerate(of_head)]
        self.num_slots = len(groups) * most
        for name, index in (
            ("kept_groups", groups),
            ("kept_of_head", of_head),
            ("kept_slots", slots),
        ):
            tensor = torch.tensor(index, dtype=torch.long, device=device)
            self.register_buffer(name, tensor, persistent=False)

    def _rotated(self, x: Tensor, stream: Stream) -> Tensor:
        if not self.config.fa_rope:
            return x
        return apply_rotary_pos_emb(x, stream.angles, config=self.config)

    def _keep(
        self, key: Tensor, value: Tensor, stream: Stream, state: LayerState
    ) -> tuple[Tensor, Tensor]:
        """Keep keys and values `[s, b, groups at hand, d]`; all so far `[b, g, tokens, d]`."""
        key, value = key[:, :, self.kept_groups], value[:, :, self.kept_groups]
        key = self._rotated(self.k_layernorm(key), stream)
        kept, start = state.of_kind(self), state.num_tokens
        end = start + len(key)
        for name, new in (("keys", key), ("values", value)):
            kept[name][:, :, start:end] = new.permute(1, 2, 0, 3)
        return kept["keys"][:, :, :end], kept["values"][:, :, :end]

    def _attend_to_kept(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """`[s, b, n, d]` of queries of the last s tokens, `keys` and `values` `[b, g, t, d]`."""
        s, b, _, d = query.shape
        query, scale = query.permute(1, 2, 0, 3), self.config.softmax_scale
        if s == 1:
            # A step reads all keys once: queries are filled up rather than keys copied.
            filled = query.new_zeros(b, self.num_slots, s, d)
            filled = filled.index_copy(1, self.kept_slots, query)
            with sdpa_kernel(FOR_ONE_TOKEN):
                output = F.scaled_dot_product_attention(
                    filled, keys, values, scale=scale, enable_gqa=True
                ).index_select(1, self.kept_slots)
        else:
            keys, values = (x.index_select(1, self.kept_of_head) for x in (keys, values))
            t = keys.shape[2]
            mask = torch.ones(s, t, dtype=torch.bool, device=query.device).tril(t - s)
            output = F.scaled_dot_product_attention(query, keys, values, mask, scale=scale)
        return output.permute(2, 0, 1, 3)

    def _key_index(self) -> tuple[list[int], int]:
        """For each local head, its query group's place among the groups at hand; their number."""
        placement, rank = self.placement, self.tp_group.rank()
        at_hand = placement.owned_groups(rank)
        if placement.shares_groups:
            at_hand = tuple(g for slot in self._exchange_slots() for g in slot)
        per_group = placement.layer_plan.num_heads // placement.num_query_groups
        return [at_hand.index(head // per_group) for head in self.heads], len(at_hand)

    def _exchange_slots(self) -> list[tuple[int, ...]]:
        """The groups each rank sends, padded to equal counts by -1."""
        placement = self.placement
        owned = [placement.owned_groups(r) for r in range(self.tp_group.size())]
        most = max(len(groups) for groups in owned)
        return [groups + (-1,) * (most - len(groups)) for groups in owned]

    def _exchange_groups(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Gather keys and values of all owned groups over the TP ranks.

        Needed only where a query group's FA heads sit on several ranks. Each group is projected
        on its owner alone, so there is one copy of its weights and its gradient needs no care:
        the gather's backward sums the parts from all ranks.
        """
        s, b, owned, d = key.shape
        most = len(self._exchange_slots()[0])
        send = torch.cat((key, value), dim=-1).permute(2, 0, 1, 3)  # [owned, s, b, 2d]
        send = torch.cat((send, send.new_zeros(most - owned, s, b, 2 * d))).contiguous()
        received = gather_from_sequence_parallel_region(
            send, tensor_parallel_output_grad=True, group=self.tp_group
        )
        return received.permute(1, 2, 0, 3).split(d, dim=-1)  # type: ignore[return-value]

    def _scale_query(self, query: Tensor, layout: SequenceLayout) -> Tensor:
        config = self.config
        when = config.fa_query_scale
        if when == "none" or (when == "inference" and self.training):
            return query
        start, base = config.fa_query_scale_start, config.fa_query_scale_base
        position = layout.positions.to(query.device, torch.float32)
        scale = ((position - start).clamp_min(0) + base).log() / math.log(base)
        return query * scale.to(query.dtype).view(-1, 1, 1, 1)


def _with_local_heads(config: HydraConfig, heads: int, tp_size: int) -> HydraConfig:
    """A copy whose head counts make Megatron's core attention find `heads` on this rank.

    Keys and values reach it expanded to one per head, since FA heads may share groups unevenly.
    """
    local = copy.copy(config)
    local.num_attention_heads = local.num_query_groups = heads * tp_size
    return local
