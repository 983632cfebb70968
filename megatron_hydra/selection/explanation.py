"""Why each FA head is in a plan and how sure that is: made with the plan, kept in its file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.budget import Constraints, Problem
from megatron_hydra.selection.combination import Array
from megatron_hydra.selection.optimiser import Head
from megatron_hydra.selection.scores import HeadScores
from megatron_hydra.selection.uncertainty import (
    SplitHalf,
    above_noise_floor,
    bootstrap_scores,
    carries_uncertainty,
    counted_means,
    draw_pairs,
    score_intervals,
    split_half_correlation,
)

Reason = Literal["score", "tie", "constraint", "random"]
FORMER_REASONS = ("layer minimum", "group", "multiple")
"""Constraints that earlier releases told apart."""
Choose = Callable[[Problem, Array, Array], frozenset[Head] | None]
"""A policy: problem, scores and effect sizes [layers, heads] to FA heads."""

NUM_RESAMPLES = 1000
_NUM_SOLVED = 200  # resamples under limits: each takes 10 to 50 ms
_DIGITS = 4
SURE = 0.95
"""A head is surely chosen if this share of resamples chooses it again."""


@dataclass(frozen=True)
class ChosenHead:
    """Why one head keeps full attention.

    Attributes:
        layer: From 0.
        head: From 0.
        rank: Place among all heads by score, then effect size; from 1.
        score: Its score.
        interval: 95% of its score, lower and upper; None if the scores carry no uncertainty.
        chosen_again: Share of resamples that choose it again; None likewise, or at random.
        above_noise_floor: Whether a notable effect is no accident of the pairs.
        reason: `score`: it is among as many heads with the highest scores. `tie`: the same, but a
            head left out has the same score. `constraint`: scores alone would not have chosen it,
            but what was asked of layers and groups, or its query group, which is stored anyway.
            `random`: drawn.
        effects: Scorer -> mean effect on each of the explanation's probes; None where not read.
    """

    layer: int
    head: int
    rank: int
    score: float
    interval: tuple[float, float] | None
    chosen_again: float | None
    above_noise_floor: bool
    reason: Reason
    effects: Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class Explanation:
    """What a plan's file says of its choice.

    Attributes:
        heads: Every FA head, by layer and head.
        probes: Names of the sub-probes, in the order of the heads' effects.
        scores: Score of every head of the model, [layers][heads].
        kept_share: Share of the sum of all scores that the FA heads hold; 1 if the sum is 0.
        kept_interval: 95% of that share over resamples; None if there is no uncertainty.
        num_tie_filled: FA heads that a head of equal score, left out, could replace.
        num_resamples: Resamples behind the intervals; 0 if there is no uncertainty.
        num_solved: Resamples that were asked which heads they choose.
        split_half: Rank correlation of the scores of split halves; None where undefined.
        no_split_half: Why it is undefined.
    """

    heads: tuple[ChosenHead, ...]
    probes: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]
    kept_share: float
    kept_interval: tuple[float, float] | None
    num_tie_filled: int
    num_resamples: int
    num_solved: int
    split_half: SplitHalf | None
    no_split_half: str = ""

    @property
    def num_without_evidence(self) -> int:
        """FA heads whose score is not above 0."""
        return sum(head.score <= 0 for head in self.heads)

    @property
    def num_below_noise_floor(self) -> int:
        """FA heads that are not above the noise floor."""
        return sum(not head.above_noise_floor for head in self.heads)

    @property
    def num_sure(self) -> int | None:
        """FA heads that at least :data:`SURE` of the resamples choose again."""
        shares = [head.chosen_again for head in self.heads]
        if any(share is None for share in shares):
            return None
        return sum(share is not None and share >= SURE for share in shares)

    def num_for(self, reason: Reason) -> int:
        """FA heads with this reason."""
        return sum(head.reason == reason for head in self.heads)

    def strongest_effects(
        self, head: ChosenHead, scorers: Sequence[str]
    ) -> list[tuple[float, str, str]]:
        """A head's mean effects by some scorers, largest first: effect, scorer, sub-probe."""
        found = [
            (effect, scorer, probe)
            for scorer in scorers
            for probe, effect in zip(self.probes, head.effects[scorer], strict=True)
            if effect is not None
        ]
        return sorted(found, key=lambda item: -abs(item[0]))


def explain(
    scores: HeadScores,
    problem: Problem,
    chosen: frozenset[Head],
    choose: Choose | None,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> Explanation:
    """Say why the chosen heads are chosen, and ask resamples whether they would choose the same.

    Args:
        scores: What the choice stands on.
        problem: Budget and constraints.
        chosen: The FA heads.
        choose: The policy that chose them; None if they were drawn at random.
        seed: Of the resamples.
        num_resamples: Pairs are resampled so often; under limits the first 200 are solved.
    """
    reasons: Mapping[Head, Reason] = dict.fromkeys(chosen, "random")
    num_tie_filled = 0
    if choose is not None:
        ties = replaceable_heads(problem, scores.scores, chosen)
        reasons, num_tie_filled = _reasons(scores, problem, chosen, choose, ties), len(ties)
    is_fa = np.zeros(scores.scores.shape, dtype=bool)
    is_fa[tuple(np.array(sorted(chosen), dtype=int).reshape(-1, 2).T)] = True
    intervals = again = kept_interval = None
    num_solved = 0
    if carries_uncertainty(scores):
        samples = bootstrap_scores(scores, num_resamples, seed)
        intervals = np.stack(score_intervals(samples), axis=-1)
        low, high = np.quantile(_kept_share(samples, is_fa), [0.025, 0.975]).tolist()
        kept_interval = (low, high)
        if choose is not None:
            num_solved = min(num_resamples, _NUM_SOLVED) if problem.limits else num_resamples
            again = _chosen_again(scores, problem, choose, samples, num_solved, seed)
    ranks = np.argsort(scores.ranked_heads) + 1
    above = above_noise_floor(scores)
    split_half, no_split_half = _split_half(scores, seed)
    return Explanation(
        heads=tuple(
            ChosenHead(
                *head,
                rank=int(ranks[head[0] * scores.num_heads + head[1]]),
                score=float(scores.scores[head]),
                interval=None
                if intervals is None
                else (float(intervals[head][0]), float(intervals[head][1])),
                chosen_again=None if again is None else float(again[head]),
                above_noise_floor=bool(above[head]),
                reason=reasons[head],
                effects=_effects(scores, head),
            )
            for head in sorted(chosen)
        ),
        probes=tuple(probe.name for probe in scores.probes),
        scores=tuple(tuple(row) for row in scores.scores.tolist()),
        kept_share=float(_kept_share(scores.scores, is_fa)),
        kept_interval=kept_interval,
        num_tie_filled=num_tie_filled,
        num_resamples=0 if intervals is None else num_resamples,
        num_solved=num_solved,
        split_half=split_half,
        no_split_half=no_split_half,
    )


def kept_shares(samples: Array, plan: HeadPlan) -> Array:
    """Share of the sum of scores that a plan's FA heads hold; 1 where the sum is 0.

    Args:
        samples: [..., layers, heads].
        plan: Of a model of this shape.

    Returns:
        [...].
    """
    return _kept_share(
        samples, np.array([[kind == "fa" for kind in layer.kinds] for layer in plan.layers])
    )


def replaceable_heads(problem: Problem, scores: Array, chosen: frozenset[Head]) -> frozenset[Head]:
    """Chosen heads that a left-out head of equal score could replace, all else kept.

    Of whole groups, groups replace groups. Scores at or below 0 count as equal.
    """
    shape, evidence = problem.shape, np.maximum(scores, 0.0)
    size = shape.heads_per_group if problem.constraints.whole_groups else 1
    counts = problem.constraints.layer_counts(shape)
    in_layer = [sum(layer == i for layer, _ in chosen) for i in range(shape.num_layers)]

    def can_replace(unit: Head, other: Head) -> bool:
        if unit[0] != other[0]:
            moved = (in_layer[unit[0]] - size, in_layer[other[0]] + size)
            if not all(count in counts for count in moved):
                return False
        swapped = (chosen - _heads_of(unit, size)) | _heads_of(other, size)
        groups = {(layer, head // shape.heads_per_group) for layer, head in swapped}
        return problem.allows(len(swapped), len(groups))

    left_out: dict[float, list[Head]] = {}
    kept: list[tuple[float, Head]] = []
    for unit in np.ndindex(shape.num_layers, shape.num_heads // size):
        first = (unit[0], unit[1] * size)
        value = math.fsum(evidence[head] for head in _heads_of(first, size))
        if first in chosen:
            kept.append((value, first))
        else:
            left_out.setdefault(value, []).append(first)
    return frozenset(
        head
        for value, unit in kept
        if any(can_replace(unit, other) for other in left_out.get(value, ()))
        for head in _heads_of(unit, size)
    )


def _heads_of(first: Head, size: int) -> set[Head]:
    return {(first[0], first[1] + offset) for offset in range(size)}


def _reasons(
    scores: HeadScores,
    problem: Problem,
    chosen: frozenset[Head],
    choose: Choose,
    ties: frozenset[Head],
) -> dict[Head, Reason]:
    """Whether the policy would choose a head too if nothing but their number were asked."""
    free = Problem(problem.shape, Constraints(), len(chosen))
    by_score = choose(free, scores.scores, scores.effect_size) or frozenset()
    reasons: dict[Head, Reason] = dict.fromkeys(chosen, "constraint")
    return reasons | {head: "tie" if head in ties else "score" for head in chosen & by_score}


def _chosen_again(
    scores: HeadScores, problem: Problem, choose: Choose, samples: Array, number: int, seed: int
) -> Array:
    """Share of the first resamples that choose a head, [layers, heads].

    Effect sizes are resampled with the scores: what won a tie by a small effect is not sure.
    """
    drawn = draw_pairs(scores, len(samples), seed)
    means = counted_means(scores, {name: counts[:number] for name, counts in drawn.items()})
    sizes = [np.abs(mean) for by_probe in means.values() for mean in by_probe.values()]
    times = np.zeros(samples.shape[1:])
    for sample, effect_size in zip(samples[:number], np.mean(sizes, axis=0), strict=True):
        for head in choose(problem, sample, effect_size) or ():
            times[head] += 1
    return times / number


def _kept_share(samples: Array, is_fa: np.ndarray) -> Array:
    evidence = np.maximum(samples, 0.0)
    total = evidence.sum(axis=(-2, -1))
    kept = evidence[..., is_fa].sum(axis=-1)
    return np.asarray(np.where(total > 0, kept / np.where(total > 0, total, 1.0), 1.0))


def _effects(scores: HeadScores, head: Head) -> dict[str, list[float | None]]:
    def read(scorer: str, probe: str) -> float | None:
        if probe not in scores.effects[scorer]:
            return None
        return float(f"{scores.mean_effects(scorer, probe)[head]:.{_DIGITS}g}")

    probes = [probe.name for probe in scores.probes]
    return {scorer: [read(scorer, probe) for probe in probes] for scorer in scores.effects}


def _split_half(scores: HeadScores, seed: int) -> tuple[SplitHalf | None, str]:
    try:
        return split_half_correlation(scores, seed=seed), ""
    except UserError as error:  # not the user's fault: the plan stands, and its file says so
        return None, str(error)
