"""Needle samples and counterfactual pairs hold what they promise."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from kit.character_tokenizer import CharacterTokenizer

from megatron_hydra.errors import UserError
from megatron_hydra.tasks import needles

TEACHER = Path(__file__).parents[2] / "examples/quickstart/teacher"
NEEDLE = re.compile(r"The number for (\w+) is (\d{4})\.")


class PairTokenizer(CharacterTokenizer):
    """Splits every character in two tokens: no digit is one token."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [part for token in super().encode(text) for part in (token, token)]


TOKENIZER = CharacterTokenizer()
TEXT = TOKENIZER.encode("The quick brown fox jumps over a lazy dog while rain is falling. " * 100)


def draw(seed: int, length: int = 1000, depth: float = 0.5, num_keys: int = 4):
    rng = random.Random(seed)
    return needles.make_needle_sample(rng, TOKENIZER, TEXT, length, depth, num_keys)


@pytest.mark.parametrize("num_keys", [1, 8])
@pytest.mark.parametrize("length", [700, 1001])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_a_sample_has_the_length_and_one_true_answer(num_keys, length, depth):
    sample = draw(3, length, depth, num_keys)
    assert len(sample.tokens) + len(sample.answer) == length
    text = TOKENIZER.decode(sample.tokens)
    facts = NEEDLE.findall(text)
    assert len(facts) == len(dict(facts)) == num_keys
    assert dict(facts)[sample.key] == sample.value == TOKENIZER.decode(sample.answer)
    assert text.endswith(f"What is the number for {sample.key}? The number for {sample.key} is ")
    assert [sample.tokens[i] for i in sample.answer_positions] == sample.answer


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("num_keys", [1, 5])
def test_depth_is_the_share_of_the_haystack_before_the_needle(depth, num_keys):
    sample = draw(11, 900, depth, num_keys)
    text = TOKENIZER.decode(sample.tokens)
    haystack_end = text.rindex("\nWhat is the number")
    before = text[: sample.answer_positions[0]]
    sentence = r"\nThe number for \w+ is \d{4}\.\n"
    num_before = len(re.sub(sentence, "", before.rpartition("\nThe number for")[0]))
    num_text = len(re.sub(sentence, "", text[:haystack_end]))
    assert num_before == round(depth * num_text)


def test_the_haystack_is_one_running_piece_of_the_text():
    text = TOKENIZER.decode(draw(5).tokens).rpartition("\nWhat is")[0]
    haystack = re.sub(r"\nThe number for \w+ is \d{4}\.\n", "", text)
    assert len(haystack) > 500
    assert haystack in TOKENIZER.decode(TEXT)


def test_a_seed_decides_everything():
    assert draw(7) == draw(7)
    assert draw(7).tokens != draw(8).tokens


def test_keys_and_values_vary_over_samples():
    samples = [draw(seed, num_keys=1) for seed in range(60)]
    assert len({sample.key for sample in samples}) > 20
    assert len({sample.value for sample in samples}) > 50


@pytest.mark.parametrize("num_keys", [1, 6])
def test_a_counterfactual_differs_in_every_answer_token_and_nowhere_else(num_keys):
    for seed in range(20):
        clean, corrupt = needles.make_counterfactual_pair(
            random.Random(seed), TOKENIZER, TEXT, 800, 0.3, num_keys
        )
        differing = [
            i for i, (a, b) in enumerate(zip(clean.tokens, corrupt.tokens, strict=True)) if a != b
        ]
        assert tuple(differing) == clean.answer_positions == corrupt.answer_positions
        assert len(corrupt.answer) == len(clean.answer)
        assert all(a != b for a, b in zip(clean.answer, corrupt.answer, strict=True))
        assert corrupt.value.isdigit() and TOKENIZER.decode(corrupt.answer) == corrupt.value
        assert dict(NEEDLE.findall(TOKENIZER.decode(corrupt.tokens)))[clean.key] == corrupt.value


def test_a_hexadecimal_value_stands_in_the_same_sentence():
    kind = needles.ValueKind("0123456789abcdef", 8)
    for seed in range(20):
        pair = needles.make_counterfactual_pair(
            random.Random(seed), TOKENIZER, TEXT, 700, 0.6, 2, kind
        )
        for sample in pair:
            text = TOKENIZER.decode(sample.tokens)
            facts = dict(re.findall(r"The number for (\w+) is ([0-9a-f]{8})\.\n", text))
            assert len(facts) == 2 and facts[sample.key] == TOKENIZER.decode(sample.answer)
        assert all(a != b for a, b in zip(pair.clean.answer, pair.corrupt.answer, strict=True))


@pytest.mark.parametrize(
    ("spec", "name", "num_keys"),
    [("single", "single", 1), (" multi_key", "multi_key", 8), ("multi_key:04", "multi_key_4", 4)],
)
def test_a_word_names_a_task(spec, name, num_keys):
    assert needles.find_task(spec) == needles.NeedleTask(name, num_keys)


@pytest.mark.parametrize("spec", ["double", "", "single:2", "multi_key:1", "multi_key:x"])
def test_a_word_that_names_no_task_says_what_is_known(spec):
    with pytest.raises(UserError, match=f"needle task {spec!r}.*multi_key:N"):
        needles.find_task(spec)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 1.5}, "depth 1.5 is outside 0 to 1"),
        ({"length": 100}, "100 tokens has no room .* 4 needles"),
        ({"length": 10_000}, r"text has \d+ tokens, but \d+ are needed"),
        ({"num_keys": 0}, "0 needles were asked for"),
        ({"num_keys": 1000}, "1000 needles were asked for"),
    ],
)
def test_a_sample_that_cannot_be_made_says_why(arguments, message):
    with pytest.raises(UserError, match=message):
        draw(0, **arguments)


def test_a_tokenizer_that_splits_digits_further_is_refused():
    with pytest.raises(UserError, match="one token per digit"):
        needles.make_needle_sample(random.Random(0), PairTokenizer(), TEXT, 1000, 0.5)


def test_the_shipped_tokenizer_reads_a_needle_as_it_was_written():
    """Sentences are encoded in pieces; whole they must give the same tokens."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TEACHER)
    text = tokenizer.encode("words of a haystack, " * 200, add_special_tokens=False)
    for key in needles.KEYS:
        assert len(tokenizer.encode(f" {key}", add_special_tokens=False)) == 1
    sample = needles.make_needle_sample(random.Random(0), tokenizer, text, 256, 0.5, 8)
    start = sample.answer_positions[0] - 7
    needle = sample.tokens[start : sample.answer_positions[-1] + 3]
    written = tokenizer.decode(needle)
    assert written == f"\nThe number for {sample.key} is {sample.value}.\n"
    assert tokenizer.encode(written, add_special_tokens=False) == needle
