"""What every scorer takes (probes) and gives (effects), and how effects become head scores."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from megatron_hydra.errors import UserError
from megatron_hydra.selection.probes import (
    CounterfactualPair,
    NeedleTask,
    make_counterfactual_pair,
)

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

logger = logging.getLogger(__name__)
Item = TypeVar("Item")

NOTABLE_EFFECT = 0.01
"""A sub-probe counts for a head's consistency from this absolute effect on (Eq 12)."""


@dataclass(frozen=True)
class Probe:
    """Counterfactual pairs of one kind, all of one token length.

    Attributes:
        name: Name of the sub-probe in results.
        capability: What it probes; scores are normalised capability by capability.
        pairs: At least one.
        length_tokens: Tokens of a sample with its answer.
        seed: The pairs were drawn from it.
    """

    name: str
    capability: str
    pairs: Sequence[CounterfactualPair]
    length_tokens: int
    seed: int


@dataclass(frozen=True)
class ProbeEffects:
    """What patching each head did to each pair of one probe.

    Attributes:
        probe: The probe.
        pair_effects: [kept pairs, layers, heads], indirect effects in float64; 1 means that the
            head alone carries the answer, 0 that it makes no difference.
        kept: Indices of the kept pairs; the others had too small a clean-corrupt gap.
    """

    probe: Probe
    pair_effects: Tensor
    kept: tuple[int, ...]

    @property
    def effects(self) -> Tensor:
        """Mean indirect effect over the kept pairs, [layers, heads]."""
        return self.pair_effects.mean(dim=0)

    def counts(self) -> dict[str, Any]:
        """The probe's record in a scores file: name, counts, length, seed."""
        return {
            "name": self.probe.name,
            "capability": self.probe.capability,
            "pairs": len(self.probe.pairs),
            "kept": len(self.kept),
            "dropped": len(self.probe.pairs) - len(self.kept),
            "length_tokens": self.probe.length_tokens,
            "seed": self.probe.seed,
        }


@dataclass(frozen=True)
class ScorerResult:
    """Effects of every head on every probe, by one scorer."""

    scorer: str
    probes: tuple[ProbeEffects, ...]


class Progress(Protocol):
    """Shows how far a loop is, as tqdm does; ``unit`` names one item."""

    def __call__(self, items: Sequence[Item], description: str, unit: str) -> Iterable[Item]:
        """Yield the items."""


def no_progress(items: Sequence[Item], description: str, unit: str) -> Iterable[Item]:
    """Yield the items and show nothing."""
    return items


class Scorer(Protocol):
    """A way to measure heads: one file each, all with this interface."""

    name: str

    def score(
        self, model: GPTModel, probes: Sequence[Probe], progress: Progress = no_progress
    ) -> ScorerResult:
        """Measure every head of ``model`` (a teacher in evaluation mode) on every probe.

        Raises:
            UserError: If a probe says nothing about this model.
        """


def retrieval_probe(
    tokenizer: Any,
    text_tokens: Sequence[int],
    task: NeedleTask,
    length: int,
    num_pairs: int,
    seed: int,
) -> Probe:
    """Draw a needle task's pairs, their depths spread evenly over the haystack.

    Args:
        tokenizer: As for :func:`~megatron_hydra.selection.probes.make_needle_sample`.
        text_tokens: Text for haystacks.
        task: The needle task; its name becomes the probe's.
        length: Tokens of a sample with its answer.
        num_pairs: How many.
        seed: With the task's name it decides everything that is drawn.

    Raises:
        UserError: If ``num_pairs`` is not positive or the samples cannot be made.
    """
    if num_pairs < 1:
        raise UserError(f"{num_pairs} pairs a probe: at least 1 is needed")
    rng = random.Random(f"{task.name} {seed}")
    depths = [(i + 0.5) / num_pairs for i in range(num_pairs)]
    pairs = [
        make_counterfactual_pair(rng, tokenizer, text_tokens, length, depth, task.num_keys)
        for depth in depths
    ]
    return Probe(task.name, "retrieval", pairs, length, seed)


def assemble_scores(result: ScorerResult) -> tuple[Tensor, Tensor]:
    """Head scores from effects: s = strength * kappa, min-max per capability, mean over them.

    A head's strength is the mean over a capability's sub-probes of its absolute mean effect; its
    kappa, the share of these sub-probes where that is :data:`NOTABLE_EFFECT` or more (Eq 12).

    Returns:
        Scores and kappa over all sub-probes, each [layers, heads] in float64, from 0 to 1.
    """
    by_capability: dict[str, list[Tensor]] = {}
    for probe in result.probes:
        by_capability.setdefault(probe.probe.capability, []).append(probe.effects.abs())
    maps = []
    for capability, effects in by_capability.items():
        sizes = torch.stack(effects)  # [probes, layers, heads]
        maps.append(_min_max(sizes.mean(dim=0) * _consistency(sizes), capability))
    everything = torch.stack([size for sizes in by_capability.values() for size in sizes])
    return torch.stack(maps).mean(dim=0), _consistency(everything)


def _consistency(sizes: Tensor) -> Tensor:
    return (sizes >= NOTABLE_EFFECT).double().mean(dim=0)


def _min_max(values: Tensor, capability: str) -> Tensor:
    """Map the smallest value to 0 and the largest to 1; a constant map becomes all 0."""
    spread = values.max() - values.min()
    if spread == 0:
        logger.warning("all heads score %g for %s: none stands out", values.max(), capability)
        return torch.zeros_like(values)
    return (values - values.min()) / spread
