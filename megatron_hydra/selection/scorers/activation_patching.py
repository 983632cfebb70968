"""Activation patching: a head's direct effect on the answer, downstream attention frozen (Eq 9-11).

For each pair the teacher runs twice, on the clean and on the corrupt prompt. Then one head's output
(before the output projection) is replaced in the clean run by the corrupt run's, while every later
layer's attention keeps its clean output. What the head itself writes for the answer counts; what
later heads make of it does not, so a head whose output is only read by another head gets nothing:
see ``path_patching.py``.

With attention frozen nothing moves between positions any more: the patch at one position reaches
the logits of that position alone, through residual stream and MLPs. So patching a head at all
positions and patching it where the answer is predicted are the same, and all that follows the two
full runs happens at the answer positions, from the patched layer upwards. It happens for all heads
at once: the layers are gone through from below, and each adds its own heads' runs to those that it
takes over.

Legend: a = answer tokens, b = pairs, h = hidden size, l = layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_hydra.selection.scorers.activations import (
    Activations,
    add_mlp_in_place,
    add_patched_runs,
    project,
    read_out,
    run_with_activations,
    waves,
)
from megatron_hydra.selection.scorers.base import PairBatch, Scorer

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


class ActivationPatching(Scorer):
    """Finds receivers: the heads that write the answer."""

    name = "activation_patching"

    @torch.no_grad()
    def measure(self, model: GPTModel, batch: PairBatch) -> Tensor:
        """Patch every head; see :class:`~megatron_hydra.selection.scorers.base.Scorer`."""
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
        model: As for :meth:`~megatron_hydra.selection.scorers.base.Scorer.measure`.
        batch: The pairs.
        clean: The clean run, at the answer positions.
        corrupt: The corrupt run.
        heads: Layer -> the heads to patch.

    Returns:
        Float64 [b, layers, heads]; NaN where nothing was patched.
    """
    layers = model.decoder.layers
    frozen = [
        project(layer, x).flatten(0, 1) for layer, x in zip(layers, clean.head_outputs, strict=True)
    ]
    reference = batch.measure(clean.logits)
    shape = (batch.num_pairs, len(layers), model.config.num_attention_heads)
    effects = torch.full(shape, torch.nan, dtype=torch.float64)
    places = [(index, head) for index in range(len(layers)) for head in heads.get(index, ())]
    for wave in waves(places, batch.right.numel(), clean.embedding):
        streams = clean.embedding.new_empty(1 + len(wave), *frozen[0].shape)
        streams[0], num_streams = clean.embedding.flatten(0, 1), 1  # the clean run comes first
        for index, layer in enumerate(layers):
            streams[:num_streams] += frozen[index]
            patched = [head for of_layer, head in wave if of_layer == index]
            num_streams = add_patched_runs(
                model, index, clean, corrupt, patched, streams, num_streams
            )
            add_mlp_in_place(layer, streams[:num_streams])
        values = batch.effects(reference, read_out(model, batch, streams[1:]))
        effects[:, [index for index, _ in wave], [head for _, head in wave]] = values.T
    return effects
