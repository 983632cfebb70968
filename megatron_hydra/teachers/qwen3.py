"""Qwen3: a norm for each head's query and key, and no biases."""

from __future__ import annotations

from megatron_hydra.teachers.base import TeacherFamily
from megatron_hydra.teachers.weight_names import LAYER, Weight

_QK_NORMS = (
    Weight("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": ("head",)}),
    Weight("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": ("head",)}),
)
"""RMSNorm of each head's query and key before RoPE."""

QWEN3 = TeacherFamily(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    tokenizer_class="Qwen2Tokenizer",
    layer=(*LAYER, *_QK_NORMS),
    fields={"qk_layernorm": True, "add_qkv_bias": False},
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
    },
)
