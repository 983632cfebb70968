"""The kinds of heads: each from a layer's hidden states to its heads' outputs, whole or in steps.

Copied into every exported folder: imports PyTorch and transformers alone.

Legend: b rows, t tokens, h hidden size, n heads of the kind, d channels, g query groups that some
FA head uses, k taps.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_hydra import HydraLayerCache
from .configuration_hydra import HydraHeadConfig
from .recurrence_hydra import (
    attention_of_a_token,
    gated_delta_rule,
    short_convolution,
    window_attention,
)
from .stream_hydra import Stream, rotated, take

PIECE = 4096
"""Tokens of each row whose queries and keys are prepared at once."""
_FEWEST_DECAY_ROWS_AT = 8
_FEW_ROWS = 2048


class HydraLinear(nn.Linear):
    """A linear layer of few rows, which a compiled step of one token sums itself.

    A cuBLAS call takes twice as long for 2,048 rows or fewer, and joins nothing around it.
    """

    def forward(self, x: Tensor) -> Tensor:
        is_few = torch.compiler.is_compiling() and self.out_features <= _FEW_ROWS
        if not is_few or x.shape[:-1].numel() != 1:
            return super().forward(x)
        product = (self.weight.float() * x.reshape(-1).float()).sum(-1)
        if self.bias is not None:
            product = product + self.bias
        return product.to(x.dtype).view(*x.shape[:-1], -1)


class HydraRMSNorm(nn.Module):
    """RMSNorm in float32 with a weight per channel."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Mixer(nn.Module):
    """The heads of one kind of a layer.

    Args:
        config: The model's.
        layer: Which, counted from 0.
        heads: Its heads of this kind, ascending, in the teacher's count.
    """

    name: str
    """The layer's attribute, and the first word of what it keeps in a cache."""
    has_state = True

    def __init__(self, config: HydraHeadConfig, layer: int, heads: list[int]) -> None:
        super().__init__()
        self.config, self.layer_idx, self.heads = config, layer, heads

    def _linear(self, rows: int) -> HydraLinear:
        return HydraLinear(self.config.hidden_size, rows, bias=self.config.qkv_bias)

    def _qk_norms(self, wanted: bool) -> None:
        make: Any = nn.Identity
        if wanted and self.config.qk_norm:
            make = HydraRMSNorm
        self.q_norm, self.k_norm = (
            make(self.config.head_dim, self.config.rms_norm_eps) for _ in range(2)
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim))


class FullAttention(Mixer):
    """Softmax over all that came before; keys and values of the groups that an FA head uses."""

    name = "fa"
    has_state = False
    is_causal = True  # for transformers' attention functions

    def __init__(self, config: HydraHeadConfig, layer: int, heads: list[int]) -> None:
        super().__init__(config, layer, heads)
        groups, d = config.stored_groups(layer), config.head_dim
        per_group = config.num_attention_heads // config.num_key_value_heads
        group_of = [groups.index(head // per_group) for head in heads]
        counts = [group_of.count(group) for group in range(len(groups))]
        self.most, self.is_even = max(counts), min(counts) == max(counts)
        self.group_of_head = tuple(group_of)
        # Where a head lies if every group had as many heads as the largest has, and which head lies
        # where: one after the last, of zeros, where there is none.
        slots = [g * self.most + group_of[:i].count(g) for i, g in enumerate(group_of)]
        self.slots = tuple(slots)
        self.head_of_slot = tuple(
            slots.index(slot) if slot in slots else len(heads)
            for slot in range(len(groups) * self.most)
        )
        self.num_key_value_groups = self.most
        self.q_proj, self.k_proj, self.v_proj = (
            self._linear(count * d) for count in (len(heads), len(groups), len(groups))
        )
        self.gate_proj = self._linear(len(heads) * d) if config.fa_output_gate else None
        self._qk_norms(True)

    def forward(self, x: Tensor, stream: Stream, cache: HydraLayerCache | None) -> Tensor:
        """`[b, t, h]` to `[b, t, n, d]`."""
        query = self.q_norm(self._heads(self.q_proj(x)))
        key = self.k_norm(self._heads(self.k_proj(x)))
        if stream.query_scale is not None:
            query = query * stream.query_scale
        if self.config.fa_rope:
            query, key = stream.rotated(query), stream.rotated(key)
        # [b, t, n, d] -> [b, n, t, d]
        query, key, value = (
            part.transpose(1, 2) for part in (query, key, self._heads(self.v_proj(x)))
        )
        if cache is not None:
            key, value = cache.update(key, value)
        if query.shape[2] == 1:
            return self._attend_once(query, key, value, stream)
        if self.is_even:
            return self._attend(query, key, value, stream.mask, self.most)
        key, value = (rearranged(part, self.group_of_head, dim=1) for part in (key, value))
        return self._attend(query, key, value, stream.mask, 1)

    def gate(self, x: Tensor) -> Tensor | None:
        """What its outputs are multiplied by."""
        return None if self.gate_proj is None else 2 * self._heads(self.gate_proj(x)).sigmoid()

    def _attend_once(self, query: Tensor, key: Tensor, value: Tensor, stream: Stream) -> Tensor:
        """A token reads all keys once: queries are filled up to as many per group, not keys."""
        if not self.is_even:
            query = rearranged(F.pad(query, (0, 0, 0, 0, 0, 1)), self.head_of_slot, dim=1)
        if stream.is_step:
            grouped = query.squeeze(2).unflatten(1, (-1, self.most))
            output = attention_of_a_token(grouped, key, value, stream.mask).flatten(1, 2)[:, None]
        else:
            with without_plans(query):
                output = self._attend(query, key, value, stream.mask, self.most)
        return output if self.is_even else rearranged(output, self.slots, dim=2)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, heads_per_group: int
    ) -> Tensor:
        name = self.config._attn_implementation
        attend = eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        self.num_key_value_groups = heads_per_group  # where these functions look for it
        scaling = self.config.head_dim**-0.5
        output, _ = attend(self, query, key, value, mask, dropout=0.0, scaling=scaling)
        return output


class GatedDeltaNet(Mixer):
    """A gated linear recurrence over heads with keys and values of their own."""

    name = "la"
    state_index = 0  # in a layer's cache

    def __init__(self, config: HydraHeadConfig, layer: int, heads: list[int]) -> None:
        super().__init__(config, layer, heads)
        n, rows = len(heads), len(heads) * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (self._linear(rows) for _ in range(3))
        self.gate_proj = self._linear(rows) if config.la_output_gate != "none" else None
        self.beta_proj = self._linear(n) if config.la_beta else None
        self._qk_norms(config.la_qk_norm)
        if config.la_short_conv:
            self.conv_weight = nn.Parameter(torch.zeros(3 * rows, config.la_conv_kernel_size))
        if config.la_decay:
            self._make_decay(n)

    def _make_decay(self, n: int) -> None:
        self.decay_proj = self._linear(n)
        self.A_log, self.dt_bias = (nn.Parameter(torch.zeros(n)) for _ in range(2))

    def forward(self, x: Tensor, stream: Stream, cache: HydraLayerCache | None) -> Tensor:
        """`[b, t, h]` to `[b, t, n, d]`."""
        query, key, value = self._prepared(x, stream, cache)
        log_decay = self._log_decay(x)
        if self.beta_proj is not None:
            beta = self.beta_proj(x).float().sigmoid()
        else:
            beta = x.new_ones(*x.shape[:2], len(self.heads), dtype=torch.float32)
        if stream.is_padded:
            # Padding neither decays nor writes.
            is_real = torch.arange(x.shape[1], device=x.device) < stream.num_real[:, None]
            log_decay = log_decay * is_real[:, :, None, None]
            beta = beta * is_real[:, :, None]
        state = None if cache is None else cache.recurrent_states[self.state_index]
        if state is None:
            d = self.config.head_dim
            state = x.new_zeros(len(x), len(self.heads), d, d, dtype=torch.float32)
        output, state = gated_delta_rule(query, key, value, log_decay, beta, state)
        if cache is not None:
            cache.update_recurrent_state(state, self.state_index)
        return output

    def gate(self, x: Tensor) -> Tensor | None:
        """What its outputs are multiplied by."""
        if self.gate_proj is None:
            return None
        gate = self._heads(self.gate_proj(x))
        return F.silu(gate) if self.config.la_output_gate == "silu" else 2 * gate.sigmoid()

    def _prepared(
        self, x: Tensor, stream: Stream, cache: HydraLayerCache | None
    ) -> tuple[Tensor, ...]:
        """Queries, keys and values `[b, t, n, d]`, queries and keys of unit length.

        What float32 takes is the memory of a piece of the tokens, not of a whole long prompt.
        """
        qkv, past = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1), 0
        if self.config.la_short_conv:
            past = self.config.la_conv_kernel_size - 1
            qkv = self._after_past(qkv, stream, cache, past)
        pieces = [
            self._piece(
                qkv[:, start : start + PIECE + past],
                stream.cos[:, start : start + PIECE],
                stream.sin[:, start : start + PIECE],
            )
            for start in range(0, x.shape[1], PIECE)
        ]
        if len(pieces) == 1:
            return pieces[0]
        return tuple(torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))

    def _piece(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        if self.config.la_short_conv:
            qkv = short_convolution(qkv, self.conv_weight)
        query, key, value = (self._heads(part) for part in qkv.chunk(3, dim=-1))
        # Both at once: a step of one token takes as long as its operations are many.
        both = torch.cat((self.q_norm(query), self.k_norm(key)), dim=2)
        if self.config.la_rope:
            both = rotated(both, cos, sin)
        query, key = F.normalize(both.float(), dim=-1).to(value.dtype).chunk(2, dim=2)
        return query, key, value

    def _after_past(
        self, qkv: Tensor, stream: Stream, cache: HydraLayerCache | None, past: int
    ) -> Tensor:
        """With a row's last real inputs of before in front; its last ones here are kept."""
        before = None if cache is None else cache.conv_states[self.state_index]
        if before is None:
            before = qkv.new_zeros(len(qkv), qkv.shape[-1], past)
        padded = torch.cat((before.mT, qkv), dim=1)
        if cache is not None:
            last = padded[:, qkv.shape[1] :]
            if stream.is_padded:
                places = stream.num_real[:, None] + torch.arange(past, device=qkv.device)
                last = take(padded, places)
            cache.update_conv_state(last.mT, self.state_index)
        return padded

    def _log_decay(self, x: Tensor) -> Tensor:
        """`[b, t, n, 1]` float32."""
        if not self.config.la_decay:
            return x.new_zeros(*x.shape[:2], len(self.heads), 1, dtype=torch.float32)
        raw = self.decay_proj(x).float() + self.dt_bias.float()
        return (-self.A_log.float().exp() * F.softplus(raw)).unsqueeze(-1)


class KimiDeltaAttention(GatedDeltaNet):
    """Gated DeltaNet with a decay for each channel of the keys (Kimi Linear, arXiv 2510.26692)."""

    name = "kda"
    state_index = 1

    def _make_decay(self, n: int) -> None:
        d = self.config.head_dim
        rank = max(1, d // _FEWEST_DECAY_ROWS_AT)
        self.decay_proj = self._linear(n * rank)
        self.decay_up = nn.Parameter(torch.zeros(n * d, rank))
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(n)), nn.Parameter(torch.zeros(n * d))

    def _log_decay(self, x: Tensor) -> Tensor:
        """`[b, t, n, d]` float32."""
        n, d = len(self.heads), self.config.head_dim
        if not self.config.la_decay:
            return x.new_zeros(*x.shape[:2], n, d, dtype=torch.float32)
        rows, up = self.decay_proj(x).unflatten(-1, (n, -1)), self.decay_up.view(n, d, -1)
        raw = torch.einsum("btnr,ndr->btnd", rows, up.to(rows.dtype)).float()
        raw = raw + self.dt_bias.float().view(n, d)
        return -self.A_log.float().exp()[:, None] * F.softplus(raw)


class SlidingWindow(Mixer):
    """Softmax over the last tokens, with keys and values of each head's own and a sink."""

    name = "window"

    def __init__(self, config: HydraHeadConfig, layer: int, heads: list[int]) -> None:
        super().__init__(config, layer, heads)
        rows = len(heads) * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (self._linear(rows) for _ in range(3))
        self.gate_proj = self._linear(rows) if config.fa_output_gate else None
        self._qk_norms(True)
        self.sink = nn.Parameter(torch.zeros(len(heads))) if config.sliding_window_sink else None

    gate = FullAttention.gate

    def forward(self, x: Tensor, stream: Stream, cache: HydraLayerCache | None) -> Tensor:
        """`[b, t, h]` to `[b, t, n, d]`; keys are kept with RoPE on them."""
        query, key = self._heads(self.q_proj(x)), self._heads(self.k_proj(x))
        query, key = stream.rotated(self.q_norm(query)), stream.rotated(self.k_norm(key))
        kept = None if cache is None or not cache.window else cache.window
        output, kept = window_attention(
            query,
            key,
            self._heads(self.v_proj(x)),
            self.config.sliding_window_tokens,
            self.sink,
            kept,
            stream.num_before,
            stream.num_real,
        )
        if cache is not None:
            cache.keep_window(kept)
        return output


MIXERS: dict[str, type[Mixer]] = {
    "fa": FullAttention,
    "gated_delta_net": GatedDeltaNet,
    "kda": KimiDeltaAttention,
    "sliding_window": SlidingWindow,
}


def rearranged(x: Tensor, order: tuple[int, ...], dim: int) -> Tensor:
    """x with the entries `order` of a dimension, in that order."""
    if not torch.compiler.is_compiling():
        return x.index_select(dim, _index(order, x.device))
    # An index would be made, and moved, at every step; and of more than eight parts the compiler
    # makes a kernel each.
    parts = [x.narrow(dim, i, 1) for i in order]
    while len(parts) > 1:
        parts = [torch.cat(parts[i : i + 8], dim=dim) for i in range(0, len(parts), 8)]
    return parts[0]


@functools.cache
@torch.inference_mode(False)
def _index(order: tuple[int, ...], device: torch.device) -> Tensor:
    """Made once for each device."""
    return torch.tensor(order, device=device)


def without_plans(x: Tensor) -> AbstractContextManager[None]:
    """Keep cuDNN from a token's attention: it plans anew, far longer, for every number of keys."""
    if not x.is_cuda:
        return nullcontext()
    kernels = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return sdpa_kernel(list(kernels))


def normed(x: Tensor, eps: float) -> Tensor:
    """x over its root mean square along the last dimension, computed in float32."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def eager_attention(
    module: FullAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in plain PyTorch, of `[b, n, t, d]` to `[b, t, n, d]`; `mask` is added."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.mT * scaling
    if mask is not None:
        scores = scores + mask[..., : key.shape[2]]
    return (scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value).transpose(1, 2), None
