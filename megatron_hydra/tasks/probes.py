"""Probes: which sub-probes there are, what capability each one asks of a model, and their pairs.

A sub-probe is a way to draw counterfactual pairs. The five needle sub-probes follow RULER's NIAH
tasks (arXiv 2404.06654), but their haystack is local text instead of essays, their numbers have 4
digits instead of 7, their UUIDs are the first 8 hexadecimal digits, and keys are plain words.

A tokenizer is one of transformers, or any object that encodes as :mod:`.needles` says; only
``induction`` asks for its vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from megatron_hydra.errors import UserError
from megatron_hydra.tasks.language_pairs import (
    classification_pair,
    induction_pair,
    text_pair,
)
from megatron_hydra.tasks.lookup_pairs import (
    HEX,
    key_value_pair,
    needle_pair,
    needle_records_pair,
    variable_pair,
)
from megatron_hydra.tasks.needles import TASKS, CounterfactualPair, find_task

Readout = Literal["logit_difference", "log_probability"]
"""What is read where the clean answer is predicted: the logit of the clean answer's token less
that of the corrupt answer's, or the log-probability of the clean answer's token."""
MakePair = Callable[[random.Random, Any, Sequence[int], int, float], CounterfactualPair]
"""(rng, tokenizer, text tokens, length in tokens, depth from 0 to 1) -> pair."""


@dataclass(frozen=True)
class Probe:
    """Counterfactual pairs of one kind, all of one token length; checked when made.

    Attributes:
        name: Name of the sub-probe in results.
        capability: What it probes; scores are normalised capability by capability.
        pairs: At least one.
        length_tokens: Tokens of a sample with its answer.
        seed: The pairs were drawn from it.
        readout: How a run's answer is read.

    Raises:
        UserError: If a pair's prompts or answers are not equally long, or the answers do not
            differ in every token (``log_probability``: are not the same).
    """

    name: str
    capability: str
    pairs: Sequence[CounterfactualPair]
    length_tokens: int
    seed: int
    readout: Readout = "logit_difference"

    def __post_init__(self) -> None:
        for index, pair in enumerate(self.pairs):
            problem = _problem(pair, self.length_tokens, self.readout)
            if problem:
                raise UserError(f"probe {self.name!r}, pair {index}: {problem}")


@dataclass(frozen=True)
class SubProbe:
    """A kind of counterfactual pairs.

    Attributes:
        name: Its name in results.
        capability: What it asks of a model.
        description: In a few words.
        make_pair: Draws one.
        readout: How a run's answer is read.
    """

    name: str
    capability: str
    description: str
    make_pair: MakePair
    readout: Readout = "logit_difference"


_ALL = (
    SubProbe(
        "niah_single_1",
        "retrieval",
        "a number in repeated filler sentences",
        partial(needle_pair, noise=True),
    ),
    SubProbe("niah_single_2", "retrieval", "a number in running text", needle_pair),
    SubProbe(
        "niah_single_3",
        "retrieval",
        "a hexadecimal value in running text",
        partial(needle_pair, kind=HEX),
    ),
    SubProbe(
        "niah_multikey_1",
        "retrieval",
        "one of four numbers in running text",
        partial(needle_pair, num_keys=4),
    ),
    SubProbe(
        "niah_multikey_2", "retrieval", "one number among nothing but needles", needle_records_pair
    ),
    SubProbe(
        "kv_retrieval",
        "kv_retrieval",
        "one value of key-value lines (Lost in the Middle, arXiv 2307.03172)",
        key_value_pair,
    ),
    SubProbe(
        "variable_tracking",
        "tracking",
        "the value at the end of a chain of assignments",
        variable_pair,
    ),
    SubProbe(
        "text",
        "language_modelling",
        "the next tokens of running text, with and without its context",
        text_pair,
        "log_probability",
    ),
    SubProbe("induction", "induction", "what followed some random tokens before", induction_pair),
    SubProbe(
        "classification",
        "in_context_learning",
        "the label of a word, by examples of two categories",
        classification_pair,
    ),
)
SUB_PROBES = {sub_probe.name: sub_probe for sub_probe in _ALL}


def find_sub_probe(spec: str) -> SubProbe:
    """The sub-probe that a word names: one of :data:`SUB_PROBES`, or a needle task.

    Raises:
        UserError: If there is none.
    """
    name = spec.strip()
    if name in SUB_PROBES:
        return SUB_PROBES[name]
    if name.partition(":")[0] not in TASKS:
        known = ", ".join((*SUB_PROBES, *TASKS))
        raise UserError(f"unknown probe {spec!r}; known: {known}, multi_key:N")
    task = find_task(name)
    make_pair = partial(needle_pair, num_keys=task.num_keys)
    return SubProbe(task.name, "retrieval", f"{task.num_keys} needles in running text", make_pair)


def make_probe(
    spec: str,
    tokenizer: Any,
    text_tokens: Sequence[int],
    length: int,
    num_pairs: int,
    seed: int,
) -> Probe:
    """Draw a sub-probe's pairs, the depths of what is asked for spread evenly.

    Args:
        spec: As for :func:`find_sub_probe`.
        tokenizer: Of the model.
        text_tokens: Text for haystacks and for ``text``.
        length: Tokens of a sample with its answer.
        num_pairs: How many.
        seed: With the sub-probe's name it decides everything that is drawn.

    Raises:
        UserError: If there is no such sub-probe, ``num_pairs`` is not positive, ``length`` is too
            short (the message says what is needed) or more than the text has, or the tokenizer
            splits what must be one token.
    """
    sub_probe = find_sub_probe(spec)
    if num_pairs < 1:
        raise UserError(f"{num_pairs} pairs per probe: at least 1 is needed")
    rng = random.Random(f"{sub_probe.name} {seed}")
    depths = [(i + 0.5) / num_pairs for i in range(num_pairs)]
    try:
        pairs = [
            sub_probe.make_pair(rng, tokenizer, text_tokens, length, depth) for depth in depths
        ]
    except UserError as error:
        raise UserError(f"probe {sub_probe.name!r}: {error}") from error
    return Probe(sub_probe.name, sub_probe.capability, pairs, length, seed, sub_probe.readout)


def _problem(pair: CounterfactualPair, length_tokens: int, readout: Readout) -> str:
    """What is wrong with a pair, in words; empty if nothing is."""
    clean, corrupt = pair
    split = "the tokenizer splits its two"
    if len(clean.answer) != len(corrupt.answer):
        lengths = f"{len(clean.answer)} and {len(corrupt.answer)} tokens"
        return f"{split} answers differently, into {lengths}; they must be equally many"
    if len(clean.tokens) != len(corrupt.tokens):
        lengths = f"{len(clean.tokens)} and {len(corrupt.tokens)} tokens"
        return f"{split} prompts differently, into {lengths}; they must be equally many"
    if len(clean.tokens) + len(clean.answer) != length_tokens:
        found = len(clean.tokens) + len(clean.answer)
        return f"prompt and answer have {found} tokens; {length_tokens} were said"
    equal = [i for i, (a, b) in enumerate(zip(clean.answer, corrupt.answer)) if a == b]
    if readout == "log_probability" and len(equal) < len(clean.answer):
        return "the two answers must be the same where their log-probability is read"
    if readout == "logit_difference" and equal:
        return (
            f"the tokenizer gives both answers the token {clean.answer[equal[0]]} at place "
            f"{equal[0]}; every token of the two must differ"
        )
    return ""
