"""Attention-based retrieval score: how often a head looks at the answer's copy while it is written.

After Wu et al. (arXiv 2404.15574). The answer is forced. A head retrieves an answer token if, at
the position that predicts it (one before its own), the head's largest attention weight is on a
position of the answer's own copy in the prompt that holds this very token, as an induction head's
is; the position before the copied token does not count. The score is the share of the answer's
tokens that the head retrieves.

It needs one run and no patch, and it does not ask what the head writes: a head that looks at the
needle and writes nothing gets 1.

Legend: a = answer tokens, b = pairs, d = head dimension, s = sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron_hydra.selection.scorers.activations import gather_heads, removed_after
from megatron_hydra.selection.scorers.base import PairBatch, Scorer
from megatron_hydra.tasks.probes import Probe
from megatron_hydra.tasks.readout import answer_logits

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


class AttentionScore(Scorer):
    """Finds heads that look at the answer; correlation, not cause."""

    name = "attention_score"

    def accepts(self, probe: Probe) -> bool:
        """Probes whose prompts hold the answer."""
        return all(pair.clean.answer_positions for pair in probe.pairs)

    @torch.no_grad()
    def measure(self, model: GPTModel, batch: PairBatch) -> Tensor:
        """Look where heads look; see :class:`~megatron_hydra.selection.scorers.base.Scorer`."""
        looked_at: list[Tensor] = []  # one per layer: [b, heads of this rank, a]
        num_answers = batch.num_answer_tokens

        def look(module: nn.Module, args: tuple) -> None:
            looked_at.append(_strongest(args[0][-num_answers:], args[1]))

        hooks = [
            layer.self_attention.core_attention.register_forward_pre_hook(look)
            for layer in model.decoder.layers
        ]
        with removed_after(hooks):
            batch.measure(answer_logits(model, batch.clean, num_answers))  # refuses NaN
        strongest = torch.stack(looked_at, dim=1)  # [b, l, heads, a]
        retrieved = (
            _is_copy(batch).to(strongest.device)[:, None, None].expand(*strongest.shape[:3], -1, -1)
        )
        retrieved = retrieved.gather(-1, strongest[..., None]).squeeze(-1)
        return gather_heads(model, retrieved.double().mean(dim=-1))


def _strongest(query: Tensor, key: Tensor) -> Tensor:
    """The key position with the largest weight for each query.

    Args:
        query: Of the last a positions, [a, b, heads, d].
        key: Of all positions, [s, b, groups, d].

    Returns:
        [b, heads, a].
    """
    num_queries, num_keys = query.shape[0], key.shape[0]
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    scores = torch.einsum("abhd,sbhd->bhas", query.float(), key.float())  # softmax is monotone
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=scores.device)
    visible = visible.tril(num_keys - num_queries)
    return scores.masked_fill(~visible, -torch.inf).argmax(dim=-1)


def _is_copy(batch: PairBatch) -> Tensor:
    """Whether a position is of the answer's copy and holds the answer's j-th token: [b, a, s]."""
    in_copy = torch.zeros(batch.clean.shape, dtype=torch.bool)
    for row, positions in zip(in_copy, batch.answer_positions, strict=True):
        row[list(positions)] = True
    return (batch.clean[:, None] == batch.right[..., None]) & in_copy[:, None]
