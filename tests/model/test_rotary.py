"""RoPE scaling: Llama 3.1's frequencies, in every model that is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kit.plans import all_fa
from kit.tiny import tiny_config
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_hydra.model.build import build_model
from megatron_hydra.model.rotary import scaled_frequencies
from megatron_hydra.parallel import initialize_model_parallel


def of_transformers(factor: float, low: float, high: float, length: int, dim: int, base: float):
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }
    shape = dict(head_dim=dim, rope_theta=base, max_position_embeddings=131072)
    config = LlamaConfig(**shape, rope_scaling=scaling)
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    assert attention_factor == 1.0
    return frequencies


def plain(dim: int, base: float) -> torch.Tensor:
    return 1.0 / base ** (torch.arange(0, dim, 2).float() / dim)


@pytest.mark.parametrize(
    ("arguments", "dim", "base"),
    [
        ((8.0, 1.0, 4.0, 8192), 128, 5e5),  # Llama 3.1
        ((32.0, 1.0, 4.0, 8192), 64, 5e5),  # Llama 3.2
        ((2.5, 0.5, 3.0, 100), 16, 1e4),
    ],
)
def test_frequencies_are_those_of_transformers(arguments: Any, dim: int, base: float) -> None:
    found = scaled_frequencies(plain(dim, base), *arguments)
    torch.testing.assert_close(found, of_transformers(*arguments, dim, base), rtol=1e-6, atol=0)
    unchanged = (found == plain(dim, base)).sum()
    assert 0 < unchanged < dim // 2, "some frequencies stay, and some are slowed down"


@pytest.mark.parametrize("is_teacher", [True, False])
def test_teacher_and_hybrid_turn_by_the_scaled_frequencies(is_teacher: bool) -> None:
    initialize_model_parallel()
    config = tiny_config(
        rope_scaling_factor=4.0,
        rope_low_freq_factor=0.5,
        rope_high_freq_factor=2.0,
        rope_original_length=64,
    )
    model = build_model(config, None if is_teacher else all_fa(2, 8, 4))
    angles = model.rotary_pos_emb(10)[:, 0, 0]
    expected = torch.arange(10.0).outer(of_transformers(4.0, 0.5, 2.0, 64, 8, 1e4))
    torch.testing.assert_close(angles, expected.repeat(1, 2))
    assert not torch.allclose(angles[:, :4], torch.arange(10.0).outer(plain(8, 1e4)))
