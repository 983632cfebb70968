"""Sliding window: softmax attention over the last so many tokens, and a learnable sink.

Legend: s = sequence, b = batch, n = window heads on the rank, d = head dimension, m = the rank's
pieces of the stream (`context_parallel.py`), w = the window in tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from hydra_kernels.window_attention import window_attention
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from torch import Tensor

from megatron_hydra.model.config import HydraFields
from megatron_hydra.model.context_parallel import Pieces
from megatron_hydra.model.mixers.base import Mixer, Stream
from megatron_hydra.model.projection import Section, Sections, Units
from megatron_hydra.model.sharding import head_parameter


class SlidingWindow(Mixer):
    """Attention over the last w tokens of the window heads that one tensor-parallel rank owns.

    Each head has its own copy of its query group's key and value; it keeps w of both and no more.
    q and k have the teacher's norms and RoPE. The sink is a logit per head that takes part in each
    softmax and adds nothing (gpt-oss, arXiv 2508.10925): weight that the teacher's head gave to
    tokens which have left the window, the first above all, need not go to those in it. As it scales
    outputs only, it tells where the fusion has no norm per head (`fusion: none`).
    """

    kind = "sliding_window"
    label = "window"
    module_name = "sliding_window_attention"
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
        query, key, value = (pieces.batch_first(x) for x in (query, key, value))
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
