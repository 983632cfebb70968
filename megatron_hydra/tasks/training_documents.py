"""Training documents: needles in text, recalled many times, and documents of plain text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hydra.errors import UserError
from megatron_hydra.tasks.needles import (
    NUM_VALUE_DIGITS,
    NUMBER,
    Segment,
    draw_keys,
    lay_out,
    pieces_of,
)
from megatron_hydra.tasks.text import draw_text


@dataclass(frozen=True)
class TrainingDocument:
    """A document with needles and later questions about them.

    Attributes:
        tokens: The whole document.
        answer_positions: Ascending indices in ``tokens`` of value tokens that stood before.
    """

    tokens: list[int]
    answer_positions: tuple[int, ...]


def make_training_document(
    rng: random.Random,
    tokenizer: Any,
    text_tokens: Sequence[int],
    length: int,
    max_keys: int = 8,
    text_share: float | None = None,
    end: int | None = None,
) -> TrainingDocument:
    """Draw a document of exactly ``length`` tokens: needles in text, then recalled many times.

    A recall is the question of :func:`~megatron_hydra.tasks.needles.make_needle_sample` or the
    needle's sentence once more, so that every recalled value can be predicted from the context.
    The last tokens are a question and its answer, as in the tasks, and then ``end``.

    Args:
        rng: Source of all choices.
        tokenizer: As for :func:`~megatron_hydra.tasks.needles.make_needle_sample`.
        text_tokens: Text to fill with.
        length: Tokens of the document.
        max_keys: Largest number of needles; the number is drawn evenly from 1 to this.
        text_share: Share of text; None draws it evenly from 0 to 0.8.
        end: The document's last token, one of the ``length``; None: it ends with the answer.

    Raises:
        UserError: As :func:`~megatron_hydra.tasks.needles.make_needle_sample`.
    """
    pieces = pieces_of(tokenizer)
    share = rng.uniform(0.0, 0.8) if text_share is None else text_share
    stop = length if end is None else length - 1
    room = stop - pieces.num_question_tokens_max - NUM_VALUE_DIGITS
    fitting = room // pieces.num_needle_tokens_max
    if fitting < 1:
        raise UserError(f"a training document of {length} tokens has no room for a needle")
    keys = draw_keys(rng, rng.randint(1, min(max_keys, fitting)))
    facts = [(key, NUMBER.draw(rng)) for key in keys]
    asked = rng.choice(facts)
    segments = [pieces.needle(*fact) for fact in facts]
    num_used = sum(len(segment.tokens) for segment in segments)
    limit = max(num_used, int(room * (1.0 - share)))
    recalls = []
    while num_used <= limit:
        recall = (pieces.recall if rng.random() < 0.5 else pieces.needle)(*rng.choice(facts))
        num_used += len(recall.tokens)
        if num_used <= limit:
            recalls.append(recall)
    segments = _first_mentions_first(rng, segments + recalls)
    last = pieces.question(asked[0])
    num_text = stop - sum(len(s.tokens) for s in segments) - len(last) - NUM_VALUE_DIGITS
    document = _spread(rng, segments, draw_text(rng, text_tokens, num_text))
    answer = range(stop - NUM_VALUE_DIGITS, stop)
    tokens = document.tokens + last + pieces.value(asked[1]) + [end] * (end is not None)
    return TrainingDocument(tokens, (*document.answer_positions, *answer))


def make_text_document(
    rng: random.Random, text_tokens: Sequence[int], length: int, end: int | None = None
) -> TrainingDocument:
    """Draw a running piece of ``length`` text tokens; UserError if the text is shorter.

    Where ``end`` is given, it stands in the last one's place.
    """
    tokens = draw_text(rng, text_tokens, length)
    if end is not None:
        tokens[-1] = end
    return TrainingDocument(tokens, ())


def _first_mentions_first(rng: random.Random, segments: list[Segment]) -> list[Segment]:
    """Shuffle, but keep the order within a key: ``segments`` lists its needle, then its recalls."""
    waiting: dict[str, list[Segment]] = {}
    for segment in segments:
        waiting.setdefault(segment.key, []).append(segment)
    slots = [segment.key for segment in segments]
    rng.shuffle(slots)
    return [waiting[key].pop(0) for key in slots]


def _spread(rng: random.Random, segments: list[Segment], text: list[int]) -> TrainingDocument:
    """Spread segments over the text; every value but a key's first can be known from before."""
    cuts = sorted(rng.randint(0, len(text)) for _ in segments)
    tokens, starts = lay_out(segments, cuts, text)
    seen: set[str] = set()
    positions: list[int] = []
    for segment, start in zip(segments, starts, strict=True):
        if segment.key in seen:
            positions.extend(range(start, start + NUM_VALUE_DIGITS))
        seen.add(segment.key)
    return TrainingDocument(tokens, tuple(positions))
