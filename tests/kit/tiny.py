"""Tiny configurations, plans and inputs for tests."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.build import build_model
from megatron_hydra.model.config import HydraConfig
from megatron_hydra.teachers.loading import megatron_fields

FA_HEADS = {0: (1, 2, 5), 1: (0, 1, 6, 7)}
"""A plan's FA heads with split, whole and missing query groups (two heads per group)."""


def tiny_fields(**overrides: Any) -> dict[str, Any]:
    """HydraConfig's fields for two layers of eight heads in four groups, as Qwen3 is built."""
    fields: dict[str, Any] = dict(
        qk_layernorm=True,
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=8,
        vocab_size=64,
        seq_length=64,
        share_embeddings_and_output_weights=True,
        layernorm_epsilon=1e-6,
    )
    return {**megatron_fields(), **fields, **overrides}


def tiny_config(**overrides: Any) -> HydraConfig:
    """The configuration of :func:`tiny_fields`, float32."""
    return HydraConfig(**tiny_fields(**overrides))


def tiny_plan(
    fa_heads: dict[int, tuple[int, ...]] | None = None,
    other_kinds: dict[int, dict[str, tuple[int, ...]]] | None = None,
) -> HeadPlan:
    """The plan `FA_HEADS`, or another for `tiny_config`."""
    return HeadPlan.from_fa_heads(fa_heads or FA_HEADS, 2, 8, 4, other_kinds=other_kinds)


def random_model(plan: HeadPlan | None = None, **fields: Any) -> GPTModel:
    """Two layers of four heads; random weights so large that every token matters to the logits."""
    shape = dict(
        num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4,
        num_query_groups=2, kv_channels=8, vocab_size=32, qk_layernorm=True,
    )  # fmt: skip
    model = build_model(HydraConfig(**{**megatron_fields(), **shape, **fields}), plan).eval()
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


def token_batch(
    config: HydraConfig, batch: int = 2, length: int = 24, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random token ids and position ids, `[batch, length]` each."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (batch, length), generator=generator)
    return tokens, torch.arange(length).expand(batch, -1).contiguous()
