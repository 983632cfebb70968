"""Llama 3: no norms of queries and keys, no biases, and from 3.1 on slower low frequencies.

Its tensors are those that all families have: `weight_names` lists them.
"""

from __future__ import annotations

from megatron_hydra.teachers.base import TeacherFamily
from megatron_hydra.teachers.weight_names import LAYER

LLAMA = TeacherFamily(
    model_type="llama",
    architecture="LlamaForCausalLM",
    tokenizer_class="LlamaTokenizer",
    layer=LAYER,
    fields={"qk_layernorm": False, "add_qkv_bias": False},
    defaults={
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
    },
    known=("pretraining_tp",),  # how the products were cut on the machine that trained it
    rope_types=("default", "llama3"),
)
