"""Activation patching: a head's direct effect on the answer, downstream attention frozen (Eq 9-11).

For each pair the teacher runs twice, on the clean and on the corrupt prompt. Then one head's output
(before the output projection) is replaced in the clean run by the corrupt run's, while every later
layer's attention keeps its clean output. What the head itself writes for the answer counts; what
later heads make of it does not, so a head whose output is only read by another head gets nothing:
see ``path_patching.py``.

With attention frozen nothing moves between positions any more: the patch at one position reaches
the logits of that position alone, through residual stream and MLPs. So patching a head at all
positions and patching it where the answer is predicted are the same, and all that follows the two
full runs happens at the answer positions, from the patched layer upwards, for many heads at once.

Legend: a = answer tokens, b = pairs, h = hidden size, l = layers, n = heads patched at once,
v = vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_hydra.selection.activations import (
    Activations,
    add_mlp,
    finish_run,
    num_variants_at_once,
    project,
    run_with_activations,
    swap_heads,
)
from megatron_hydra.selection.scorer import PairBatch, SingleRound

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


class ActivationPatching(SingleRound):
    """Finds receivers: the heads that write the answer."""

    name = "activation_patching"

    @torch.no_grad()
    def measure(self, model: GPTModel, batch: PairBatch) -> Tensor:
        """Patch every head; see :class:`~megatron_hydra.selection.scorer.Scorer`."""
        clean = run_with_activations(model, batch.clean, batch.num_answer_tokens)
        corrupt = run_with_activations(model, batch.corrupt, batch.num_answer_tokens)
        every_head = range(model.config.num_attention_heads)
        heads = dict.fromkeys(range(model.config.num_layers), every_head)
        return patch_heads(model, batch, clean, corrupt, heads)


@torch.no_grad()
def patch_heads(
    model: GPTModel,
    batch: PairBatch,
    clean: Activations,
    corrupt: Activations,
    heads: Mapping[int, Sequence[int]],
) -> Tensor:
    """Indirect effects of some heads, downstream attention frozen.

    Args:
        model: As for :meth:`~megatron_hydra.selection.scorer.Scorer.measure`.
        batch: The pairs.
        clean: The clean run, at the answer positions.
        corrupt: The corrupt run.
        heads: Layer -> the heads to patch.

    Returns:
        Float64 [b, layers, heads]; NaN where nothing was patched.
    """
    layers = model.decoder.layers
    frozen = [
        project(layer, x)[:, None] for layer, x in zip(layers, clean.head_outputs, strict=True)
    ]
    reference = batch.measure(clean.logits)
    at_once = num_variants_at_once(batch.right.numel(), batch.right.numel())
    shape = (batch.num_pairs, len(layers), model.config.num_attention_heads)
    effects = torch.full(shape, torch.nan, dtype=torch.float64)
    residual = clean.embedding[:, None]  # [a, 1, b, h], before the layer's attention
    for index, layer in enumerate(layers):
        wanted = list(heads.get(index, ()))
        for start in range(0, len(wanted), at_once):
            part = wanted[start : start + at_once]
            outputs = swap_heads(
                model, clean.head_outputs[index], corrupt.head_outputs[index], part
            )
            patched = residual + project(layer, outputs)  # [a, n, b, h]
            logits = finish_run(model, patched, index, frozen)
            values = batch.measure(logits.permute(1, 2, 0, 3))
            effects[:, index, part] = batch.effects(reference, values).T
        residual = add_mlp(layer, residual + frozen[index])
    return effects
