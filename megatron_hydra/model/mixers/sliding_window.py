"""Sliding window: softmax attention over the last so many tokens, and a learnable sink.

Legend: s = sequence, b = batch, n = window heads on the rank, d = head dimension, m = the rank's
pieces of the stream (`context_parallel.py`), w = the window in tokens.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from hydra_kernels.window_attention import window_attention
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from megatron_hydra.model.config import HydraConfig
from megatron_hydra.model.context_parallel import Pieces
from megatron_hydra.model.decoding import LayerState
from megatron_hydra.model.head_parameters import head_parameter
from megatron_hydra.model.local_modules import LocalCoreAttention
from megatron_hydra.model.mixers.base import Mixer, Stream
from megatron_hydra.model.mixers.costs import SlidingWindowCosts
from megatron_hydra.model.options import HydraFields
from megatron_hydra.model.projection import Section, Sections, Units


class SlidingWindow(Mixer):
    """Attention over the last w tokens of the window heads that one tensor-parallel rank owns.

    Each head has its own copy of its query group's key and value; it keeps w of both and no more.
    q and k have the teacher's norms and RoPE. The sink is a logit per head that takes part in each
    softmax and adds nothing (gpt-oss, arXiv 2508.10925): weight that the teacher's head gave to
    tokens which have left the window, the first above all, need not go to those in it. As it scales
    outputs only, it tells where the fusion has no norm per head (`fusion: none`).

    On a GPU, with the backend `transformer_engine`, whole rows in half precision run on Transformer
    Engine's windowed attention, else on `hydra_kernels.window_attention`.
    """

    label = "window"
    module_name = "sliding_window_attention"
    costs = SlidingWindowCosts()
    kind = costs.kind
    gate_name = "window_gate"
    head_tensors = ("sink",)
    float32_parameters = ("sink",)

    @classmethod
    def sections(
        cls, config: HydraFields, head_dim: int, heads: Units, groups: Units
    ) -> list[Section]:
        """Query, key and value of each head's own, and its gate."""
        sections = [
            Section(f"window_{name}", *heads, head_dim, teacher=name)
            for name in ("query", "key", "value")
        ]
        if config.fa_output_gate:
            sections.append(Section(cls.gate_name, *heads, head_dim, starts_at_zero=True))
        return sections

    def _build(self, submodules: Any, cp_comm_type: str | None) -> None:
        self._build_norms(submodules)
        if self.config.sliding_window_sink and self.heads:
            self.sink = head_parameter(self.config, torch.zeros(len(self.heads)))
        self._core_attention = submodules.core_attention
        self._core: tuple[torch.nn.Module, ...] = ()

    def parameter_sections(self) -> dict[str, list[Section]]:
        """One sink per head."""
        return {"sink": [Section("", self.heads, self.all_heads, 1)]}

    def forward(self, sections: Sections, stream: Stream) -> Tensor:
        """Attend.

        Args:
            sections: `window_query`, `window_key`, `window_value` [s, b, n, d].
            stream: The rank's tokens; `piece_angles` are used.

        Returns:
            `[s, b, n, d]`.
        """
        query, key, value = (sections[f"window_{name}"] for name in ("query", "key", "value"))
        if not self.heads:
            return self._stay_in_graph(query, key, value)
        pieces = stream.pieces
        if pieces.moves_tokens:
            moved = pieces.to_contiguous(torch.cat((query, key, value), dim=-1))
            query, key, value = moved.chunk(3, dim=-1)
        query, key = (
            apply_rotary_pos_emb(norm(x), stream.piece_angles, config=self.config)
            for norm, x in ((self.q_layernorm, query), (self.k_layernorm, key))
        )
        before = num_before = None
        if stream.state is not None:
            before, num_before = self._pass_on(key, value, stream.state)
        if before is None and self._takes_transformer_engine(query, stream):
            return self._on_transformer_engine(query, key, value)
        query, key, value = (pieces.batch_first(x) for x in (query, key, value))
        if stream.state is None:
            before, num_before = self._tokens_before(key, value, pieces)
        output = window_attention(
            query,
            key,
            value,
            window=self.config.sliding_window_tokens,
            sink=getattr(self, "sink", None),
            scale=self.config.softmax_scale,
            before=before,
            num_before=num_before,
            cu_seqlens=pieces.cu_seqlens,
        )
        return pieces.from_contiguous(pieces.sequence_first(output))

    def empty_state(self, num_rows: int, num_tokens: int, like: Tensor) -> dict[str, Tensor]:
        """`keys`, with RoPE on them, and `values` `[num_rows, w, n, d]`, oldest first."""
        if not self.heads:
            return {}
        config = self.config
        shape = (num_rows, config.sliding_window_tokens, len(self.heads), config.kv_channels)
        return {name: like.new_zeros(shape) for name in ("keys", "values")}

    def _pass_on(
        self, key: Tensor, value: Tensor, state: LayerState
    ) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        """What the window held, as :meth:`_tokens_before`; in its place come `[s, b, n, d]`."""
        kept, w = state.of_kind(self), self.config.sliding_window_tokens
        names = ("keys", "values")
        before = kept["keys"][:, 1:].clone(), kept["values"][:, 1:].clone()
        for name, new in zip(names, (key, value), strict=True):
            new = new[-w:].transpose(0, 1)
            kept[name].copy_(torch.cat((kept[name], new), dim=1)[:, -w:])
        if not state.num_tokens:
            return None, None
        num_before = min(state.num_tokens, w - 1)
        return before, torch.full((key.shape[1],), num_before, device=key.device)

    def _takes_transformer_engine(self, query: Tensor, stream: Stream) -> bool:
        """Documents and context parallelism have not been tried there; float32 would run over all
        tokens there, and a sink's gradient is never bit-equal."""
        return (
            self._core_attention is not LocalCoreAttention
            and query.is_cuda
            and query.dtype in (torch.bfloat16, torch.float16)
            and stream.packed_seq_params is None
            and self.pg_collection.cp.size() == 1
            and not self.config.deterministic_mode
        )

    def _on_transformer_engine(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        core = self._transformer_engine
        core.train(self.training)
        if self.config.sliding_window_sink:
            core.softmax_offset = self.sink
        # Views of one buffer could be taken for another layout.
        inputs = (x.contiguous() for x in (query, key, value))
        output = core(*inputs, None, attn_mask_type=AttnMaskType.causal)
        return output.view(query.shape)

    @property
    def _transformer_engine(self) -> torch.nn.Module:
        """Made when it is first needed, in a tuple, which hides it from PyTorch: all the weights
        that it has are the sinks, which are ours."""
        if not self._core:
            core = build_module(
                self._core_attention,
                config=_of_windows(self.config, len(self.heads), self.tp_group.size()),
                layer_number=self.layer_number,
                attn_mask_type=AttnMaskType.causal,
                attention_type="self",
                softmax_scale=self.config.softmax_scale,
                pg_collection=self.pg_collection,
            )
            self._core = (core,)
        return self._core[0]

    def _tokens_before(
        self, key: Tensor, value: Tensor, pieces: Pieces
    ) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        """What the window reaches of other pieces: key and value `[m b, w - 1, n, d]`, how many."""
        count = self.config.sliding_window_tokens - 1
        found = pieces.tokens_before(torch.cat((key, value), dim=-1).flatten(2), count)
        if found is None:
            return None, None
        first = pieces.positions.unflatten(0, (len(pieces.own), -1))[:, 0]
        num_before = first.clamp_max(count).repeat_interleave(len(key) // len(pieces.own))
        before = found.unflatten(2, (len(self.heads), -1)).chunk(2, dim=-1)
        return (before[0], before[1]), num_before


def _of_windows(config: HydraConfig, heads: int, tp_size: int) -> HydraConfig:
    """A copy that makes Megatron's core attention one of windows, with `heads` on this rank."""
    windows = copy.copy(config)
    windows.num_attention_heads = windows.num_query_groups = heads * tp_size
    windows.window_size = (config.sliding_window_tokens - 1, 0)
    windows.softmax_type = "learnable" if config.sliding_window_sink else "vanilla"
    return windows
