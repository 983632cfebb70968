"""Generation tasks: what a prompt asks can be read off it again, by means that drew nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_hydra.errors import UserError
from megatron_hydra.tasks.generation import (
    GENERATION_TASKS,
    GenerationSample,
    answers_found,
    find_generation_tasks,
    make_generation_samples,
    not_comparable,
)
from megatron_hydra.tasks.wording import WORDINGS

TEXT = " ".join(f"Sentence {i} says that {i * i} is a square." for i in range(400))
WORDS = re.compile(r"\w+|\W")
UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"


def num_tokens(text: str) -> int:
    return len(WORDS.findall(text))


def draw(
    name: str, length: int = 1200, wording: str = "ruler", **options
) -> list[GenerationSample]:
    arguments = {"num_samples": 6, "seed": 3, **options}
    (task,) = find_generation_tasks([name])
    words = TEXT.split()
    return make_generation_samples(num_tokens, words, task, length, wording=wording, **arguments)


def facts(sample: GenerationSample, wording: str) -> list[tuple[str, str]]:
    """Every needle's key and value, by the wording's sentence read as a pattern."""
    sentence = re.escape(WORDINGS[wording].needle.strip())
    for field, pattern in (("values", "uuids|numbers"), ("key", "[^ ]+?"), ("value", "[^ ]+?")):
        sentence = sentence.replace(rf"\{{{field}\}}", f"(?P<{field}>{pattern})")
    return [(m["key"], m["value"]) for m in re.finditer(sentence + r"(?=\s)", sample.prompt)]


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("name", [n for n in GENERATION_TASKS if n.startswith("niah")])
def test_the_needles_that_are_asked_for_give_the_answers(name: str, wording: str) -> None:
    for sample in draw(name, wording=wording):
        found, question = facts(sample, wording), sample.prompt.splitlines()[-1]
        asked = [value for key, value in found if re.search(rf"(?<![\w-]){key}(?![\w-])", question)]
        assert sorted(asked) == sorted(sample.answers)
        assert len(set(sample.answers)) == (4 if "multiv" in name or "multiq" in name else 1)
        if name in ("niah_multikey_2", "niah_multikey_3"):
            assert len(found) > 15 and len(sample.prompt.split(found[0][1])[0]) < 300
        elif name == "niah_multikey_1":
            assert len(found) == 4
        is_uuid = name.endswith("_3")
        digits = WORDINGS[wording].num_digits
        assert all(re.fullmatch(UUID if is_uuid else rf"\d{{{digits}}}", a) for a in sample.answers)


@pytest.mark.parametrize("name", ["niah_single_1", "vt"])
def test_the_noise_is_rulers(name: str) -> None:
    assert draw(name)[0].prompt.count("The grass is green. The sky is blue.") > 5


def test_variables_are_tracked_to_the_value() -> None:
    for sample in draw("vt"):
        value = re.search(r"assigned the value (\d+)", sample.prompt)[1]
        chain, assigned = {value}, re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", sample.prompt)
        for name, source in assigned:  # a variable stands before what is assigned from it
            assert source in chain
            chain.add(name)
        assert chain - {value} == set(sample.answers) and len(sample.answers) == 5


@pytest.mark.parametrize(("length", "often", "seldom"), [(1200, 6, 1), (4100, 30, 3)])
def test_common_words_are_the_most_common(length: int, often: int, seldom: int) -> None:
    for sample in draw("cwe", length, num_samples=2):
        counts = Counter(re.findall(r"\d+\. (\S+)", sample.prompt))
        assert {word for word, n in counts.items() if n == often} == set(sample.answers)
        assert set(counts.values()) == {often, seldom} and len(sample.answers) == 10


@pytest.mark.parametrize("length", [300, 1200])
def test_frequent_words_are_the_most_frequent_without_a_tie(length: int) -> None:
    for sample in draw("fwe", length):
        coded = sample.prompt.split("coded words. ")[1].split("\nQuestion")[0].split()
        ranked = Counter(coded).most_common()
        assert ranked[0][0] == "..." and [word for word, _ in ranked[1:4]] == [*sample.answers]
        assert ranked[3][1] > ranked[4][1]


@pytest.mark.parametrize("name", GENERATION_TASKS)
@pytest.mark.parametrize("length", [600, 3000])
def test_prompts_fill_their_length_and_never_pass_it(name: str, length: int) -> None:
    for sample in draw(name, length, num_samples=4):
        used = num_tokens(sample.prompt) + sample.max_new_tokens
        assert 0.6 * length < used <= length


def test_a_sample_does_not_depend_on_how_many_are_asked_and_seeds_differ() -> None:
    cell = draw("niah_single_2", 900)
    assert draw("niah_single_2", 900, num_samples=2) == cell[:2]
    other = draw("niah_single_2", 900, seed=4)
    assert all(a.answers != b.answers for a, b in zip(cell, other, strict=True))


def test_samples_are_the_same_in_another_process() -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from tasks.test_generated_tasks import *\n"
        "print([draw(name) for name in GENERATION_TASKS])"
    )
    tests = str(Path(__file__).parents[1])
    said = [
        subprocess.run(
            [sys.executable, "-c", code, tests],
            env={
                **os.environ,
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": ":".join(sys.path),
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1] and said[0].strip() == str([draw(n) for n in GENERATION_TASKS])


def test_answers_are_found_whatever_their_case_and_order() -> None:
    assert answers_found("They are QWERT, 12 and abcde", ("ABCDE", "qwert", "zzzzz")) == 2
    assert answers_found("", ("1",)) == 0


def test_what_cannot_be_drawn_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"cwe does not fit into 200 tokens: at least about \d+"):
        draw("cwe", 200)
    with pytest.raises(UserError, match="unknown generation task 'qa_1'; known: niah_single_1"):
        find_generation_tasks(["qa_1"])
    with pytest.raises(UserError, match="name 'vt' twice"):
        find_generation_tasks(["vt", "cwe", "vt"])


def test_the_head_says_why_it_is_not_ruler() -> None:
    assert "not comparable with published RULER" in not_comparable("ruler", "text.txt")
    assert "text.txt" in not_comparable("ruler", "text.txt")
    assert "4 digits" in not_comparable("short", "x") and "digits" not in not_comparable(
        "ruler", "x"
    )
