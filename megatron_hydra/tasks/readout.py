"""Logits where a teacher-forced answer is predicted, and the readouts m(x) of them (Eq 9).

Legend: a = answer tokens, b = batch, s = sequence, v = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_hydra.errors import UserError
from megatron_hydra.tasks.needles import Sample

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

READOUT_DECAY = 0.9
"""lambda of Eq 9: how much less each next answer token counts."""


def teacher_forced(
    samples: Sequence[Sample], answers: Sequence[Sequence[int]] | None = None
) -> tuple[Tensor, Tensor]:
    """Lay samples of one length out as a batch whose last ``a`` positions predict the answers.

    Args:
        samples: Of equal token length.
        answers: What to force instead of each sample's own answer; equal token lengths.

    Returns:
        Tokens [b, s] (each sample and its answer but for the last token) and answers [b, a].

    Raises:
        UserError: If the lengths differ.
    """
    forced = [sample.answer for sample in samples] if answers is None else answers
    rows = [[*sample.tokens, *answer[:-1]] for sample, answer in zip(samples, forced, strict=True)]
    for what, lengths in (("samples", set(map(len, rows))), ("answers", set(map(len, forced)))):
        if len(lengths) != 1:
            raise UserError(f"{what} of one batch have {sorted(lengths)} tokens: one length only")
    return torch.tensor(rows), torch.tensor([list(answer) for answer in forced])


@torch.no_grad()
def answer_logits(model: GPTModel, tokens: Tensor, num_answer_tokens: int) -> Tensor:
    """Logits of the last positions only; the output layer never sees the others.

    Args:
        model: In evaluation mode, on one pipeline stage.
        tokens: [b, s].
        num_answer_tokens: How many positions, from the end.

    Returns:
        [b, a, v], over the whole vocabulary on every tensor-parallel rank.
    """
    assert not model.training, "logits are read in evaluation mode"
    tokens = tokens.to(next(model.parameters()).device)

    def keep_last(module: torch.nn.Module, args: tuple) -> tuple:
        return (args[0][-num_answer_tokens:], *args[1:])

    hook = model.output_layer.register_forward_pre_hook(keep_last)
    try:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return model(tokens, positions, None, runtime_gather_output=True)
    finally:
        hook.remove()


def logit_difference(logits: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """How far the model prefers the right answer: sum_j lambda^j (z_j[a+] - z_j[a-]) / Z (Eq 9).

    Z is the sum of lambda^j, so that m is a mean logit difference.

    Args:
        logits: [..., b, a, v].
        right: Tokens a+ [b, a].
        wrong: Tokens a- [b, a].

    Returns:
        [..., b], in float64 logits.
    """
    index = torch.stack((right, wrong), dim=-1).to(logits.device)
    index = index.expand(*logits.shape[:-1], 2)
    chosen = logits.gather(-1, index).double()
    powers = torch.arange(right.shape[1], dtype=torch.float64, device=logits.device)
    weights = READOUT_DECAY**powers
    return (chosen[..., 0] - chosen[..., 1]) @ (weights / weights.sum())


def log_probability(logits: Tensor, right: Tensor) -> Tensor:
    """Mean log-probability of the right tokens, for answers that have no wrong twin.

    Args:
        logits: [..., b, a, v].
        right: Tokens a+ [b, a].

    Returns:
        [..., b], in float64 nats per token.
    """
    index = right.to(logits.device)[..., None].expand(*logits.shape[:-1], 1)
    chosen = logits.gather(-1, index).squeeze(-1).double()
    # In 16 bits a sum near 20 is known to a tenth only.
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (chosen - wide.logsumexp(dim=-1).double()).mean(dim=-1)
