"""A tiny hybrid twice: Megatron's, and the exported model with the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from kit.tiny import tiny_config, tiny_plan
from torch import Tensor

from megatron_hydra.export.cache_hydra import HydraCache
from megatron_hydra.export.config import exported_config
from megatron_hydra.export.modeling_hydra import HydraForCausalLM
from megatron_hydra.export.weights import hybrid_tensors
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.build import build_model
from megatron_hydra.parallel import initialize_model_parallel

UNEVEN = tiny_plan({0: (1, 2, 3, 5), 1: (7,)}, {1: {"kda": (0, 3), "sliding_window": (1, 5)}})
"""Groups with two, one and no FA head in layer 0; all kinds in layer 1, which stores one group."""
NO_FA = tiny_plan({0: (), 1: ()}, {0: {"kda": (0, 1)}, 1: {"sliding_window": tuple(range(8))}})
ALL_FA = tiny_plan({0: tuple(range(8)), 1: tuple(range(8))})
WINDOW = 6  # tokens: shorter than the tests' sequences
QWEN2 = {"qk_layernorm": False, "add_qkv_bias": True}
LLAMA = {"qk_layernorm": False, "share_embeddings_and_output_weights": False}
LLAMA_ROPE = {"rope_scaling_factor": 8.0, "rope_original_length": 32, "rotary_base": 500.0}
SWITCHES = [
    {},
    {"share_embeddings_and_output_weights": False},
    QWEN2,
    {**LLAMA, **LLAMA_ROPE, "fa_rope": True},
    {"fa_rope": True, "fa_query_scale": "none", "fa_output_gate": False},
    {"fa_query_scale": "always", "fa_query_scale_base": 20.0, "fa_query_scale_start": 7},
    {"la_short_conv": False, "la_decay": False, "la_beta": False, "la_output_gate": "none"},
    {"la_rope": False, "la_qk_norm": False, "la_output_gate": "sigmoid"},
    {"la_conv_kernel_size": 2, "sliding_window_sink": False, "fusion": "norm"},
    {"la_conv_kernel_size": 1, "sliding_window_tokens": 1, "fusion": "none"},
    {"fusion": "gate", **QWEN2},
]
"""Together every switch at every value."""
HOLES = torch.ones(3, 40, dtype=torch.long)
HOLES[0, :11] = 0  # on the left
HOLES[1, 25:33] = 0  # on the right, before more tokens come
HOLES[2, 4:6] = HOLES[2, 19:30] = 0  # anywhere
"""Which tokens of three rows are real: a mask with padding everywhere."""


def twins(plan: HeadPlan = UNEVEN, **overrides: Any) -> tuple[torch.nn.Module, HydraForCausalLM]:
    """Both in eval mode, every parameter away from its neutral value.

    Args:
        plan: For `kit.tiny.tiny_config`.
        **overrides: Of its fields.
    """
    initialize_model_parallel()
    config = tiny_config(**{"sliding_window_tokens": WINDOW, **overrides})
    model = build_model(config, plan).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    exported = HydraForCausalLM(exported_config(config, plan)).eval()
    missing, unexpected = exported.load_state_dict(dict(hybrid_tensors(model)), strict=False)
    tied = config.share_embeddings_and_output_weights
    assert (missing, unexpected) == (["lm_head.weight"] if tied else [], [])
    exported.tie_weights()
    return model, exported


@torch.no_grad()
def megatron_logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Of the whole sequences `[b, t]`."""
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    return model(tokens, positions, None)


@torch.no_grad()
def in_pieces(
    model: HydraForCausalLM,
    tokens: Tensor,
    sizes: Sequence[int],
    mask: Tensor | None = None,
    max_length: int | None = None,
) -> tuple[Tensor, HydraCache]:
    """A cache filled piece by piece.

    Args:
        model: The exported one.
        tokens: `[b, t]`.
        sizes: Of the pieces, together t.
        mask: `[b, t]`, 1 for real tokens; None for all.
        max_length: Of a static cache; None for one that grows.

    Returns:
        Logits of the pieces side by side, and the cache.
    """
    logits, start = [], 0
    cache = HydraCache(model.config, max_length)
    for size in sizes:
        end = start + size
        seen = None if mask is None else mask[:, :end]
        piece = tokens[:, start:end]
        logits.append(model(piece, seen, past_key_values=cache, use_cache=True).logits)
        start = end
    assert start == tokens.shape[1] and cache.get_seq_length() == start
    return torch.cat(logits, dim=1), cache
