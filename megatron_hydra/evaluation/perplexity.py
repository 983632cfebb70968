"""Perplexity on text, at given context lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_hydra.errors import UserError
from megatron_hydra.selection.scorer import Progress, no_progress

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

MAX_TOKENS = 8192
"""Tokens of one forward, unless a single window is longer."""


def text_windows(text_tokens: Sequence[int], lengths: Sequence[int], max_tokens: int) -> Tensor:
    """Take the text that windows of every length divide: each length predicts the same tokens.

    Args:
        text_tokens: Held-out text.
        lengths: Window lengths in tokens.
        max_tokens: Most tokens to predict.

    Returns:
        [predicted tokens + 1], the first of which is never predicted.

    Raises:
        UserError: If the text, or ``max_tokens``, is too short for one set of windows.
    """
    step = math.lcm(*lengths)
    count = min(len(text_tokens) - 1, max_tokens) // step * step
    if count < 1:
        raise UserError(
            f"perplexity at lengths {', '.join(map(str, lengths))} needs {step + 1} tokens of "
            f"held-out text; there are {min(len(text_tokens), max_tokens + 1)}"
        )
    return torch.tensor(text_tokens[: count + 1])


@torch.no_grad()
def perplexity(
    model: GPTModel, tokens: Tensor, length: int, progress: Progress = no_progress
) -> float:
    """exp of the mean next-token loss over windows that do not overlap.

    Each window of ``length`` inputs predicts the ``length`` tokens that follow each; nothing is
    carried from window to window, so the first tokens of each have little context.

    Args:
        model: In evaluation mode.
        tokens: [n * length + 1].
        length: Tokens of a window.
        progress: Shows the batches.

    Raises:
        UserError: If a loss is not finite.
    """
    assert not model.training, "perplexity is measured in evaluation mode"
    tokens = tokens.to(next(model.parameters()).device)
    inputs, labels = tokens[:-1].view(-1, length), tokens[1:].view(-1, length)
    size = max(1, MAX_TOKENS // length)
    total = 0.0
    for start in progress(range(0, len(inputs), size), f"perplexity {length}", "batch"):
        batch = inputs[start : start + size]
        positions = torch.arange(length, device=batch.device).expand_as(batch)
        losses = model(batch, positions, None, labels=labels[start : start + size])
        total += losses.double().sum().item()
    if not math.isfinite(total):
        raise UserError(f"the model's loss on text at {length} tokens is not finite")
    return math.exp(total / labels.numel())
