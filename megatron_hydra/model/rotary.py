"""RoPE whose low frequencies are slowed down, so that a model sees further than it was trained."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def scale_rotary(rotary: Any, config: Any) -> None:
    """Give Megatron's `RotaryEmbedding` the frequencies that the model's RoPE scaling asks for.

    Args:
        rotary: Just made: before its angles are first asked for, which it keeps.
        config: A HydraConfig.
    """
    if config.rope_scaling_factor != 1.0:
        rotary.inv_freq = scaled_frequencies(
            rotary.inv_freq,
            config.rope_scaling_factor,
            config.rope_low_freq_factor,
            config.rope_high_freq_factor,
            config.rope_original_length,
        )


def scaled_frequencies(
    frequencies: Tensor, factor: float, low: float, high: float, original_length: int
) -> Tensor:
    """Llama 3.1's scaling, which config.json calls `llama3`.

    A frequency that turns less than `low` times within the original length is divided by `factor`;
    one that turns more than `high` times stays; between them the share that stays grows linearly.

    Args:
        frequencies: `[d / 2]`, radians per token.
        factor: As above.
        low: In turns.
        high: In turns, above `low`.
        original_length: The length that the model was trained with before, in tokens.
    """
    turns = frequencies * (original_length / (2 * math.pi))
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return torch.lerp(frequencies / factor, frequencies, kept)
