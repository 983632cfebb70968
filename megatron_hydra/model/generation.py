"""Generates tokens with a model under Megatron: batched, greedy or sampled, tensor parallel.

Legend: b = rows, t = tokens of the longest prompt, m = new tokens, v = vocabulary.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_hydra.errors import UserError
from megatron_hydra.model.decoding import check_decoding, without_sequence_parallelism
from megatron_hydra.model.options import HydraFields
from megatron_hydra.schema import Limits, check_fields

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: but for rounding, alike for a seed and batch at every layout.

    Raises:
        UserError: If a value is out of range.
    """

    temperature: Annotated[float, Limits(above=0)] = 1.0
    """Logits are divided by it."""
    top_p: Annotated[float, Limits(above=0, most=1)] = 1.0
    """Drawn from the likeliest tokens alone: the fewest whose probability reaches it together."""
    seed: Annotated[int, Limits(least=0, below=2**63)] = 0

    def __post_init__(self) -> None:
        check_fields(self, Sampling)


@torch.no_grad()
def generate(
    model: GPTModel,
    tokens: Tensor,
    num_new_tokens: int,
    *,
    lengths: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    end_token: int | Sequence[int] | None = None,
) -> Tensor:
    """Go on with each prompt; collective over the tensor-parallel ranks.

    Prompts of different lengths are padded on the right. No head sees padding: as many tokens as
    the shortest prompt has come in one forward pass, then one at a time, a longer prompt's from the
    prompt. Sequence parallelism is off meanwhile. Beyond the model's `seq_length`
    it goes on, as transformers beyond `max_position_embeddings`, and the log says so once.

    Args:
        model: A hybrid or a teacher (`build.build_model`) without wrappers, in evaluation mode.
        tokens: `[b, t]` integer on the model's device, the same on all tensor-parallel ranks.
        num_new_tokens: m.
        lengths: Tokens of each prompt; None: all t.
        sampling: How tokens are drawn; None takes the likeliest.
        end_token: After it, or after any of several, a row has nothing but this token, or the first
            of them; None: rows go on.

    Returns:
        `[b, m]` int64: what follows each prompt, the same on all tensor-parallel ranks.

    Raises:
        UserError: If the model is neither, it cannot decode as it stands (see
            `decoding.check_decoding`), or an argument does not fit.
    """
    lengths = _checked_lengths(model, tokens, num_new_tokens, lengths)
    _tell_beyond(model, max(lengths) + num_new_tokens)
    ends = [] if end_token is None else [end_token] if isinstance(end_token, int) else [*end_token]
    with without_sequence_parallelism(model):
        return _generate(model, tokens, num_new_tokens, lengths, sampling, ends)


def _generate(
    model: GPTModel,
    tokens: Tensor,
    num_new_tokens: int,
    lengths: list[int],
    sampling: Sampling | None,
    ends: list[int],
) -> Tensor:
    (b, t), start = tokens.shape, min(lengths)
    context = StaticInferenceContext(b, t + num_new_tokens)
    check_decoding(model.config, context, model.training)  # type: ignore[arg-type]
    end_of_prompt, over = (torch.tensor(x, device=tokens.device) for x in (lengths, ends))
    rows = torch.cat((tokens.long(), tokens.new_zeros(b, num_new_tokens).long()), dim=1)
    is_over = torch.zeros(b, dtype=torch.bool, device=tokens.device)
    generator = torch.Generator(tokens.device)
    generator.manual_seed(0 if sampling is None else sampling.seed)
    coming = rows[:, :start]
    for place in range(start, t + num_new_tokens):
        logits = _next_logits(model, coming, context)
        chosen = _choose(logits, sampling, generator)
        _share(chosen, model.pg_collection.tp)
        is_prompt = place < end_of_prompt
        if ends:
            chosen = chosen.masked_fill(is_over, ends[0])
            is_over |= torch.isin(chosen, over) & ~is_prompt
        rows[:, place] = torch.where(is_prompt, rows[:, place], chosen)
        if ends and is_over.all():
            rows[:, place + 1 :] = ends[0]
            break
        coming = rows[:, place : place + 1]
    new = end_of_prompt[:, None] + torch.arange(num_new_tokens, device=tokens.device)
    return rows.gather(1, new)


def _next_logits(model: GPTModel, tokens: Tensor, context: StaticInferenceContext) -> Tensor:
    """`[b, v]` after the coming tokens `[b, s]`, of all ranks' vocabulary."""
    first, num_tokens = context.sequence_len_offset, tokens.shape[1]
    positions = torch.arange(first, first + num_tokens, device=tokens.device)
    logits = model(
        tokens,
        positions.expand(tokens.shape),
        None,
        inference_context=context,
        runtime_gather_output=True,
    )
    context.increment_sequence_len_offset(num_tokens)
    return logits[:, -1]


def _choose(logits: Tensor, sampling: Sampling | None, generator: torch.Generator) -> Tensor:
    """`[b]`, a token for each row of `[b, v]`."""
    if sampling is None:
        return logits.argmax(-1)
    likely = likeliest((logits.float() / sampling.temperature).softmax(-1), sampling.top_p)
    return torch.multinomial(likely, 1, generator=generator).squeeze(1)


def likeliest(probabilities: Tensor, top_p: float) -> Tensor:
    """Of probabilities `[b, v]` the fewest largest that reach `top_p` together; others are 0."""
    ordered, index = probabilities.sort(dim=-1, descending=True)
    # How much is likelier than a token; never less than `top_p` where it is not needed.
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, index, ordered)


def _share(chosen: Tensor, group: dist.ProcessGroup) -> None:
    """The first rank's choice on all: a rounding that differs must not lead them apart."""
    if group.size() > 1:
        dist.broadcast(chosen, dist.get_global_rank(group, 0), group=group)


def _checked_lengths(
    model: GPTModel, tokens: Tensor, num_new_tokens: int, lengths: Sequence[int] | None
) -> list[int]:
    if not isinstance(model, GPTModel) or not isinstance(model.config, HydraFields):
        raise UserError(
            "generate needs the GPTModel of a hybrid or its teacher without wrappers, got "
            f"{type(model).__name__}"
        )
    if tokens.dim() != 2 or not tokens.numel() or tokens.is_floating_point():
        raise UserError(
            f"tokens is {tokens.dtype} {tuple(tokens.shape)}; integers [rows, tokens] are needed, "
            "one of each at least"
        )
    if num_new_tokens < 1:
        raise UserError(f"num_new_tokens is {num_new_tokens}; it must be 1 or more")
    b, t = tokens.shape
    lengths = [t] * b if lengths is None else list(lengths)
    if len(lengths) != b or not all(1 <= length <= t for length in lengths):
        raise UserError(
            f"lengths is {lengths}; {b} numbers are needed, one per row, each from 1 to {t}"
        )
    least, most = int(tokens.min()), int(tokens.max())
    vocabulary = model.config.vocab_size
    if least < 0 or most >= vocabulary:
        raise UserError(
            f"tokens has ids from {least} to {most}; the vocabulary's are 0 to {vocabulary - 1}"
        )
    return lengths


def _tell_beyond(model: GPTModel, num_tokens: int) -> None:
    """Warn of more tokens, prompt and answer, than the model is built for."""
    # The last one is written and not read.
    if num_tokens - 1 > model.config.seq_length and model.pg_collection.tp.rank() == 0:
        _warn_once(
            f"generation goes on beyond the {model.config.seq_length} tokens (seq_length) that the "
            "model is built for"
        )


@functools.cache
def _warn_once(message: str) -> None:
    """Of many batches."""
    logger.warning(message)
