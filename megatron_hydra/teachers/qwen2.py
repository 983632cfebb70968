"""Qwen2 and Qwen2.5: biases of queries, keys and values, and no norms for each head."""

from __future__ import annotations

from megatron_hydra.teachers.base import TeacherFamily
from megatron_hydra.teachers.weight_names import LAYER, Weight

_QKV_BIASES = (
    Weight(
        "self_attention.linear_qkv.bias",
        {
            "self_attn.q_proj.bias": ("queries",),
            "self_attn.k_proj.bias": ("keys",),
            "self_attn.v_proj.bias": ("keys",),
        },
        by_group=True,
    ),
)
"""Of queries, keys and values, before RoPE."""

QWEN2 = TeacherFamily(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    tokenizer_class="Qwen2Tokenizer",
    layer=(*LAYER, *_QKV_BIASES),
    fields={"qk_layernorm": False, "add_qkv_bias": True},
    defaults={
        "num_key_value_heads": 32,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
    },
    # transformers does not look at it: the biases are always there.
    only={"attention_bias": (True, None)},
)
