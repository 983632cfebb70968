"""Counterfactual pairs for what is looked up in the context: needles, records, variable chains.

Every function draws one pair of ``length`` tokens with the answer; ``depth``, from 0 to 1, says
where what is asked for stands. Arguments and errors are those of
:func:`~megatron_hydra.tasks.needles.make_counterfactual_pair`; a length at which some draw
would not fit is refused at once, so that the least length named holds for every pair.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from megatron_hydra.tasks.needles import (
    KEYS,
    NUM_VALUE_DIGITS,
    NUMBER,
    CounterfactualPair,
    NeedleSample,
    Segment,
    TextPieces,
    ValueKind,
    check_length,
    lay_out,
    make_counterfactual_pair,
    pieces_of,
    with_other_value,
)
from megatron_hydra.tasks.text import draw_text

HEX = ValueKind("0123456789abcdef", 8)
"""The first group of a UUID; RULER's values are whole ones, whose hyphens no pair could change."""
NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
"""RULER's filler."""
NUM_HOPS = 2
NUM_CHAINS = 2
"""So that the value asked for is not the only one."""


def needle_pair(
    rng: random.Random,
    tokenizer: Any,
    text_tokens: Sequence[int],
    length: int,
    depth: float,
    *,
    num_keys: int = 1,
    kind: ValueKind = NUMBER,
    noise: bool = False,
) -> CounterfactualPair:
    """Needles in running text or, with ``noise``, in RULER's filler."""
    pieces = pieces_of(tokenizer)
    num_more = kind.num_characters - NUM_VALUE_DIGITS
    num_needles = num_keys * (pieces.num_needle_tokens_max + num_more)
    check_length(length, num_needles + pieces.num_question_tokens_max + kind.num_characters + 1)
    if noise:
        filler = pieces.encode(NOISE)
        text_tokens = filler * (length // len(filler) + 1)
    return make_counterfactual_pair(rng, tokenizer, text_tokens, length, depth, num_keys, kind)


def needle_records_pair(
    rng: random.Random, tokenizer: Any, text_tokens: Sequence[int], length: int, depth: float
) -> CounterfactualPair:
    """A haystack of as many needles as fit."""
    pieces = pieces_of(tokenizer)
    sample = _fill(rng, pieces, text_tokens, length, depth, pieces.needle, pieces.question)
    return with_other_value(rng, tokenizer, sample)


def key_value_pair(
    rng: random.Random, tokenizer: Any, text_tokens: Sequence[int], length: int, depth: float
) -> CounterfactualPair:
    """As many lines ``"key": "value",`` as fit, and the key of one of them."""
    pieces = pieces_of(tokenizer)

    def record(key: str, value: str) -> Segment:
        before = pieces.encode('\n"') + pieces.encode(key) + pieces.encode('": "')
        return Segment(before + pieces.value(value) + pieces.encode('",'), len(before), key)

    def question(key: str) -> list[int]:
        return pieces.encode('\nKey: "') + pieces.encode(key) + pieces.encode('"\nValue: "')

    sample = _fill(rng, pieces, text_tokens, length, depth, record, question)
    return with_other_value(rng, tokenizer, sample)


def variable_pair(
    rng: random.Random, tokenizer: Any, text_tokens: Sequence[int], length: int, depth: float
) -> CounterfactualPair:
    """Chains ``VAR X17 = 4821.``, ``VAR X80 = VAR X17.``, …; the end of one is asked for.

    The value stands at ``depth``, the chain's other sentences at random places after it.
    """
    pieces = pieces_of(tokenizer)
    num_variables = NUM_HOPS + 1
    names = [f"{number:02d}" for number in rng.sample(range(100), NUM_CHAINS * num_variables)]
    values = [NUMBER.draw(rng) for _ in range(NUM_CHAINS)]
    chains = [
        _chain(pieces, names[i * num_variables : (i + 1) * num_variables], value)
        for i, value in enumerate(values)
    ]
    asked, answer = names[num_variables - 1], pieces.value(values[0])
    name = pieces.value(asked)
    question = pieces.encode("\nWhat is the value of VAR X") + name
    question += pieces.encode("? The value of VAR X") + name + pieces.encode(" is ")
    num_fixed = sum(len(s.tokens) for chain in chains for s in chain) + len(question) + len(answer)
    check_length(length, num_fixed)

    text = draw_text(rng, text_tokens, length - num_fixed)
    placed: list[list[tuple[int, Segment]]] = []
    for chain in chains:
        first = rng.randint(0, len(text)) if placed else round(depth * len(text))
        cuts = [first, *sorted(rng.randint(first, len(text)) for _ in range(NUM_HOPS))]
        placed.append(list(zip(cuts, chain, strict=True)))
    rng.shuffle(placed)  # chains at the same place stand in random order
    order = sorted((entry for chain in placed for entry in chain), key=lambda entry: entry[0])
    segments = [segment for _, segment in order]
    tokens, starts = lay_out(segments, [cut for cut, _ in order], text)
    start = starts[segments.index(chains[0][0])]
    positions = tuple(range(start, start + len(answer)))
    sample = NeedleSample(
        tokens + question, answer, positions, depth=depth, key=f"X{asked}", value=values[0]
    )
    return with_other_value(rng, tokenizer, sample)


def _chain(pieces: TextPieces, names: Sequence[str], value: str) -> list[Segment]:
    """A value's assignment to the first variable, and of each variable to the next."""
    sentences = []
    for index, name in enumerate(names):
        before = pieces.encode("\nVAR X") + pieces.value(name)
        if index == 0:
            before, right = before + pieces.encode(" = "), pieces.value(value)
        else:
            before, right = before + pieces.encode(" = VAR X"), pieces.value(names[index - 1])
        sentences.append(Segment(before + right + pieces.encode(".\n"), len(before), name))
    return sentences


def _fill(
    rng: random.Random,
    pieces: TextPieces,
    text_tokens: Sequence[int],
    length: int,
    depth: float,
    record: Callable[[str, str], Segment],
    question: Callable[[str], list[int]],
) -> NeedleSample:
    """As many records as fit, one of them asked for; text of less than a record stands first."""
    sizes = [len(record(key, "0" * NUM_VALUE_DIGITS).tokens) for key in KEYS]
    num_question = max(len(question(key)) for key in KEYS)
    check_length(length, 2 * max(sizes) + num_question + NUM_VALUE_DIGITS)
    keys, value = _draw_keys(rng, length // min(sizes)), NUMBER.draw(rng)
    asked, asked_tokens, answer = record(keys[0], value), question(keys[0]), pieces.value(value)
    room = length - len(asked.tokens) - len(asked_tokens) - len(answer)
    records: list[Segment] = []
    for key in keys[1:]:
        other = record(key, NUMBER.draw(rng))
        if len(other.tokens) > room:
            break
        records.append(other)
        room -= len(other.tokens)
    index = round(depth * len(records))
    records.insert(index, asked)
    text = draw_text(rng, text_tokens, room)
    tokens, starts = lay_out(records, [len(text)] * len(records), text)
    positions = tuple(range(starts[index], starts[index] + len(answer)))
    return NeedleSample(
        tokens + asked_tokens, answer, positions, depth=depth, key=keys[0], value=value
    )


def _draw_keys(rng: random.Random, num_keys: int) -> list[str]:
    """Draw different keys of equally many words: one word, or more where words do not suffice."""
    num_words = 1
    while len(KEYS) ** num_words < num_keys:
        num_words += 1
    numbers = rng.sample(range(len(KEYS) ** num_words), num_keys)
    return [
        " ".join(KEYS[number // len(KEYS) ** i % len(KEYS)] for i in range(num_words))
        for number in numbers
    ]
