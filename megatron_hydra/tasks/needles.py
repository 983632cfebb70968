"""Samples, counterfactual pairs and needles: sentences that hide a value in a haystack of tokens.

RULER-style (arXiv 2404.06654): sentences of the form ``The number for amber is 4821.`` (needles)
stand in running text (the haystack), and a question about one of them comes last. RULER's essay
haystack is replaced by local text, and its 7-digit numbers by 4 digits.

Everything is drawn from a ``random.Random`` that the caller seeds; a tokenizer is any object with
``encode(text, add_special_tokens=False) -> list[int]``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from megatron_hydra.errors import UserError
from megatron_hydra.tasks.text import draw_text

NUM_VALUE_DIGITS = 4
# Common words, so that a small tokenizer has them whole and the haystack holds them too.
_KEY_WORDS = (
    "address argument attribute block bytes call case class code command context data default "
    "dictionary directory error example exception expression file format frame function import "
    "instance integer item key keyword line list message method mode module name object open "
    "option path position print read result sequence server set state statement string support "
    "text thread time tuple type value variable version"
)
KEYS = tuple(_KEY_WORDS.split())


@dataclass(frozen=True)
class ValueKind:
    """What a needle's value looks like: ``num_characters`` of ``characters``, one token each."""

    characters: str
    num_characters: int

    def draw(self, rng: random.Random) -> str:
        """Draw a value."""
        return "".join(rng.choices(self.characters, k=self.num_characters))

    def draw_other(self, rng: random.Random, value: str) -> str:
        """Draw a value that differs from ``value`` in every character."""
        return "".join(rng.choice([c for c in self.characters if c != old]) for old in value)


NUMBER = ValueKind("0123456789", NUM_VALUE_DIGITS)


@dataclass(frozen=True)
class NeedleTask:
    """A retrieval task: its name and how many needles stand in the haystack.

    Attributes:
        name: Name in results, for example ``single``.
        num_keys: Needles in the haystack; one of them is asked for.
    """

    name: str
    num_keys: int


TASKS = {task.name: task for task in (NeedleTask("single", 1), NeedleTask("multi_key", 8))}


def find_task(spec: str) -> NeedleTask:
    """The needle task that a word names: one of :data:`TASKS`, or ``multi_key:N`` of N needles.

    Raises:
        UserError: If there is no such task.
    """
    name, colon, keys = spec.strip().partition(":")
    if name not in TASKS:
        known = ", ".join(TASKS)
        raise UserError(f"unknown needle task {spec!r}; known: {known}, multi_key:N")
    if not colon:
        return TASKS[name]
    if TASKS[name].num_keys == 1 or not keys.isdigit() or int(keys) < 2:
        raise UserError(f"needle task {spec!r} is not understood; write multi_key:N with N >= 2")
    return NeedleTask(f"{name}_{int(keys)}", int(keys))


@dataclass(frozen=True)
class Sample:
    """A prompt and what should come next.

    Attributes:
        tokens: The prompt, without the answer.
        answer: The tokens that should come next.
        answer_positions: Indices in ``tokens`` of the answer's own copy; empty where there is none.
    """

    tokens: list[int]
    answer: list[int]
    answer_positions: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class NeedleSample(Sample):
    """One question about one value in the haystack.

    Attributes:
        depth: Where the value's sentence stands in the haystack, from 0 (start) to 1 (end).
        key: The word that is asked for.
        value: The characters that answer.
    """

    depth: float
    key: str
    value: str


class CounterfactualPair(NamedTuple):
    """Two samples with equally many tokens in the prompt and in the answer."""

    clean: Sample
    corrupt: Sample


def make_needle_sample(
    rng: random.Random,
    tokenizer: Any,
    text_tokens: Sequence[int],
    length: int,
    depth: float,
    num_keys: int = 1,
    kind: ValueKind = NUMBER,
) -> NeedleSample:
    """Draw one sample; its tokens and its answer together are ``length`` tokens.

    Args:
        rng: Source of the haystack, keys, values and places of the other needles.
        tokenizer: Encodes the sentences; a value's characters must be one token each.
        text_tokens: Text from which the haystack, one running piece, is drawn.
        length: Tokens of context, question and answer together.
        depth: Place of the needle asked for, as a share of the haystack before it.
        num_keys: Needles in all; the others have other keys and stand at random places.
        kind: What their values look like.

    Raises:
        UserError: If the needles do not fit in ``length``, the text is shorter than the haystack,
            or the tokenizer splits a value's characters.
    """
    if not 0.0 <= depth <= 1.0:
        raise UserError(f"needle depth {depth} is outside 0 to 1")
    keys, values = draw_keys(rng, num_keys), [kind.draw(rng) for _ in range(num_keys)]
    pieces = pieces_of(tokenizer)
    needles = [pieces.needle(key, value) for key, value in zip(keys, values, strict=True)]
    question, answer = pieces.question(keys[0]), pieces.value(values[0])
    num_fixed = sum(len(needle.tokens) for needle in needles) + len(question) + len(answer)
    if length <= num_fixed:
        raise UserError(
            f"a sample of {length} tokens has no room for text and {num_keys} needles: at least "
            f"{num_fixed + 1} tokens are needed"
        )
    text = draw_text(rng, text_tokens, length - num_fixed)
    cuts = [round(depth * len(text))] + [rng.randint(0, len(text)) for _ in needles[1:]]
    order = list(range(num_keys))
    rng.shuffle(order)  # needles at the same place stand in random order
    order.sort(key=lambda i: cuts[i])
    tokens, starts = lay_out([needles[i] for i in order], [cuts[i] for i in order], text)
    start = starts[order.index(0)]
    positions = tuple(range(start, start + len(answer)))
    return NeedleSample(
        tokens + question, answer, positions, depth=depth, key=keys[0], value=values[0]
    )


def make_counterfactual_pair(
    rng: random.Random,
    tokenizer: Any,
    text_tokens: Sequence[int],
    length: int,
    depth: float,
    num_keys: int = 1,
    kind: ValueKind = NUMBER,
) -> CounterfactualPair:
    """Draw a sample and its twin whose needle gives another value of equal token length.

    Arguments and errors as :func:`make_needle_sample`.
    """
    clean = make_needle_sample(rng, tokenizer, text_tokens, length, depth, num_keys, kind)
    return with_other_value(rng, tokenizer, clean, kind)


def with_other_value(
    rng: random.Random, tokenizer: Any, clean: NeedleSample, kind: ValueKind = NUMBER
) -> CounterfactualPair:
    """Pair a sample with its twin in which the value is another one of its kind.

    The prompts differ at ``answer_positions`` only, and every answer token differs.
    """
    other = kind.draw_other(rng, clean.value)
    answer = pieces_of(tokenizer).value(other)
    tokens = list(clean.tokens)
    for position, token in zip(clean.answer_positions, answer, strict=True):
        tokens[position] = token
    return CounterfactualPair(clean, replace(clean, tokens=tokens, answer=answer, value=other))


class Segment(NamedTuple):
    """A sentence in tokens; its value stands at ``value_start``."""

    tokens: list[int]
    value_start: int
    key: str


class TextPieces:
    """The template's sentences in a tokenizer's tokens, put together from pieces.

    Pieces, and values character by character, so that a value has the same tokens wherever it
    stands, whatever the tokenizer would merge.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}
        self.value(NUMBER.characters)  # a tokenizer that splits digits is refused at once
        value = "0" * NUM_VALUE_DIGITS
        self.num_needle_tokens_max = max(len(self.needle(key, value).tokens) for key in KEYS)
        self.num_question_tokens_max = max(len(self.question(key)) for key in KEYS)

    def encode(self, text: str) -> list[int]:
        """The tokens of a piece."""
        if text not in self._cache:
            self._cache[text] = list(self._tokenizer.encode(text, add_special_tokens=False))
        return self._cache[text]

    def value(self, value: str) -> list[int]:
        """The tokens of a value, one per character; UserError if the tokenizer splits one."""
        for character in value:
            if len(self.encode(character)) != 1:
                raise UserError(
                    f"the tokenizer encodes {character!r} as {len(self.encode(character))} tokens; "
                    "needles need one token per digit or letter of a value, so that two answers "
                    "have equally many"
                )
        return [self.encode(character)[0] for character in value]

    def needle(self, key: str, value: str) -> Segment:
        """The sentence that states a value."""
        before = self.encode("\nThe number for") + self._key(key) + self.encode(" is ")
        return Segment(before + self.value(value) + self.encode(".\n"), len(before), key)

    def question(self, key: str) -> list[int]:
        """The question for a key's value, up to where the value should come."""
        first = self.encode("\nWhat is the number for") + self._key(key) + self.encode("?")
        return first + self.encode(" The number for") + self._key(key) + self.encode(" is ")

    def recall(self, key: str, value: str) -> Segment:
        """The question and its answer."""
        before = self.question(key)
        return Segment(before + self.value(value) + self.encode(".\n"), len(before), key)

    def _key(self, key: str) -> list[int]:
        return self.encode(f" {key}")


@lru_cache(maxsize=8)
def pieces_of(tokenizer: Any) -> TextPieces:
    """The pieces of a tokenizer, made once."""
    return TextPieces(tokenizer)


def draw_keys(rng: random.Random, num_keys: int) -> list[str]:
    """Draw different keys."""
    if not 1 <= num_keys <= len(KEYS):
        raise UserError(f"{num_keys} needles were asked for; 1 to {len(KEYS)} are possible")
    return rng.sample(KEYS, num_keys)


def check_length(length: int, least: int) -> None:
    """Raise a UserError that names the least length if ``length`` is below it."""
    if length < least:
        raise UserError(f"samples of {length} tokens are too short: at least {least} are needed")


def lay_out(
    segments: Sequence[Segment], cuts: Sequence[int], text: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Insert segments at ascending cuts of the text: (tokens, where each value starts)."""
    tokens: list[int] = []
    starts: list[int] = []
    done = 0
    for segment, cut in zip(segments, cuts, strict=True):
        tokens.extend(text[done:cut])
        starts.append(len(tokens) + segment.value_start)
        tokens.extend(segment.tokens)
        done = cut
    tokens.extend(text[done:])
    return tokens, starts
