"""Text and needles: the retrieval samples that scoring, training data and evaluation share.

RULER-style (arXiv 2404.06654): sentences of the form ``The number for amber is 4821.`` (needles)
stand in running text (the haystack), and a question about one of them comes last. RULER's essay
haystack is replaced by local text, and its 7-digit numbers by 4 digits.

Everything is drawn from a ``random.Random`` that the caller seeds; a tokenizer is any object with
``encode(text, add_special_tokens=False) -> list[int]``.
"""

from __future__ import annotations

import ast
import os
import random
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from megatron_hydra.errors import UserError

NUM_VALUE_DIGITS = 4
MIN_TEXT_CHARACTERS = 20_000
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
class NeedleTask:
    """A retrieval task: its name and how many needles stand in the haystack.

    Attributes:
        name: Name in results, for example ``single``.
        num_keys: Needles in the haystack; one of them is asked for.
    """

    name: str
    num_keys: int


TASKS = {task.name: task for task in (NeedleTask("single", 1), NeedleTask("multi_key", 8))}


@dataclass(frozen=True)
class NeedleSample:
    """One question about one needle.

    Attributes:
        tokens: Context and question, without the answer.
        answer: The value's tokens, which should come next.
        depth: Where the needle stands in the haystack, from 0 (start) to 1 (end).
        key: The word that is asked for.
        value: The digits that answer.
        answer_positions: Indices in ``tokens`` of the needle's own copy of ``answer``.
    """

    tokens: list[int]
    answer: list[int]
    depth: float
    key: str
    value: str
    answer_positions: tuple[int, ...]


class CounterfactualPair(NamedTuple):
    """Two samples that differ in the needle's answer tokens only; every answer token differs."""

    clean: NeedleSample
    corrupt: NeedleSample


@dataclass(frozen=True)
class TrainingDocument:
    """A document with needles and later questions about them.

    Attributes:
        tokens: The whole document.
        answer_positions: Ascending indices in ``tokens`` of value tokens that stood before.
    """

    tokens: list[int]
    answer_positions: tuple[int, ...]


def local_text() -> str:
    """English text that every CPython carries; the same for a given Python version.

    The language reference of ``pydoc`` and the docstrings of the standard library's top-level
    modules, about 1.3 million characters.

    Raises:
        UserError: If this Python has no standard library sources.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("this Python carries no pydoc topics: name a text file instead") from error
    parts = [topics[name] for name in sorted(topics)]
    folder = Path(sysconfig.get_path("stdlib"))
    modules = [path for path in sorted(folder.glob("*.py")) if path.stem in sys.stdlib_module_names]
    if not modules:
        raise UserError(f"{folder} holds no standard library sources: name a text file instead")
    for path in modules:
        parts.extend(_docstrings(path))
    return "\n\n".join(parts)


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 text file to serve as haystack and language-model text.

    Raises:
        UserError: If it is missing, no UTF-8, empty or too short.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the text file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the text file {path} is not UTF-8: {error}") from error
    if len(text.strip()) < MIN_TEXT_CHARACTERS:
        found = f"has {len(text.strip())} characters" if text.strip() else "is empty"
        raise UserError(
            f"the text file {path} {found}; at least {MIN_TEXT_CHARACTERS} characters are needed"
        )
    return text


def split_held_out(
    text_tokens: Sequence[int], num_blocks: int = 100
) -> tuple[list[int], list[int]]:
    """Cut text into blocks and hold every tenth block out: (training tokens, held-out tokens)."""
    edges = [len(text_tokens) * i // num_blocks for i in range(num_blocks + 1)]
    training: list[int] = []
    held_out: list[int] = []
    for i, (start, stop) in enumerate(pairwise(edges)):
        (held_out if i % 10 == 9 else training).extend(text_tokens[start:stop])
    return training, held_out


def make_needle_sample(
    rng: random.Random,
    tokenizer: Any,
    text_tokens: Sequence[int],
    length: int,
    depth: float,
    num_keys: int = 1,
) -> NeedleSample:
    """Draw one sample; its tokens and its answer together are ``length`` tokens.

    Args:
        rng: Source of the haystack, keys, values and places of the other needles.
        tokenizer: Encodes the sentences; digits must be one token each.
        text_tokens: Text from which the haystack, one running piece, is drawn.
        length: Tokens of context, question and answer together.
        depth: Place of the needle asked for, as a share of the haystack before it.
        num_keys: Needles in all; the others have other keys and stand at random places.

    Raises:
        UserError: If the needles do not fit in ``length``, the text is shorter than the haystack,
            or the tokenizer merges digits.
    """
    if not 0.0 <= depth <= 1.0:
        raise UserError(f"needle depth {depth} is outside 0 to 1")
    keys, values = _draw_keys(rng, num_keys), [_draw_value(rng) for _ in range(num_keys)]
    pieces = _pieces(tokenizer)
    needles = [pieces.needle(key, value) for key, value in zip(keys, values, strict=True)]
    question, answer = pieces.question(keys[0]), pieces.value(values[0])
    num_fixed = sum(len(needle.tokens) for needle in needles) + len(question) + len(answer)
    if length <= num_fixed:
        raise UserError(
            f"a sample of {length} tokens has no room for text and {num_keys} needles: at least "
            f"{num_fixed + 1} tokens are needed"
        )
    text = _draw_text(rng, text_tokens, length - num_fixed)
    cuts = [round(depth * len(text))] + [rng.randint(0, len(text)) for _ in needles[1:]]
    order = list(range(num_keys))
    rng.shuffle(order)  # needles at the same place stand in random order
    order.sort(key=lambda i: cuts[i])
    tokens, starts = _lay_out([needles[i] for i in order], [cuts[i] for i in order], text)
    start = starts[order.index(0)]
    positions = tuple(range(start, start + len(answer)))
    return NeedleSample(tokens + question, answer, depth, keys[0], values[0], positions)


def make_counterfactual_pair(
    rng: random.Random,
    tokenizer: Any,
    text_tokens: Sequence[int],
    length: int,
    depth: float,
    num_keys: int = 1,
) -> CounterfactualPair:
    """Draw a sample and its twin whose needle gives another value of equal token length.

    Arguments and errors as :func:`make_needle_sample`.
    """
    clean = make_needle_sample(rng, tokenizer, text_tokens, length, depth, num_keys)
    other = "".join(rng.choice([d for d in "0123456789" if d != digit]) for digit in clean.value)
    answer = _pieces(tokenizer).value(other)
    tokens = list(clean.tokens)
    for position, token in zip(clean.answer_positions, answer, strict=True):
        tokens[position] = token
    corrupt = NeedleSample(tokens, answer, clean.depth, clean.key, other, clean.answer_positions)
    return CounterfactualPair(clean, corrupt)


def make_training_document(
    rng: random.Random,
    tokenizer: Any,
    text_tokens: Sequence[int],
    length: int,
    max_keys: int = 8,
    text_share: float | None = None,
) -> TrainingDocument:
    """Draw a document of exactly ``length`` tokens: needles in text, then recalled many times.

    A recall is the question of :func:`make_needle_sample` or the needle's sentence once more, so
    that every recalled value can be predicted from the context. The last tokens are a question
    and its answer, as in the tasks.

    Args:
        rng: Source of all choices.
        tokenizer: As for :func:`make_needle_sample`.
        text_tokens: Text to fill with.
        length: Tokens of the document.
        max_keys: Largest number of needles; the number is drawn evenly from 1 to this.
        text_share: Share of text; None draws it evenly from 0 to 0.8.

    Raises:
        UserError: As :func:`make_needle_sample`.
    """
    pieces = _pieces(tokenizer)
    share = rng.uniform(0.0, 0.8) if text_share is None else text_share
    room = length - pieces.num_question_tokens_max - NUM_VALUE_DIGITS
    fitting = room // pieces.num_needle_tokens_max
    if fitting < 1:
        raise UserError(f"a training document of {length} tokens has no room for a needle")
    keys = _draw_keys(rng, rng.randint(1, min(max_keys, fitting)))
    facts = [(key, _draw_value(rng)) for key in keys]
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
    num_text = length - sum(len(s.tokens) for s in segments) - len(last) - NUM_VALUE_DIGITS
    document = _spread(rng, segments, _draw_text(rng, text_tokens, num_text))
    end = range(length - NUM_VALUE_DIGITS, length)
    tokens = document.tokens + last + pieces.value(asked[1])
    return TrainingDocument(tokens, (*document.answer_positions, *end))


def make_text_document(
    rng: random.Random, text_tokens: Sequence[int], length: int
) -> TrainingDocument:
    """Draw a running piece of ``length`` text tokens; UserError if the text is shorter."""
    return TrainingDocument(_draw_text(rng, text_tokens, length), ())


class _Segment(NamedTuple):
    """A sentence in tokens; its value stands at ``value_start``."""

    tokens: list[int]
    value_start: int
    key: str


class _Pieces:
    """The template's sentences in a tokenizer's tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}
        for digit in "0123456789":
            if len(self.encode(digit)) != 1:
                raise UserError(
                    f"the tokenizer encodes {digit!r} as {len(self.encode(digit))} tokens; needles "
                    "need one token a digit"
                )
        value = "0" * NUM_VALUE_DIGITS
        self.num_needle_tokens_max = max(len(self.needle(key, value).tokens) for key in KEYS)
        self.num_question_tokens_max = max(len(self.question(key)) for key in KEYS)

    def encode(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = list(self._tokenizer.encode(text, add_special_tokens=False))
        return self._cache[text]

    def value(self, digits: str) -> list[int]:
        return [token for digit in digits for token in self.encode(digit)]

    def needle(self, key: str, value: str) -> _Segment:
        before = self.encode("\nThe number for") + self._key(key) + self.encode(" is ")
        return _Segment(before + self.value(value) + self.encode(".\n"), len(before), key)

    def question(self, key: str) -> list[int]:
        first = self.encode("\nWhat is the number for") + self._key(key) + self.encode("?")
        return first + self.encode(" The number for") + self._key(key) + self.encode(" is ")

    def recall(self, key: str, value: str) -> _Segment:
        before = self.question(key)
        return _Segment(before + self.value(value) + self.encode(".\n"), len(before), key)

    def _key(self, key: str) -> list[int]:
        return self.encode(f" {key}")


@lru_cache(maxsize=8)
def _pieces(tokenizer: Any) -> _Pieces:
    return _Pieces(tokenizer)


def _docstrings(path: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, documented):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _draw_keys(rng: random.Random, num_keys: int) -> list[str]:
    if not 1 <= num_keys <= len(KEYS):
        raise UserError(f"{num_keys} needles were asked for; 1 to {len(KEYS)} are possible")
    return rng.sample(KEYS, num_keys)


def _draw_value(rng: random.Random) -> str:
    return "".join(rng.choices("0123456789", k=NUM_VALUE_DIGITS))


def _draw_text(rng: random.Random, text_tokens: Sequence[int], num_tokens: int) -> list[int]:
    if num_tokens > len(text_tokens):
        raise UserError(
            f"the text has {len(text_tokens)} tokens, but {num_tokens} are needed: give more text "
            "or ask for a shorter length"
        )
    start = rng.randint(0, len(text_tokens) - num_tokens)
    return list(text_tokens[start : start + num_tokens])


def _lay_out(
    segments: Sequence[_Segment], cuts: Sequence[int], text: Sequence[int]
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


def _first_mentions_first(rng: random.Random, segments: list[_Segment]) -> list[_Segment]:
    """Shuffle, but keep the order within a key: ``segments`` lists its needle, then its recalls."""
    waiting: dict[str, list[_Segment]] = {}
    for segment in segments:
        waiting.setdefault(segment.key, []).append(segment)
    slots = [segment.key for segment in segments]
    rng.shuffle(slots)
    return [waiting[key].pop(0) for key in slots]


def _spread(rng: random.Random, segments: list[_Segment], text: list[int]) -> TrainingDocument:
    """Spread segments over the text; every value but a key's first can be known from before."""
    cuts = sorted(rng.randint(0, len(text)) for _ in segments)
    tokens, starts = _lay_out(segments, cuts, text)
    seen: set[str] = set()
    positions: list[int] = []
    for segment, start in zip(segments, starts, strict=True):
        if segment.key in seen:
            positions.extend(range(start, start + NUM_VALUE_DIGITS))
        seen.add(segment.key)
    return TrainingDocument(tokens, tuple(positions))
