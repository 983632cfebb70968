"""Qwen3: a norm for each head's query and key, and no biases."""

from __future__ import annotations

from megatron_hydra.teachers.base import LAYER, QK_NORMS, TeacherFamily

QWEN3 = TeacherFamily(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    tokenizer_class="Qwen2Tokenizer",
    layer=(*LAYER, *QK_NORMS),
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
