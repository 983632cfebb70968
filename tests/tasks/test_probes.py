"""Sub-probes, read back as text and solved by other means: pairs ask what they claim to ask."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from kit.character_tokenizer import CharacterTokenizer
from kit.tiny_qwen3 import write_byte_tokenizer

from megatron_hydra.errors import UserError
from megatron_hydra.tasks.language_pairs import CATEGORIES
from megatron_hydra.tasks.lookup_pairs import NOISE
from megatron_hydra.tasks.needles import KEYS, CounterfactualPair, Sample
from megatron_hydra.tasks.probes import SUB_PROBES, Probe, make_probe
from megatron_hydra.teachers.tokenizer import load_tokenizer

TEACHER = Path(__file__).parents[2] / "examples/quickstart/teacher"
WORDS = ("rain", "fell", "over", "quiet", "hills", "and", "nobody", "saw", "the", "old", "river")
TEXT = " ".join(random.Random(0).choices(WORDS, k=4000))
NEEDLE = r"\nThe number for ([\w ]+?) is ([0-9a-f]+)\.\n"
NUM_NEEDLES = {
    "niah_single_1": 1, "niah_single_2": 1, "niah_single_3": 1, "niah_multikey_1": 4,
    "single": 1, "multi_key:3": 3,
}  # fmt: skip
LOOKED_UP = (*NUM_NEEDLES, "niah_multikey_2", "kv_retrieval", "variable_tracking")
SPECS = (*SUB_PROBES, "single", "multi_key:3")
WITH_COPY = (*LOOKED_UP, "induction")  # the answer stands in the prompt


@pytest.fixture(scope="module", params=["bytes", "quickstart"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "quickstart":
        return load_tokenizer(TEACHER)
    folder = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(folder)
    return load_tokenizer(folder)


def draw(spec: str, tokenizer: Any, length: int = 256, num_pairs: int = 6, seed: int = 0) -> Probe:
    return make_probe(spec, tokenizer, encode(tokenizer, TEXT), length, num_pairs, seed)


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def least_length(spec: str, tokenizer: Any) -> int:
    """What the error message says."""
    with pytest.raises(UserError, match="samples of 5 tokens are too short") as error:
        draw(spec, tokenizer, 5)
    found = re.match(r"probe '(\w+)': .*: at least (\d+) are needed", str(error.value))
    assert found and found[1] == spec.replace(":", "_")
    return int(found[2])


def solve(prompt: str) -> str:
    """Answer a question as a reader would, by what the prompt says alone."""
    if found := re.search(r"\nWhat is the number for ([\w ]+)\? The number for \1 is $", prompt):
        (value,) = [value for key, value in re.findall(NEEDLE, prompt) if key == found[1]]
        return value
    if found := re.search(r'\nKey: "([\w ]+)"\nValue: "$', prompt):
        (value,) = re.findall(rf'"{found[1]}": "(\d{{4}})"', prompt)
        return value
    if found := re.search(r"\nWhat is the value of VAR (X\d\d)\? The value of VAR \1 is $", prompt):
        values: dict[str, str] = {}
        for name, right in re.findall(r"\nVAR (X\d\d) = (VAR X\d\d|\d{4})\.\n", prompt):
            values[name] = values[right[4:]] if right.startswith("VAR") else right
        return values[found[1]]
    (asked,) = re.findall(r"\n(\w+) -> $", prompt)
    (category,) = [category for category in CATEGORIES if asked in category]
    (label,) = {label for word, label in examples(prompt) if word in category}
    return label


def examples(prompt: str) -> list[tuple[str, str]]:
    return re.findall(r"\n(\w+) -> (\d)(?=\n)", prompt)


def differing(pair: CounterfactualPair) -> list[int]:
    both = zip(pair.clean.tokens, pair.corrupt.tokens, strict=True)
    return [i for i, (a, b) in enumerate(both) if a != b]


@pytest.mark.parametrize("length", [256, 301])
@pytest.mark.parametrize("spec", SPECS)
def test_prompts_and_answers_have_the_length_and_answers_differ(spec, length, tokenizer):
    probe = draw(spec, tokenizer, length)
    assert len(probe.pairs) == 6 and probe.length_tokens == length
    for clean, corrupt in probe.pairs:
        assert len(clean.tokens) + len(clean.answer) == length
        assert len(corrupt.tokens) + len(corrupt.answer) == length
        same = [a == b for a, b in zip(clean.answer, corrupt.answer, strict=True)]
        assert all(same) if probe.readout == "log_probability" else not any(same)


@pytest.mark.parametrize("spec", [*LOOKED_UP, "classification"])
def test_a_reader_of_the_prompt_finds_the_answer(spec, tokenizer):
    for pair in draw(spec, tokenizer, num_pairs=12).pairs:
        for sample in pair:
            assert solve(tokenizer.decode(sample.tokens)) == tokenizer.decode(sample.answer)


@pytest.mark.parametrize("spec", WITH_COPY)
def test_the_prompts_differ_in_the_answers_own_copy_alone(spec, tokenizer):
    for pair in draw(spec, tokenizer).pairs:
        assert tuple(differing(pair)) == pair.clean.answer_positions
        for sample in pair:
            assert [sample.tokens[i] for i in sample.answer_positions] == sample.answer


@pytest.mark.parametrize("spec", [*WITH_COPY, "classification"])
def test_what_is_asked_for_spreads_evenly_over_the_prompt(spec, tokenizer):
    starts = [differing(pair)[0] for pair in draw(spec, tokenizer, 1200, num_pairs=5).pairs]
    assert starts == sorted(starts)
    for start, depth in zip(starts, (0.1, 0.3, 0.5, 0.7, 0.9), strict=True):
        assert abs(start / 1200 - depth) < 0.15  # other sentences and the question take room


@pytest.mark.parametrize("spec", NUM_NEEDLES)
def test_needles_stand_in_a_running_piece_of_the_haystack(spec, tokenizer):
    source = NOISE * 10 if spec == "niah_single_1" else TEXT
    for clean, _ in draw(spec, tokenizer).pairs:
        context, _, _ = tokenizer.decode(clean.tokens).rpartition("\nWhat is the number")
        haystack, number = re.subn(NEEDLE, "", context)
        assert number == NUM_NEEDLES[spec]
        assert haystack and haystack in source


def test_the_values_are_numbers_but_for_the_third_sub_probe(tokenizer):
    for spec in LOOKED_UP:
        values = [tokenizer.decode(pair.clean.answer) for pair in draw(spec, tokenizer).pairs]
        long = spec == "niah_single_3"
        assert all(re.fullmatch("[0-9a-f]{8}" if long else r"\d{4}", value) for value in values)
        assert not long or re.search("[a-f]", "".join(values))


@pytest.mark.parametrize("length", [256, 4096])
@pytest.mark.parametrize(
    ("spec", "record"), [("niah_multikey_2", NEEDLE), ("kv_retrieval", r'\n"([\w ]+)": "(\d+)",')]
)
def test_records_fill_the_prompt(spec, record, length, tokenizer):
    for clean, _ in draw(spec, tokenizer, length, num_pairs=3).pairs:
        prompt = tokenizer.decode(clean.tokens)
        keys = [key for key, _ in re.findall(record, prompt)]
        assert len(keys) >= 5 and len(set(keys)) == len(keys)
        left = re.sub(record, "", prompt).rpartition("\nWhat" if "niah" in spec else "\nKey")[0]
        assert left in TEXT
        assert len(encode(tokenizer, left)) < 60  # as long as the longest record, at most
        if length == 4096:
            assert len(keys) > len(KEYS) and " " in keys[0]  # more than there are words


@pytest.mark.parametrize("spec", ["niah_multikey_2", "kv_retrieval"])
def test_the_record_asked_for_has_a_rival_at_the_least_length(spec, tokenizer):
    for clean, _ in draw(spec, tokenizer, least_length(spec, tokenizer), num_pairs=100).pairs:
        records = re.findall(r"(?<=is |: \W)\d{4}(?=\W)", tokenizer.decode(clean.tokens))
        assert len(records) >= 2


def test_variables_take_their_value_over_two_hops_and_have_rivals(tokenizer):
    for clean, _ in draw("variable_tracking", tokenizer).pairs:
        sentences = re.findall(
            r"\nVAR (X\d\d) = (?:VAR )?(\w+)\.\n", tokenizer.decode(clean.tokens)
        )
        assert len(sentences) == len(dict(sentences)) == 6
        assert sum(right.isdigit() for _, right in sentences) == 2
        ends = set(dict(sentences)) - {right for _, right in sentences}
        assert len(ends) == 2
        for end in ends:
            middle = dict(sentences)[end]
            assert dict(sentences)[dict(sentences)[middle]].isdigit()


def test_variable_chains_at_the_same_place_stand_in_random_order(tokenizer):
    """With no text to stand in, all sentences are at one place."""
    length = least_length("variable_tracking", tokenizer)
    firsts = set()
    for clean, _ in draw("variable_tracking", tokenizer, length, num_pairs=40).pairs:
        first = re.findall(r" = (\d{4})\.", tokenizer.decode(clean.tokens))[0]
        firsts.add(first == tokenizer.decode(clean.answer))
    assert firsts == {True, False}


def test_text_keeps_one_token_and_takes_the_rest_from_elsewhere(tokenizer):
    """Tokens that say where they come from: what is drawn can be located."""
    probe = make_probe("text", tokenizer, list(range(5000)), 256, 40, 0)
    assert probe.readout == "log_probability"
    befores, distances = 0, set()
    for clean, corrupt in probe.pairs:
        whole = clean.tokens + clean.answer
        assert whole == list(range(whole[0], whole[0] + 256))
        assert corrupt.answer == clean.answer and corrupt.tokens[-1] == clean.tokens[-1]
        other = corrupt.tokens[:-1]
        assert other == list(range(other[0], other[0] + len(other)))
        assert not set(other) & set(whole)
        befores += other[0] < whole[0]
        distances.add(other[0] - whole[0])
    assert 5 < befores < 35
    assert len(distances) > 30


def test_induction_repeats_a_cue_that_stood_once_before(tokenizer):
    for pair in draw("induction", tokenizer).pairs:
        for sample in pair:
            start = sample.answer_positions[0]
            cue = sample.tokens[-4:]
            assert sample.tokens[start - 4 : start] == cue
            assert sample.tokens.count(cue[-1]) == 2
            assert all(sample.tokens.count(token) == 1 for token in sample.answer)


def test_induction_takes_ordinary_tokens_from_all_of_the_vocabulary(tokenizer):
    probe = draw("induction", tokenizer, num_pairs=40)
    seen = {token for pair in probe.pairs for token in (*pair.clean.tokens, *pair.corrupt.answer)}
    assert not seen & set(tokenizer.all_special_ids)
    assert len(seen) == len(tokenizer) - len(tokenizer.all_special_ids)


def test_classification_shows_as_many_of_either_category_and_asks_for_a_new_word(tokenizer):
    seen = set()
    for pair in draw("classification", tokenizer, num_pairs=20).pairs:
        clean, corrupt = (tokenizer.decode(sample.tokens) for sample in pair)
        labels = [label for _, label in examples(clean)]
        assert len(set(labels)) == 2
        assert all(labels.count(label) == 4 for label in labels)
        assert [word for word, _ in examples(clean)] == [word for word, _ in examples(corrupt)]
        assert re.sub(r"-> \d", "", clean) == re.sub(r"-> \d", "", corrupt)
        assert re.findall(r"\n(\w+) -> $", clean)[0] not in dict(examples(clean))
        seen |= set(labels)
    assert len(seen) > 5


def test_no_word_belongs_to_two_categories():
    words = [word for category in CATEGORIES for word in category]
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("spec", SPECS)
def test_seed_and_name_decide_everything(spec, tokenizer):
    first = draw(spec, tokenizer)
    draw("multi_key:2", tokenizer, seed=5)  # another probe changes nothing
    assert draw(spec, tokenizer) == first
    prompts = [pair.clean.tokens for pair in first.pairs]
    others = [pair.clean.tokens for pair in draw(spec, tokenizer, seed=1).pairs]
    assert not [prompt for prompt in prompts if prompt in others]


def test_a_needle_task_is_a_probe_of_its_name():
    tokenizer = CharacterTokenizer()
    four = draw("multi_key:4", tokenizer, 400)
    assert (four.name, four.capability) == ("multi_key_4", "retrieval")
    assert draw("multi_key", tokenizer, 600).name == "multi_key"
    text = tokenizer.decode(four.pairs[0].clean.tokens)
    assert len(re.findall(NEEDLE, text)) == 4


@pytest.mark.parametrize("spec", SPECS)
def test_the_least_length_that_is_named_is_enough_for_every_pair(spec, tokenizer):
    least = least_length(spec, tokenizer)
    assert least < 256
    assert len(draw(spec, tokenizer, least, num_pairs=200).pairs) == 200
    with pytest.raises(UserError, match=f"at least {least} are needed"):
        draw(spec, tokenizer, least - 1)


class Splitting(CharacterTokenizer):
    """Two tokens for one of the characters."""

    def __init__(self, character: str) -> None:
        self.character = character

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return super().encode(text.replace(self.character, 2 * self.character))


class Unknowing(CharacterTokenizer):
    """Knows no digit: all become one token."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return super().encode(re.sub(r"\d", "?", text))


@pytest.mark.parametrize("spec", [*LOOKED_UP, "classification"])
def test_a_tokenizer_that_splits_a_digit_is_refused(spec):
    message = f"probe {spec.replace(':', '_')!r}: the tokenizer encodes '7' as 2 tokens"
    with pytest.raises(UserError, match=message):
        draw(spec, Splitting("7"), 1000)


def test_a_tokenizer_that_splits_a_letter_is_refused_where_values_have_letters():
    tokenizer = Splitting("b")
    assert draw("niah_single_2", tokenizer, 500).pairs
    with pytest.raises(UserError, match="probe 'niah_single_3': .* encodes 'b' as 2 tokens"):
        draw("niah_single_3", tokenizer, 500, num_pairs=20)


def test_a_tokenizer_that_cannot_tell_answers_apart_is_refused():
    with pytest.raises(UserError, match="'single', pair 0: the tokenizer gives both answers"):
        draw("single", Unknowing(), 500)


def test_a_tokenizer_without_enough_tokens_is_refused():
    class Small:
        all_special_ids = [1]

        def get_vocab(self) -> dict[str, int]:
            return {str(i): i for i in range(20)}

        def get_added_vocab(self) -> dict[str, int]:
            return {"7": 7}

    with pytest.raises(UserError, match="'induction': the tokenizer has 18 ordinary tokens"):
        make_probe("induction", Small(), [], 256, 1, 0)


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        ("double", {}, "unknown probe 'double'; known: niah_single_1, .*single, .*multi_key:N"),
        ("niah_single_1:2", {}, "unknown probe 'niah_single_1:2'"),
        ("single:3", {}, "'single:3' is not understood; write multi_key:N"),
        ("single", {"num_pairs": 0}, "0 pairs per probe: at least 1"),
        ("niah_single_2", {"length": 90_000}, r"'niah_single_2': the text has \d+ tokens, but"),
        ("text", {"length": 15_000}, r"'text': the text has \d+ tokens, but 29983 are needed"),
        ("multi_key:90", {"length": 9000}, "90 needles were asked for; 1 to 59"),
    ],
)
def test_what_cannot_be_made_says_why(spec, arguments, message):
    with pytest.raises(UserError, match=message):
        draw(spec, CharacterTokenizer(), **arguments)


@pytest.mark.parametrize(
    ("corrupt", "readout", "message"),
    [
        (Sample([1, 2], [5]), "logit_difference", "two answers differently, into 2 and 1 tokens"),
        (Sample([1], [5, 6]), "logit_difference", "two prompts differently, into 2 and 1 tokens"),
        (Sample([1, 2], [5, 4]), "logit_difference", "both answers the token 4 at place 1"),
        (Sample([1, 2], [5, 6]), "log_probability", "must be the same"),
    ],
)
def test_a_probe_refuses_a_pair_that_says_nothing(corrupt, readout, message):
    good = CounterfactualPair(Sample([1, 2], [3, 4]), Sample([1, 2], [5, 6]))
    assert Probe("mine", "retrieval", [good], 4, 0).readout == "logit_difference"
    with pytest.raises(UserError, match=r"probe 'mine', pair 0: .* 4 tokens; 5 were said"):
        Probe("mine", "retrieval", [good], 5, 0)
    bad = CounterfactualPair(good.clean, corrupt)
    pairs = [good, bad] if readout == "logit_difference" else [bad, bad]
    with pytest.raises(UserError, match=rf"probe 'mine', pair \d: .*{message}"):
        Probe("mine", "retrieval", pairs, 4, 0, readout)
