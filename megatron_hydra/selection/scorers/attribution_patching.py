"""Attribution patching: all heads from one gradient, and the best of them measured exactly.

After Nanda ("Attribution patching", 2023) and Syed et al. (arXiv 2310.10348): to first order, a
head's patch changes the readout by its gradient with respect to the head's output, times the
difference of corrupt and clean output. That takes two forwards and one backward for all heads
together. The gradient here is that of activation patching's own graph, with attention frozen (see
``activation_patching.py``), so that the estimate approximates Eq 10.

The estimate errs where the readout bends, most of all at the final norm when a head writes much of
the stream. A second round therefore measures the heads of the largest estimates exactly.

Legend: a = answer tokens, b = pairs, d = head dimension, l = layers, n = heads of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_hydra.errors import UserError
from megatron_hydra.selection.scorers.activation_patching import patch_heads
from megatron_hydra.selection.scorers.activations import (
    Activations,
    add_mlp,
    gather_heads,
    project,
    read_logits,
    run_with_activations,
)
from megatron_hydra.selection.scorers.base import Effects, PairBatch, Scorer

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


class AttributionPatching(Scorer):
    """Estimates receivers, and measures the foremost.

    Args:
        num_rechecked: Heads that activation patching measures in the second round: those of the
            largest absolute mean estimate, averaged over sub-probes. 0 leaves all estimates.

    Raises:
        UserError: If ``num_rechecked`` is negative.
    """

    name = "attribution_patching"

    def __init__(self, num_rechecked: int = 16) -> None:
        if num_rechecked < 0:
            raise UserError(
                f"attribution_patching's num_rechecked is {num_rechecked}; it must be 0 or more"
            )
        self.num_rechecked = num_rechecked
        self.rechecked: dict[int, list[int]] = {}

    def start_round(self, done: Effects) -> bool:
        """First estimate; then choose the heads to measure."""
        self._num_rounds += 1
        if self._num_rounds == 2 and self.num_rechecked:
            sizes = torch.stack([x.mean(dim=0).abs() for x in done[self.name].values()]).mean(dim=0)
            order = sizes.flatten().argsort(descending=True, stable=True)
            for place in order[: self.num_rechecked].tolist():
                layer, head = divmod(place, sizes.shape[1])
                self.rechecked.setdefault(layer, []).append(head)
        return self._num_rounds == 1 or (self._num_rounds == 2 and bool(self.rechecked))

    def measure(self, model: GPTModel, batch: PairBatch) -> Tensor:
        """Estimate every head; see :class:`~megatron_hydra.selection.scorers.base.Scorer`."""
        clean = run_with_activations(model, batch.clean, batch.num_answer_tokens)
        corrupt = run_with_activations(model, batch.corrupt, batch.num_answer_tokens)
        estimates = estimate_effects(model, batch, clean, corrupt)
        if not self.rechecked:
            return estimates
        exact = patch_heads(model, batch, clean, corrupt, self.rechecked)
        return torch.where(exact.isnan(), estimates, exact)


def estimate_effects(
    model: GPTModel, batch: PairBatch, clean: Activations, corrupt: Activations
) -> Tensor:
    """First-order estimates of all heads' indirect effects, downstream attention frozen.

    Args:
        model: As for :meth:`~megatron_hydra.selection.scorers.base.Scorer.measure`.
        batch: The pairs.
        clean: The clean run, at the answer positions.
        corrupt: The corrupt run.

    Returns:
        Float64 [b, l, n], on the CPU.
    """
    found = []
    pairs = zip(_gradients(model, batch, clean), clean.head_outputs, corrupt.head_outputs)
    for gradient, ours, theirs in pairs:
        change = (gradient.double() * (theirs.double() - ours.double())).sum(dim=0)
        change = change.unflatten(-1, (-1, model.config.kv_channels)).sum(dim=-1)
        found.append(gather_heads(model, change))
    return -torch.stack(found, dim=1) / batch.gaps[:, None, None]


def _gradients(model: GPTModel, batch: PairBatch, clean: Activations) -> tuple[Tensor, ...]:
    """Gradient of the readout by each layer's head outputs, [a, b, channels] on this rank."""
    leaves = [outputs.detach().clone().requires_grad_() for outputs in clean.head_outputs]
    with torch.enable_grad(), _fixed_weights(model):
        attention = [
            project(layer, leaf) for layer, leaf in zip(model.decoder.layers, leaves, strict=True)
        ]
        hidden = clean.embedding
        for layer, output in zip(model.decoder.layers, attention, strict=True):
            hidden = add_mlp(layer, hidden + output)
        logits = read_logits(model, hidden)
        # Pairs do not meet, so that the sum's gradient holds each pair's own.
        total = batch.measure(logits.transpose(0, 1)).sum()
        return torch.autograd.grad(total, leaves)


@contextmanager
def _fixed_weights(model: GPTModel) -> Iterator[None]:
    """No gradients of weights inside: Megatron's linears would compute and keep them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
