"""Zero, mean and window ablation: what the answer loses when a head's output is taken away.

As in Retrieval-Aware Distillation (arXiv 2602.11374), one head's output (before the output
projection) is replaced at all positions of the clean run, and everything above runs as usual,
attention too. So a head counts for all that it does, by whatever way; but what other heads make
good does not show, and a model without one head's usual output is not the one that was trained. The
effect is (m(x) - m(ablated)) / (m(x) - m(x')): 1 where ablation harms as the corrupt prompt does.

The runs resume at the head's layer, for many heads at once.

Legend: a = answer tokens, b = pairs, h = hidden size, n = heads ablated at once, s = sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from hydra_kernels.window_attention import window_attention
from torch import Tensor, nn

from megatron_hydra.selection.scorers.activations import (
    Activations,
    add_mlp,
    num_variants_at_once,
    project,
    read_logits,
    removed_after,
    run_with_activations,
    swap_heads,
)
from megatron_hydra.selection.scorers.base import PairBatch, Scorer
from megatron_hydra.tasks.readout import answer_logits

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


class _Ablation(Scorer):
    """What both ablations share: all but the output that stands in."""

    def stand_ins(self, model: GPTModel, batch: PairBatch, clean: Activations) -> list[Tensor]:
        """What replaces each layer's head outputs: [1, b, channels], for all positions."""
        raise NotImplementedError

    @torch.no_grad()
    def measure(self, model: GPTModel, batch: PairBatch) -> Tensor:
        """Ablate every head; see :class:`~megatron_hydra.selection.scorers.base.Scorer`."""
        layer_arguments: dict[str, Any] = {}

        def keep_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            layer_arguments.update(kwargs)

        layers, num_heads = model.decoder.layers, model.config.num_attention_heads
        hook = layers[0].register_forward_pre_hook(keep_arguments, with_kwargs=True)
        with removed_after([hook]):
            length = batch.clean.shape[1]
            clean = run_with_activations(model, batch.clean, batch.num_answer_tokens, length)
        reference = batch.measure(clean.logits)
        effects = torch.zeros(batch.num_pairs, len(layers), num_heads, dtype=torch.float64)
        at_once = num_variants_at_once(batch.clean.numel(), batch.right.numel())
        residual = clean.embedding[:, None]  # [s, 1, b, h], before the layer's attention
        stand_ins = self.stand_ins(model, batch, clean)
        for index, (layer, outputs) in enumerate(zip(layers, clean.head_outputs, strict=True)):
            other = stand_ins[index].expand_as(outputs)
            for start in range(0, num_heads, at_once):
                heads = range(start, min(start + at_once, num_heads))
                ablated = residual + project(layer, swap_heads(model, outputs, other, heads))
                values = batch.measure(_resume(model, batch, index, ablated, layer_arguments))
                effects[:, index, list(heads)] = batch.effects(reference, values).T
            residual = add_mlp(layer, residual + project(layer, outputs)[:, None])
        return effects


class ZeroAblation(_Ablation):
    """A head's output becomes 0."""

    name = "zero_ablation"

    def stand_ins(self, model: GPTModel, batch: PairBatch, clean: Activations) -> list[Tensor]:
        """Zeros."""
        return [torch.zeros_like(outputs[:1]) for outputs in clean.head_outputs]


class MeanAblation(_Ablation):
    """A head's output becomes its mean over all positions of the pair's clean and corrupt run.

    The clean run's mean alone would still say the answer, softly, and norms make soft things loud;
    in this one both answers weigh the same. It is each pair's own, so that an effect does not
    depend on the pairs beside it.
    """

    name = "mean_ablation"

    def stand_ins(self, model: GPTModel, batch: PairBatch, clean: Activations) -> list[Tensor]:
        """The means."""
        length = batch.corrupt.shape[1]
        corrupt = run_with_activations(model, batch.corrupt, batch.num_answer_tokens, length)
        runs = zip(clean.head_outputs, corrupt.head_outputs, strict=True)
        return [
            (ours.mean(0, keepdim=True) + theirs.mean(0, keepdim=True)) / 2 for ours, theirs in runs
        ]


class WindowAblation(_Ablation):
    """A head sees the last tokens alone: what it loses as a sliding window that was not trained.

    Such heads held up against linear attention without training (arXiv 2608.28444). The softmax
    goes over the window and nothing else; a sink would scale the output, which the hybrid's norm
    per head takes back.

    Args:
        window: Tokens that a position sees, itself counted in. A probe that is no longer has no
            effect.
    """

    name = "window_ablation"

    def __init__(self, window: int) -> None:
        self.window = window

    def stand_ins(self, model: GPTModel, batch: PairBatch, clean: Activations) -> list[Tensor]:
        """The outputs over the window, [s, b, channels]."""
        found: list[Tensor] = []

        def attend(module: nn.Module, args: tuple) -> None:
            query, key, value = (part.transpose(0, 1) for part in args[:3])  # [b, s, heads, d]
            key, value = (
                part.repeat_interleave(query.shape[2] // part.shape[2], dim=2)
                for part in (key, value)
            )
            scale = model.config.softmax_scale
            output = window_attention(query, key, value, window=self.window, scale=scale)
            found.append(output.transpose(0, 1).flatten(2))

        hooks = [
            layer.self_attention.core_attention.register_forward_pre_hook(attend)
            for layer in model.decoder.layers
        ]
        with removed_after(hooks):
            answer_logits(model, batch.clean, batch.num_answer_tokens)
        return found


def _resume(
    model: GPTModel, batch: PairBatch, index: int, hidden: Tensor, layer_arguments: dict[str, Any]
) -> Tensor:
    """From the residual stream after layer ``index``'s attention to the logits, attention live.

    Args:
        model: As everywhere here.
        batch: The pairs.
        index: The layer, from 0.
        hidden: [s, n, b, h].
        layer_arguments: What Megatron gives to every layer beside the hidden states.

    Returns:
        [n, b, a, v].
    """
    num_variants, num_pairs = hidden.shape[1:3]
    hidden = add_mlp(model.decoder.layers[index], hidden).flatten(1, 2)
    for layer in model.decoder.layers[index + 1 :]:
        hidden, _ = layer(**{**layer_arguments, "hidden_states": hidden})
    logits = read_logits(model, hidden[-batch.num_answer_tokens :])
    return logits.unflatten(1, (num_variants, num_pairs)).permute(1, 2, 0, 3)
