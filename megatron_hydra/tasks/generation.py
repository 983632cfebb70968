"""RULER-style tasks that a model answers by generating text (arXiv 2404.06654).

Retrieval: S1 to S3 (one needle; a needle's haystack is a repeated sentence, then text), MK1 to MK3
(one of many is asked for), MV (one key, several values), MQ (several keys). Tracing: VT. Counting:
CWE, FWE. A prompt is text, so that any engine can answer it, and as large as fits its length.

Every sample is drawn from a seed of its own, by task, length and index: the same for a given seed,
tokenizer and text, whatever else is asked.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_hydra.errors import UserError
from megatron_hydra.tasks.needles import KEYS
from megatron_hydra.tasks.wording import WORDINGS, Wording

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""RULER's filler, one unit of size."""
NUM_HOPS = 4
NUM_COMMON_WORDS = 10
SHORT_TOKENS = 4096
"""Below, RULER repeats common and uncommon words less often."""
_ZETA = 2.0
_GUESSES = 3
_SENTENCE_END = re.compile(r"(?<=[.!?])\s")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Prompt(NamedTuple):
    """A prompt and what its answer must contain."""

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class GenerationSample:
    """One sample of a cell.

    Attributes:
        task: The task's name.
        length: Tokens of prompt and answer together, at most.
        index: Within the cell, from 0.
        prompt: The text.
        answers: What a right answer contains, in any order.
        max_new_tokens: To generate.
    """

    task: str
    length: int
    index: int
    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int

    @property
    def depth(self) -> float | None:
        """The share of the prompt's characters before its one needle; None for other samples."""
        if len(self.answers) != 1 or self.prompt.count(self.answers[0]) != 1:
            return None
        return self.prompt.index(self.answers[0]) / len(self.prompt)


def answers_found(text: str, answers: Sequence[str]) -> int:
    """How many of the answers a generated text contains, whatever the case of their letters.

    RULER's `string_match_all` is the mean share of them, its `string_match_part` the share of
    samples with one or more.
    """
    return sum(answer.lower() in text.lower() for answer in answers)


@dataclass(frozen=True)
class GenerationTask:
    """A task: how a prompt of some size is drawn, and how many tokens answer it.

    Attributes:
        name: In results.
        draw: Of (random source, wording, haystack's words, length in tokens, size); size counts
            what is repeated: words, sentences or needles of the haystack.
        tokens: The wording's number of tokens to generate.
        least: Smallest size.
    """

    name: str
    draw: Callable[[random.Random, Wording, Sequence[str], int, int], Prompt]
    tokens: Callable[[Wording], int]
    least: int = 1


def make_generation_samples(
    num_tokens: Callable[[str], int],
    words: Sequence[str],
    task: GenerationTask,
    length: int,
    num_samples: int,
    seed: int,
    wording: str = "ruler",
) -> list[GenerationSample]:
    """Draw the samples of a cell.

    Args:
        num_tokens: Of a prompt, as the model's tokenizer counts them.
        words: Of text for haystacks; repeated where they are fewer than one has.
        task: What is asked.
        length: In tokens, prompt and answer together.
        num_samples: How many.
        seed: Of everything drawn.
        wording: One of :data:`~megatron_hydra.tasks.wording.WORDINGS`.

    Raises:
        UserError: If the length is too short for the task; names the least.
    """
    answer_tokens = task.tokens(WORDINGS[wording])

    def draw(index: int, size: int) -> Prompt:
        rng = random.Random(f"{task.name} {length} {index} {seed}")
        return task.draw(rng, WORDINGS[wording], words, length, size)

    def needed(index: int, size: int) -> int:
        return num_tokens(draw(index, size).text) + answer_tokens

    if needed(0, task.least) > length:
        raise UserError(
            f"task {task.name} does not fit into {length} tokens: at least about "
            f"{needed(0, task.least)} are needed, of which {answer_tokens} are for the answer"
        )
    largest = _largest(lambda size: needed(0, size) <= length, task.least)
    samples = []
    for index in range(num_samples):
        size = _fitting(lambda size, index=index: needed(index, size), length, largest, task.least)
        prompt = draw(index, size)
        samples.append(
            GenerationSample(task.name, length, index, prompt.text, prompt.answers, answer_tokens)
        )
    return samples


def _fitting(needed: Callable[[int], int], length: int, size: int, least: int) -> int:
    """A size that fits and leaves little room, from a guess on; few sizes are tried."""
    fixed = needed(least)
    for _ in range(_GUESSES):
        share = (length - fixed) / max(1, needed(size) - fixed)
        size = max(least, int(least + share * (size - least)))
    while needed(size) > length:
        if size == least:
            raise UserError(f"a prompt of the smallest size does not fit into {length} tokens")
        size = max(least, size - 1 - size // 100)
    return size


def _largest(fits: Callable[[int], bool], least: int) -> int:
    """The largest size that fits, where smaller ones fit too; `least` does."""
    low, step = least, 1
    while fits(low + step):
        low, step = low + step, 2 * step
    high = low + step  # does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class _Retrieval(NamedTuple):
    """How a needle task is drawn.

    Attributes:
        haystack: `noise`, `text`, or `needles`, as many as fit.
        key_is_uuid: Else one or two words.
        value_is_uuid: Else a number.
        num_keys: Needles beside which the asked ones stand, theirs counted in.
        num_asked: Keys that are asked for.
        num_values: Of each key.
    """

    haystack: str = "text"
    key_is_uuid: bool = False
    value_is_uuid: bool = False
    num_keys: int = 1
    num_asked: int = 1
    num_values: int = 1

    def __call__(
        self, rng: random.Random, wording: Wording, words: Sequence[str], length: int, size: int
    ) -> Prompt:
        """As :class:`GenerationTask` has it."""
        kinds = ("uuid", "uuids") if self.value_is_uuid else wording.value_words
        num_keys = size + self.num_asked if self.haystack == "needles" else self.num_keys
        keys = _uuids(rng, num_keys) if self.key_is_uuid else draw_words(rng, num_keys)
        values = [[self._value(rng, wording) for _ in range(self.num_values)] for _ in keys]
        needles = [
            wording.needle.format(values=kinds[1], key=key, value=value)
            for key, found in zip(keys, values, strict=True)
            for value in found
        ]
        rng.shuffle(needles)
        context = _hidden(rng, needles, self._hay(rng, words, size))
        asked = keys[: self.num_asked]
        answers = [value for found in values[: self.num_asked] for value in found]
        many = len(answers) > 1
        prompt = wording.retrieval.format(
            context=context,
            values=kinds[1],
            asked=kinds[many],
            keys=", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0],
            is_are="are" if many else "is",
        )
        return Prompt(prompt, tuple(answers))

    def _value(self, rng: random.Random, wording: Wording) -> str:
        if self.value_is_uuid:
            return _uuids(rng, 1)[0]
        return str(rng.randint(10 ** (wording.num_digits - 1), 10**wording.num_digits - 1))

    def _hay(self, rng: random.Random, words: Sequence[str], size: int) -> list[str]:
        """Sentences between which needles may stand."""
        if self.haystack == "needles":
            return []
        if self.haystack == "noise":
            return [NOISE] * size
        start = rng.randrange(len(words))
        return _SENTENCE_END.split(" ".join(words[(start + i) % len(words)] for i in range(size)))


def _tracking(
    rng: random.Random, wording: Wording, words: Sequence[str], length: int, size: int
) -> Prompt:
    """One chain of assignments in noise, in order; all its variables are asked for."""
    names: list[str] = []
    while len(names) <= NUM_HOPS:
        name = "".join(rng.choices(_LETTERS.upper(), k=5))
        names += [name] * (name not in names)
    value = str(rng.randint(10000, 99999))
    chain = [f"VAR {names[0]} = {value}."]
    chain += [f"VAR {names[i + 1]} = VAR {names[i]}." for i in range(NUM_HOPS)]
    context = _hidden(rng, chain, [NOISE] * size)
    prompt = wording.tracking.format(context=context, value=value, count=len(names))
    return Prompt(prompt, tuple(names))


def _common_words(
    rng: random.Random, wording: Wording, words: Sequence[str], length: int, size: int
) -> Prompt:
    """A numbered list in which ten words stand more often than the others."""
    often, seldom = (30, 3) if length >= SHORT_TOKENS else (6, 1)
    drawn = draw_words(rng, NUM_COMMON_WORDS + size)
    common, others = drawn[:NUM_COMMON_WORDS], drawn[NUM_COMMON_WORDS:]
    listed = common * often + others * seldom
    rng.shuffle(listed)
    context = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
    return Prompt(wording.common.format(context=context, count=NUM_COMMON_WORDS), tuple(common))


def _frequent_words(
    rng: random.Random, wording: Wording, words: Sequence[str], length: int, size: int
) -> Prompt:
    """Coded words by Zipf's law; the most frequent are dots, the next three are asked for."""
    num_words = max(8, size // 50)
    coded: list[str] = []
    while len(coded) < num_words:
        word = "".join(rng.choices(_LETTERS, k=6))
        coded += [word] * (word not in coded)
    weights = [rank**-_ZETA for rank in range(1, num_words + 2)]
    counts = [max(1, int(size / sum(weights) * weight)) for weight in weights]
    for rank in (3, 2, 1, 0):  # so that which three are asked for is never a matter of a tie
        counts[rank] = max(counts[rank], counts[rank + 1] + 1)
    counted = zip(["...", *coded], counts, strict=True)
    listed = [word for word, count in counted for _ in range(count)]
    rng.shuffle(listed)
    return Prompt(wording.frequent.format(context=" ".join(listed)), tuple(coded[:3]))


def draw_words(rng: random.Random, count: int) -> list[str]:
    """Draw different words, of two or more of `KEYS` with hyphens where one does not suffice."""
    if count <= len(KEYS) // 2:
        return rng.sample(KEYS, count)
    parts = 2
    while len(KEYS) ** parts < 2 * count:
        parts += 1
    numbers = rng.sample(range(len(KEYS) ** parts), count)
    return [
        "-".join(KEYS[number // len(KEYS) ** i % len(KEYS)] for i in range(parts))
        for number in numbers
    ]


def _uuids(rng: random.Random, count: int) -> list[str]:
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]


def _hidden(rng: random.Random, needles: Sequence[str], hay: Sequence[str]) -> str:
    """Needles in their order at random places between the haystack's sentences."""
    places = sorted(rng.randint(0, len(hay)) for _ in needles)
    parts: list[str] = []
    done = 0
    for place, needle in zip(places, needles, strict=True):
        parts += [*hay[done:place], needle]
        done = place
    # A needle on lines of its own has no spaces around it.
    return re.sub(r" ?\n ?", "\n", " ".join([*parts, *hay[done:]]))


def _retrieval_tokens(wording: Wording) -> int:
    return wording.retrieval_tokens


GENERATION_TASKS = {
    task.name: task
    for task in (
        *(
            GenerationTask(name, draw, _retrieval_tokens)
            for name, draw in (
                ("niah_single_1", _Retrieval("noise")),
                ("niah_single_2", _Retrieval()),
                ("niah_single_3", _Retrieval(value_is_uuid=True)),
                ("niah_multikey_1", _Retrieval(num_keys=4)),
                ("niah_multikey_2", _Retrieval("needles")),
                ("niah_multikey_3", _Retrieval("needles", key_is_uuid=True, value_is_uuid=True)),
                ("niah_multivalue", _Retrieval(num_values=4)),
                ("niah_multiquery", _Retrieval(num_keys=4, num_asked=4)),
            )
        ),
        GenerationTask("vt", _tracking, lambda wording: wording.tracking_tokens),
        GenerationTask("cwe", _common_words, lambda wording: wording.common_tokens),
        GenerationTask("fwe", _frequent_words, lambda wording: wording.frequent_tokens, least=20),
    )
}
"""By RULER's names, in its order."""


def find_generation_tasks(names: Sequence[str]) -> list[GenerationTask]:
    """Tasks by name, in the order given.

    Raises:
        UserError: For an unknown name, or one that stands twice.
    """
    for position, name in enumerate(names):
        if name not in GENERATION_TASKS:
            known = ", ".join(GENERATION_TASKS)
            raise UserError(f"unknown generation task {name!r}; known: {known}")
        if name in names[:position]:
            raise UserError(f"the tasks name {name!r} twice: {','.join(names)!r}")
    return [GENERATION_TASKS[name] for name in names]


def not_comparable(wording: str, text: str) -> str:
    """What a table's head says: why its figures are not those of published RULER."""
    why = [
        f"haystacks are of {text}, not of essays",
        "keys and words come from a list of our own",
        "no chat template and no worked examples",
    ]
    if wording != "ruler":
        why.insert(0, f"prompts are worded {wording!r}, with {WORDINGS[wording].num_digits} digits")
    return f"RULER-style, not comparable with published RULER: {'; '.join(why)}."
