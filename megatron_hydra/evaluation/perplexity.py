"""Next-token loss on text, at given context lengths; its exponential is the perplexity.

Legend: b = windows of a batch, s = tokens of a window, h = hidden size, n = b * s, v = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_hydra.errors import UserError
from megatron_hydra.evaluation.lengths import check_held_out, check_window
from megatron_hydra.progress import Progress, no_progress
from megatron_hydra.transfer.hidden_states import final_hidden_states

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

MAX_TOKENS = 8192
"""Tokens of one forward, unless a single window is longer."""
MAX_LOGITS = 2**25
"""Logits that exist at once, unless those of a single token are more: 128 MiB in float32."""


def text_windows(text_tokens: Sequence[int], lengths: Sequence[int], max_tokens: int) -> Tensor:
    """Take the text whose tokens every length predicts, in whole windows of the longest.

    Args:
        text_tokens: Held-out text.
        lengths: Window lengths in tokens. Where the longest is not divisible by one, that has
            one window that is cut short, so that all predict the same tokens.
        max_tokens: Most tokens to predict.

    Returns:
        [predicted tokens + 1], the first of which is never predicted.

    Raises:
        UserError: If the text, or ``max_tokens``, is too short for the longest window.
    """
    longest = max(lengths)
    check_window(longest, max_tokens)
    check_held_out(longest, len(text_tokens))
    count = min(len(text_tokens) - 1, max_tokens) // longest * longest
    return torch.tensor(text_tokens[: count + 1])


@torch.no_grad()
def mean_loss(
    model: GPTModel, tokens: Tensor, length: int, progress: Progress = no_progress
) -> float:
    """The mean next-token loss over windows that do not overlap, in nats.

    Each window of ``length`` inputs predicts the ``length`` tokens that follow each; nothing is
    carried from window to window, so the first tokens of each have little context. The last
    window is shorter where the text is not divisible by ``length``.

    Args:
        model: In evaluation mode, whole on this rank.
        tokens: [n + 1].
        length: Tokens of a window.
        progress: Shows the batches.

    Raises:
        UserError: If a loss is not finite.
    """
    assert not model.training, "loss is measured in evaluation mode"
    tokens = tokens.to(next(model.parameters()).device)
    total = 0.0
    batches = _batches(len(tokens) - 1, length)
    for start, size, window in progress(batches, f"perplexity {length}", "batch"):
        stop = start + size * window
        inputs, labels = tokens[start:stop].view(size, window), tokens[start + 1 : stop + 1]
        total += token_losses(model, inputs, labels.view(size, window)).sum().item()
    if not math.isfinite(total):
        raise UserError(f"the model's loss on text at {length} tokens is not finite")
    return max(0.0, total / (len(tokens) - 1))


def _batches(num_tokens: int, length: int) -> list[tuple[int, int, int]]:
    """First token, number of windows and their length, of each forward."""
    whole, rest = divmod(num_tokens, length)
    size = max(1, MAX_TOKENS // length)
    batches = [
        (first * length, min(size, whole - first), length) for first in range(0, whole, size)
    ]
    return batches + ([(whole * length, 1, rest)] if rest else [])


@torch.no_grad()
def token_losses(model: GPTModel, inputs: Tensor, labels: Tensor) -> Tensor:
    """Run a batch; the logits follow from the hidden states, a few tokens at a time.

    Collective over the tensor-parallel ranks.

    Args:
        model: In evaluation mode, with its output layer on this rank.
        inputs: [b, s].
        labels: [b, s].

    Returns:
        [b, s], float64, in nats, the same on every tensor-parallel rank.
    """
    shape = labels.shape
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    hidden = final_hidden_states(model, inputs, positions)  # [s, b, h]
    hidden = hidden.transpose(0, 1).reshape(-1, 1, hidden.shape[-1])  # [n, 1, h]
    labels = labels.reshape(1, -1)
    weight = None  # the output layer's own
    if model.share_embeddings_and_output_weights:
        weight = model.shared_embedding_or_output_weight()
    chunk = max(1, MAX_LOGITS // model.vocab_size)
    parts = []
    for start in range(0, len(hidden), chunk):
        logits, _ = model.output_layer(hidden[start : start + chunk], weight=weight)  # [c, 1, v]
        losses = model.compute_language_model_loss(labels[:, start : start + chunk], logits)
        parts.append(losses.double().flatten())
    return torch.cat(parts).view(shape)
