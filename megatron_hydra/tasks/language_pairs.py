"""Counterfactual pairs of what retrieval does not see: text, induction, in-context classification.

Functions as in :mod:`~megatron_hydra.tasks.lookup_pairs`, with the same arguments and errors.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from megatron_hydra.errors import UserError
from megatron_hydra.tasks.needles import (
    NUMBER,
    CounterfactualPair,
    Sample,
    check_length,
    pieces_of,
)
from megatron_hydra.tasks.text import check_text, draw_text

NUM_PREDICTED_TOKENS = 16
"""Of text; one token alone says little."""
NUM_SHARED_TOKENS = 1
"""Before the predicted ones, equal in both runs: so every token at which something is predicted is
equal, and nothing but attention to earlier tokens can make a difference."""
NUM_CUE_TOKENS = 4
NUM_COPIED_TOKENS = 4
CATEGORIES = (
    ("dog", "cat", "horse", "cow", "sheep", "lion", "tiger", "bear", "wolf", "mouse"),
    ("red", "blue", "green", "yellow", "black", "white", "brown", "orange", "pink", "purple"),
    ("bread", "cheese", "rice", "soup", "cake", "butter", "meat", "fruit", "sugar", "salt"),
    ("table", "chair", "bed", "desk", "lamp", "door", "window", "shelf", "mirror", "clock"),
    ("rain", "snow", "wind", "storm", "cloud", "fog", "ice", "sun", "frost", "thunder"),
)
"""Words that belong together."""
NUM_EXAMPLES = 4
"""Of each of the two categories."""


def text_pair(
    rng: random.Random, tokenizer: Any, text_tokens: Sequence[int], length: int, depth: float
) -> CounterfactualPair:
    """Running text; in the corrupt prompt all but the last token is text of another place.

    Both answers are the text's next tokens, so that the gap is what the context gives. Nothing is
    asked for, so ``depth`` changes nothing.
    """
    num_local = NUM_SHARED_TOKENS + NUM_PREDICTED_TOKENS
    check_length(length, num_local + 1)
    num_replaced = length - num_local
    check_text(text_tokens, length + num_replaced)
    first, second = (length, num_replaced) if rng.random() < 0.5 else (num_replaced, length)
    border = rng.randint(first, len(text_tokens) - second)  # so that the places do not overlap
    places = [
        draw_text(rng, text_tokens[:border], first),
        draw_text(rng, text_tokens[border:], second),
    ]
    other, clean = sorted(places, key=len)
    prompt, answer = clean[:-NUM_PREDICTED_TOKENS], clean[-NUM_PREDICTED_TOKENS:]
    corrupt = Sample(other + prompt[num_replaced:], answer)
    return CounterfactualPair(Sample(prompt, answer), corrupt)


def induction_pair(
    rng: random.Random, tokenizer: Any, text_tokens: Sequence[int], length: int, depth: float
) -> CounterfactualPair:
    """Random tokens in which ``A B`` stands at ``depth``; after ``A`` again, ``B`` should come.

    The corrupt prompt has another ``B``. ``A`` and ``B`` are some tokens long; none of them stands
    elsewhere. They come from the tokenizer's ordinary vocabulary.
    """
    num_fixed = 2 * (NUM_CUE_TOKENS + NUM_COPIED_TOKENS)
    check_length(length, num_fixed)
    vocabulary = _ordinary_tokens(tokenizer)
    if len(vocabulary) < 2 * num_fixed:
        raise UserError(
            f"the tokenizer has {len(vocabulary)} ordinary tokens; at least {2 * num_fixed} are "
            "needed"
        )
    chosen = rng.sample(vocabulary, NUM_CUE_TOKENS + 2 * NUM_COPIED_TOKENS)
    cue = chosen[:NUM_CUE_TOKENS]
    copied = chosen[NUM_CUE_TOKENS:-NUM_COPIED_TOKENS]
    other = chosen[-NUM_COPIED_TOKENS:]
    rest = sorted(set(vocabulary) - set(chosen))
    noise = rng.choices(rest, k=length - num_fixed)
    cut = round(depth * len(noise))
    start = cut + NUM_CUE_TOKENS
    positions = tuple(range(start, start + NUM_COPIED_TOKENS))

    def sample(answer: list[int]) -> Sample:
        return Sample([*noise[:cut], *cue, *answer, *noise[cut:], *cue], answer, positions)

    return CounterfactualPair(sample(copied), sample(other))


def classification_pair(
    rng: random.Random, tokenizer: Any, text_tokens: Sequence[int], length: int, depth: float
) -> CounterfactualPair:
    """Lines ``word -> digit`` of two categories, at ``depth`` of running text, and a new word.

    The digit of each category is drawn; the corrupt prompt has the two exchanged.
    """
    pieces = pieces_of(tokenizer)

    def line(word: str) -> list[int]:
        return pieces.encode("\n") + pieces.encode(word) + pieces.encode(" -> ")

    size = max(len(line(word)) for words in CATEGORIES for word in words)
    num_examples = 2 * NUM_EXAMPLES
    check_length(length, num_examples * (size + 1) + len(pieces.encode("\n")) + size + 1)
    words = [rng.sample(category, NUM_EXAMPLES + 1) for category in rng.sample(CATEGORIES, 2)]
    labels = rng.sample(NUMBER.characters, 2)
    asked = words[0].pop()
    examples = [(word, category) for category in (0, 1) for word in words[category][:NUM_EXAMPLES]]
    rng.shuffle(examples)
    num_fixed = sum(len(line(word)) + 1 for word, _ in examples)
    num_fixed += len(pieces.encode("\n")) + len(line(asked)) + 1
    text = draw_text(rng, text_tokens, length - num_fixed)
    cut = round(depth * len(text))

    def sample(labels: Sequence[str]) -> Sample:
        lines = [line(word) + pieces.value(labels[category]) for word, category in examples]
        block = [token for tokens in lines for token in tokens] + pieces.encode("\n")
        return Sample(text[:cut] + block + text[cut:] + line(asked), pieces.value(labels[0]))

    return CounterfactualPair(sample(labels), sample(labels[::-1]))


@lru_cache(maxsize=8)
def _ordinary_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The vocabulary without special and added tokens, ascending."""
    left_out = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return tuple(sorted(set(tokenizer.get_vocab().values()) - left_out))
