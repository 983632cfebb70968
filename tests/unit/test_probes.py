"""Needle samples, counterfactual pairs and training documents hold what they promise."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from megatron_hydra.errors import UserError
from megatron_hydra.selection import probes

TEACHER = Path(__file__).parents[2] / "examples/quickstart/teacher"
NEEDLE = re.compile(r"The number for (\w+) is (\d{4})\.")


class CharacterTokenizer:
    """One token a character, so that a test can read tokens as text without the code's help."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        assert not add_special_tokens
        return [ord(character) for character in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


class PairTokenizer(CharacterTokenizer):
    """Splits every character in two tokens: no digit is one token."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [part for token in super().encode(text) for part in (token, token)]


TOKENIZER = CharacterTokenizer()
TEXT = TOKENIZER.encode("The quick brown fox jumps over a lazy dog while rain is falling. " * 100)


def draw(seed: int, length: int = 1000, depth: float = 0.5, num_keys: int = 4):
    rng = random.Random(seed)
    return probes.make_needle_sample(rng, TOKENIZER, TEXT, length, depth, num_keys)


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
    first, again = (
        probes.make_training_document(random.Random(1), TOKENIZER, TEXT, 800) for _ in range(2)
    )
    assert first == again


def test_keys_and_values_vary_over_samples():
    samples = [draw(seed, num_keys=1) for seed in range(60)]
    assert len({sample.key for sample in samples}) > 20
    assert len({sample.value for sample in samples}) > 50


@pytest.mark.parametrize("num_keys", [1, 6])
def test_a_counterfactual_differs_in_every_answer_token_and_nowhere_else(num_keys):
    for seed in range(20):
        clean, corrupt = probes.make_counterfactual_pair(
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


@pytest.mark.parametrize("length", [300, 801])
@pytest.mark.parametrize("text_share", [None, 0.0, 0.9])
def test_a_training_document_has_the_length_and_marks_exactly_the_known_values(length, text_share):
    num_marked = 0
    for seed in range(30):
        document = probes.make_training_document(
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


def test_less_text_means_more_recalled_values():
    def count(share: float) -> int:
        return len(
            probes.make_training_document(
                random.Random(0), TOKENIZER, TEXT, 2000, text_share=share
            ).answer_positions
        )

    assert count(0.0) > 2 * count(0.8)


def test_a_text_document_is_a_running_piece():
    document = probes.make_text_document(random.Random(0), TEXT, 123)
    assert len(document.tokens) == 123 and document.answer_positions == ()
    assert TOKENIZER.decode(document.tokens) in TOKENIZER.decode(TEXT)


def test_held_out_text_is_a_tenth_and_disjoint():
    training, held_out = probes.split_held_out(range(10_007))
    assert sorted(training + held_out) == list(range(10_007))
    assert 0.09 < len(held_out) / 10_007 < 0.11


def test_local_text_is_long_and_stable():
    text = probes.local_text()
    assert len(text) > 500_000
    assert text == probes.local_text()


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


def test_a_training_document_that_cannot_be_made_says_why():
    with pytest.raises(UserError, match="40 tokens has no room"):
        probes.make_training_document(random.Random(0), TOKENIZER, TEXT, 40)
    with pytest.raises(UserError, match="are needed"):
        probes.make_text_document(random.Random(0), TEXT[:10], 11)


def test_a_tokenizer_that_splits_digits_further_is_refused():
    with pytest.raises(UserError, match="one token a digit"):
        probes.make_needle_sample(random.Random(0), PairTokenizer(), TEXT, 1000, 0.5)


def test_read_text_refuses_what_is_no_haystack(tmp_path):
    cases = {"missing.txt": None, "empty.txt": b" \n", "short.txt": b"word " * 10}
    messages = ["cannot read", "is empty", "has 49 characters; at least"]
    for (name, content), message in zip(cases.items(), messages, strict=True):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            probes.read_text(tmp_path / name)
    (tmp_path / "latin.txt").write_bytes(b"\xe9" * 30_000)
    with pytest.raises(UserError, match="not UTF-8"):
        probes.read_text(tmp_path / "latin.txt")
    (tmp_path / "good.txt").write_text("some words\n" * 3000)
    assert probes.read_text(tmp_path / "good.txt") == "some words\n" * 3000


def test_the_shipped_tokenizer_reads_a_needle_as_it_was_written():
    """Sentences are encoded in pieces; whole they must give the same tokens."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TEACHER)
    text = tokenizer.encode("words of a haystack, " * 200, add_special_tokens=False)
    for key in probes.KEYS:
        assert len(tokenizer.encode(f" {key}", add_special_tokens=False)) == 1
    sample = probes.make_needle_sample(random.Random(0), tokenizer, text, 256, 0.5, 8)
    start = sample.answer_positions[0] - 7
    needle = sample.tokens[start : sample.answer_positions[-1] + 3]
    written = tokenizer.decode(needle)
    assert written == f"\nThe number for {sample.key} is {sample.value}.\n"
    assert tokenizer.encode(written, add_special_tokens=False) == needle
