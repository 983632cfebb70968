"""The models that every family of teachers is tested on."""

from __future__ import annotations

from typing import Any

from megatron_hydra.teachers.families import FAMILIES

UNTIED = {"tie_word_embeddings": False}
# Shapes: tied with a head dimension of its own; without one (None is left out) and an odd
# vocabulary; one group; a group for each head.
SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {**UNTIED, "head_dim": None, "vocab_size": 267},
    "one-group": {"num_key_value_heads": 1, "num_attention_heads": 6, "head_dim": 10, **UNTIED},
    "no-groups": {"num_key_value_heads": 4, "rope_theta": 1e6, "rms_norm_eps": 1e-3},
}
# As in Llama 3.1's file, but for lengths at which every frequency matters to a few tokens.
SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    f"{family}-{name}": (family, fields) for family in FAMILIES for name, fields in SHAPES.items()
}
CASES["llama-scaled"] = ("llama", {"rope_scaling": SCALED, **UNTIED})
