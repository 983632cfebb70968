"""RULER-style needle tasks: samples at given lengths and depths, and whether a model answers them.

Metric: string_match_all of RULER (arXiv 2404.06654) on a greedy generation as long as the answer:
right only if every token of the answer is generated.

Greedy decoding gives the right answer if and only if each answer token is the most likely one after
the prompt and the right tokens before it: as long as it has been right, it has fed exactly these.
So one teacher-forced forward decides it, without decoding token by token.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from megatron_hydra.errors import UserError
from megatron_hydra.progress import Progress, no_progress
from megatron_hydra.tasks.needles import NeedleSample, NeedleTask, make_needle_sample

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

MAX_TOKENS = 8192
"""Tokens of one forward, unless a single sample is longer."""


@dataclass(frozen=True)
class TaskSample:
    """A sample of a task's cell.

    Attributes:
        task: The task's name.
        length: Tokens of the sample and its answer.
        depth: The wanted depth of the needle, from 0 (start) to 1 (end).
        sample: The sample.
    """

    task: str
    length: int
    depth: float
    sample: NeedleSample


def needle_depths(num_depths: int) -> tuple[float, ...]:
    """Depths spread evenly from start to end; 0.5 if there is one only.

    Raises:
        UserError: If ``num_depths`` is not positive.
    """
    if num_depths < 1:
        raise UserError(f"{num_depths} needle depths: at least 1 is needed")
    if num_depths == 1:
        return (0.5,)
    return tuple(i / (num_depths - 1) for i in range(num_depths))


def check_num_samples(num_samples: int, depths: Sequence[float]) -> None:
    """Raise a UserError if the samples of a cell cannot be dealt to its depths evenly."""
    if num_samples < 1 or num_samples % len(depths):
        raise UserError(
            f"{num_samples} samples are not divisible by {len(depths)} needle depths; "
            f"allowed: a multiple of {len(depths)}"
        )


def make_task_samples(
    tokenizer: Any,
    text_tokens: Sequence[int],
    tasks: Iterable[NeedleTask],
    lengths: Iterable[int],
    num_samples: int,
    depths: Sequence[float],
    seed: int,
) -> list[TaskSample]:
    """Draw ``num_samples`` of each task at each length, dealt to the depths in turn.

    Each cell is drawn from its own seed, so that it does not depend on what else is evaluated.

    Args:
        tokenizer: As for :func:`~megatron_hydra.tasks.needles.make_needle_sample`.
        text_tokens: Text for haystacks.
        tasks: Tasks.
        lengths: In tokens.
        num_samples: A multiple of the number of depths, so that each has equally many.
        depths: From 0 to 1.
        seed: Of everything drawn.

    Raises:
        UserError: If the samples are not divisible by the depths or cannot be made.
    """
    check_num_samples(num_samples, depths)
    samples = []
    lengths = list(lengths)
    for task in tasks:
        for length in lengths:
            rng = random.Random(f"{task.name} {length} {seed}")
            for index in range(num_samples):
                depth = depths[index % len(depths)]
                sample = make_needle_sample(
                    rng, tokenizer, text_tokens, length, depth, task.num_keys
                )
                samples.append(TaskSample(task.name, length, depth, sample))
    return samples


def answered_right(
    model: GPTModel, samples: Sequence[NeedleSample], progress: Progress = no_progress
) -> list[bool]:
    """Whether greedy decoding would answer each sample rightly.

    Args:
        model: In evaluation mode.
        samples: Of any lengths; neighbours of equal length share a forward.
        progress: Shows the batches.
    """
    # Imported here: PyTorch, which who only makes samples need not wait for.
    from megatron_hydra.tasks.readout import answer_logits, teacher_forced

    batches = _batches(samples)
    right: list[bool] = []
    for batch in progress(batches, "needles", "batch"):
        tokens, answers = teacher_forced(batch)
        predicted = answer_logits(model, tokens, answers.shape[1]).argmax(dim=-1)
        right.extend((predicted.cpu() == answers).all(dim=1).tolist())
    return right


def _batches(samples: Sequence[NeedleSample]) -> list[list[NeedleSample]]:
    batches = []
    for (length, _), group in groupby(samples, key=lambda s: (len(s.tokens), len(s.answer))):
        equal, size = list(group), max(1, MAX_TOKENS // length)
        batches += [equal[i : i + size] for i in range(0, len(equal), size)]
    return batches
