"""Training documents hold what they promise: length, needles, marked recalls."""

from __future__ import annotations

import random
import re

import pytest
from kit.character_tokenizer import CharacterTokenizer

from megatron_hydra.errors import UserError
from megatron_hydra.tasks.training_documents import (
    make_text_document,
    make_training_document,
)

TOKENIZER = CharacterTokenizer()
TEXT = TOKENIZER.encode("The quick brown fox jumps over a lazy dog while rain is falling. " * 100)


@pytest.mark.parametrize("length", [300, 801])
@pytest.mark.parametrize("text_share", [None, 0.0, 0.9])
def test_a_training_document_has_the_length_and_marks_exactly_the_known_values(length, text_share):
    num_marked = 0
    for seed in range(30):
        document = make_training_document(
            random.Random(seed), TOKENIZER, TEXT, length, text_share=text_share
        )
        assert len(document.tokens) == length
        text = TOKENIZER.decode(document.tokens)
        known: dict[str, str] = {}
        expected: list[int] = []
        for match in re.finditer(r"he number for (\w+) is (\d{4})", text):
            key, value = match.groups()
            if key in known:
                assert known[key] == value
                expected.extend(range(*match.span(2)))
            known[key] = value
        assert list(document.answer_positions) == expected
        assert re.search(r"\nWhat is the number for (\w+)\? The number for \1 is \d{4}$", text)
        num_marked += len(expected)
    if text_share == 0.0:
        assert num_marked > 30 * 4  # more is recalled than the last question


@pytest.mark.parametrize("length", [300, 801])
def test_a_document_ends_after_its_answer(length):
    """The end is one of the tokens, and takes no digit's place."""
    for seed in range(10):
        document = make_training_document(random.Random(seed), TOKENIZER, TEXT, length, end=7)
        shorter = make_training_document(random.Random(seed), TOKENIZER, TEXT, length - 1)
        assert document.tokens == [*shorter.tokens, 7] and len(document.tokens) == length
        assert document.answer_positions == shorter.answer_positions
        assert document.answer_positions[-1] == length - 2
        text = make_text_document(random.Random(seed), TEXT, length, 7)
        assert len(text.tokens) == length and text.tokens.count(7) == 1 and text.tokens[-1] == 7
        assert TOKENIZER.decode(text.tokens[:-1]) in TOKENIZER.decode(TEXT)


def test_less_text_means_more_recalled_values():
    def count(share: float) -> int:
        return len(
            make_training_document(
                random.Random(0), TOKENIZER, TEXT, 2000, text_share=share
            ).answer_positions
        )

    assert count(0.0) > 2 * count(0.8)


def test_a_text_document_is_a_running_piece():
    document = make_text_document(random.Random(0), TEXT, 123)
    assert len(document.tokens) == 123 and document.answer_positions == ()
    assert TOKENIZER.decode(document.tokens) in TOKENIZER.decode(TEXT)


def test_a_seed_decides_everything():
    first, again, other = (
        make_training_document(random.Random(seed), TOKENIZER, TEXT, 800) for seed in (1, 1, 2)
    )
    assert first == again
    assert first.tokens != other.tokens


def test_a_training_document_that_cannot_be_made_says_why():
    with pytest.raises(UserError, match="40 tokens has no room"):
        make_training_document(random.Random(0), TOKENIZER, TEXT, 40)
    with pytest.raises(UserError, match="are needed"):
        make_text_document(random.Random(0), TEXT[:10], 11)
