"""The published shapes of the recipes' teachers: part of their config.json on the Hugging Face hub.

Source: the config.json of each base model by Qwen and Meta, and the number of parameters that the
hub counts in its safetensors (tied embeddings counted once).
"""

from __future__ import annotations

from typing import Any

_QWEN3: dict[str, Any] = dict(
    model_type="qwen3",
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    max_position_embeddings=40960,
    rope_theta=1000000,
    rms_norm_eps=1e-6,
)
_QWEN2P5: dict[str, Any] = dict(
    model_type="qwen2",
    num_hidden_layers=28,
    max_position_embeddings=131072,
    rope_theta=1000000.0,
    rms_norm_eps=1e-6,
)
_LLAMA3P2: dict[str, Any] = dict(
    model_type="llama",
    intermediate_size=8192,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=131072,
    rope_theta=500000.0,
    rope_scaling=dict(
        rope_type="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
# Folder of examples/ -> config.json.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_0p6b": _QWEN3
    | dict(num_hidden_layers=28, hidden_size=1024, intermediate_size=3072)
    | dict(num_attention_heads=16, tie_word_embeddings=True),
    "qwen3_1p7b": _QWEN3
    | dict(num_hidden_layers=28, hidden_size=2048, intermediate_size=6144)
    | dict(num_attention_heads=16, tie_word_embeddings=True),
    "qwen3_4b": _QWEN3
    | dict(num_hidden_layers=36, hidden_size=2560, intermediate_size=9728)
    | dict(num_attention_heads=32, tie_word_embeddings=True),
    "qwen3_8b": _QWEN3
    | dict(num_hidden_layers=36, hidden_size=4096, intermediate_size=12288)
    | dict(num_attention_heads=32, tie_word_embeddings=False),
    "llama3p2_1b": _LLAMA3P2
    | dict(num_hidden_layers=16, hidden_size=2048, num_attention_heads=32, head_dim=64),
    "llama3p2_3b": _LLAMA3P2
    | dict(num_hidden_layers=28, hidden_size=3072, num_attention_heads=24, head_dim=128),
    "qwen2p5_1p5b": _QWEN2P5
    | dict(hidden_size=1536, intermediate_size=8960, num_attention_heads=12)
    | dict(num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "qwen2p5_7b": _QWEN2P5
    | dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28)
    | dict(num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
}
NUM_PARAMETERS = {
    "qwen3_0p6b": 596_049_920,
    "qwen3_1p7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "llama3p2_1b": 1_235_814_400,
    "llama3p2_3b": 3_212_749_824,
    "qwen2p5_1p5b": 1_543_714_304,
    "qwen2p5_7b": 7_615_616_512,
}
