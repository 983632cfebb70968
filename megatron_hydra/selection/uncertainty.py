"""How sure head scores are: resampled pairs, intervals, a noise floor, and split halves.

The pairs of a sub-probe are a sample of all the pairs that its generator could have drawn; the
question is always what other pairs would have shown. Scores that stand on one pair per sub-probe
(the controls: random, fixed, every n-th layer) carry no uncertainty that this could find; see
:func:`carries_uncertainty`.

Legend: l = layers, n = heads of a layer, p = kept pairs of a sub-probe, r = resamples.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from megatron_hydra.errors import UserError
from megatron_hydra.selection.combination import NOTABLE_EFFECT, Array, combine
from megatron_hydra.selection.scores import HeadScores

logger = logging.getLogger(__name__)

_LEVEL = 0.95
"""Share of draws in which an interval is to hold the true value."""
_NUM_SPLITS = 100
_AT_ONCE = 64  # resamples combined at once: 64 x 448 heads x 16 sub-probes are 4 MB per scorer


class Intervals(NamedTuple):
    """Limits of every head, [l, n] each."""

    lower: Array
    upper: Array


@dataclass(frozen=True)
class SplitHalf:
    """Spearman's rank correlation of the scores of two disjoint halves of the pairs.

    Lower and upper hold 95% of the splits. They tell how much the split matters and are no
    confidence interval, since all splits share the same pairs.
    """

    median: float
    lower: float
    upper: float
    num_pairs_per_half: int
    """The fewest that a half has of a sub-probe."""


def carries_uncertainty(scores: HeadScores) -> bool:
    """Whether a sub-probe that the scores stand on has two pairs or more."""
    return any(num_pairs > 1 for num_pairs in _num_pairs_read(scores).values())


def bootstrap_scores(scores: HeadScores, num_resamples: int = 1000, seed: int = 0) -> Array:
    """Scores of resampled pairs, combined anew.

    Of a sub-probe's p pairs p - 1 are drawn with replacement, the same for all scorers. Drawing
    p would make the spread too small by sqrt((p - 1) / p), which counts at 8 to 12 pairs
    (Hesterberg 2015, "What teachers should know about the bootstrap", The American Statistician
    69:371-386). A sub-probe of one pair adds no spread; a warning names it.

    Args:
        scores: What to resample; all steps of its combination are done anew for each resample.
        num_resamples: r.
        seed: The same seed draws the same pairs, whatever the combination.

    Returns:
        [r, l, n] float64.

    Raises:
        UserError: If ``num_resamples`` is below 1.
    """
    single = [name for name, num_pairs in _num_pairs_read(scores).items() if num_pairs == 1]
    if single:
        logger.warning("one pair alone, so no uncertainty, in: %s", ", ".join(single))
    return _combine_counted(scores, draw_pairs(scores, num_resamples, seed))


def draw_pairs(scores: HeadScores, num_resamples: int, seed: int) -> dict[str, Array]:
    """How often each resample holds each kept pair, sub-probe -> [r, p] whole numbers.

    Raises:
        UserError: If ``num_resamples`` is below 1.
    """
    if num_resamples < 1:
        raise UserError(f"{num_resamples} resamples; at least 1 is needed")
    generator = np.random.default_rng(seed)
    counts = {}
    for record in scores.probes:
        if record.kept:
            p = len(record.kept)
            drawn = generator.multinomial(max(p - 1, 1), [1 / p] * p, size=num_resamples)
            counts[record.name] = drawn.astype(np.float64)
    return counts


def score_intervals(samples: Array) -> Intervals:
    """95% percentile intervals: where a head's score would lie if other pairs had been drawn.

    How often 95% intervals hold the true score, simulated with the paper's combination of ten
    sub-probes, for heads with a mean effect of 0.015 to 0.9 and an error of a pair of 0.4 times
    that (tests/selection/test_uncertainty.py): in 94 to 95% of draws at 8, 12 and 40 pairs, also if
    the error is skewed as an exponential distribution. On a single sub-probe of 12 pairs: 92%.
    The basic and the bias-corrected interval did worse: 85 and 90% for heads with effects near
    :data:`NOTABLE_EFFECT`, where consistency makes a step.

    Each head has its own interval; that all of them hold at once is less likely. The interval
    says nothing on whether a head has an effect: a score is made of absolute values, so that of a
    head without effect lies too high where its noise exceeds :data:`NOTABLE_EFFECT`, and its
    interval may leave 0 out. :func:`above_noise_floor` answers that.

    Args:
        samples: [r, l, n], of :func:`bootstrap_scores`.
    """
    return Intervals(*np.quantile(samples, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], axis=0))


def above_noise_floor(scores: HeadScores) -> NDArray[np.bool_]:
    """Heads with a notable effect that is no accident of the pairs.

    In at least one sub-probe and scorer of the combination the interval of the mean effect must
    lie wholly beyond +/- :data:`NOTABLE_EFFECT`. The intervals are Student's, widened for the
    number of chances that a head has (Bonferroni), so that a head whose true mean effects are all
    within +/- :data:`NOTABLE_EFFECT` passes with a probability of 5% at the most, if its effects
    are about normal (simulated: 3%; with errors as skewed as an exponential
    distribution 20%). That is a head's error, not that of the whole map: of 448 heads without
    effect, but with large noise, 22 may pass. A sub-probe of one pair has no interval, so heads
    of scores that carry no uncertainty are never above.

    Returns:
        [l, n].
    """
    several = [
        (effects, scores.pair_weights(name))
        for scorer in scores.combination.scorers
        for name, effects in scores.effects[scorer].items()
        if len(effects) > 1
    ]
    above = np.zeros((scores.num_layers, scores.num_heads), dtype=bool)
    for effects, weights in several:
        p = len(effects)
        quantile = stats.t.ppf(1 - (1 - _LEVEL) / 2 / len(several), p - 1)
        mean = np.average(effects, axis=0, weights=weights)
        # The standard error of a ratio of totals (Cochran, Sampling Techniques, 1977, section 6.4).
        share = (weights / weights.sum())[:, None, None]
        error = np.sqrt(p / (p - 1) * ((share * (effects - mean)) ** 2).sum(axis=0))
        above |= np.abs(mean) - quantile * error > NOTABLE_EFFECT
    return above


def split_half_correlation(scores: HeadScores, seed: int = 0) -> SplitHalf:
    """Whether one half of the pairs ranks the heads as the other half does, in 100 random splits.

    A sub-probe with an odd number of pairs leaves one out of each split, another each time.
    Sub-probes of one pair are left out of both halves; a warning names them.

    Args:
        scores: What to split; both halves are combined as the whole is.
        seed: Of the splits.

    Raises:
        UserError: If a scorer or capability has no sub-probe of two pairs, or if all heads of a
            half score the same, so that no correlation is defined.
    """
    num_pairs = _num_pairs_to_split(scores)
    generator = np.random.default_rng(seed)
    halves: tuple[dict[str, Array], dict[str, Array]] = ({}, {})
    for name, p in num_pairs.items():
        order = generator.permuted(np.tile(np.arange(p), (_NUM_SPLITS, 1)), axis=1)
        size = p // 2
        for counts, chosen in zip(halves, (order[:, :size], order[:, size : 2 * size])):
            counts[name] = np.zeros((_NUM_SPLITS, p))
            np.put_along_axis(counts[name], chosen, 1, axis=1)
    first, second = (_combine_counted(scores, half).reshape(_NUM_SPLITS, -1) for half in halves)
    constant = (np.ptp(first, axis=1) == 0) | (np.ptp(second, axis=1) == 0)
    if constant.any():
        raise UserError(
            f"no rank correlation of split halves: in {constant.sum()} of {_NUM_SPLITS} splits all "
            "heads of a half score the same; more pairs or stronger effects are needed"
        )
    found = [stats.spearmanr(a, b).statistic for a, b in zip(first, second)]
    lower, median, upper = np.quantile(found, [0.025, 0.5, 0.975]).tolist()
    return SplitHalf(median, lower, upper, min(num_pairs.values()) // 2)


def _num_pairs_read(scores: HeadScores) -> dict[str, int]:
    """Kept pairs of the sub-probes that the combination's scorers read."""
    by_scorer = [scores.effects[scorer] for scorer in scores.combination.scorers]
    return {name: len(effects) for by_probe in by_scorer for name, effects in by_probe.items()}


def _num_pairs_to_split(scores: HeadScores) -> dict[str, int]:
    """Those of :func:`_num_pairs_read` with two pairs or more."""
    read = _num_pairs_read(scores)
    num_pairs = {name: p for name, p in read.items() if p > 1}
    for scorer in scores.combination.scorers:
        if not num_pairs.keys() & scores.effects[scorer].keys():
            raise UserError(f"{scorer} has two pairs on no sub-probe: there are no halves to split")
    capabilities = {record.name: record.capability for record in scores.probes}
    for name in read:
        if all(capabilities[name] != capabilities[other] for other in num_pairs):
            raise UserError(
                f"no sub-probe of capability {capabilities[name]!r} keeps two pairs: there are no "
                "halves to split"
            )
    if len(num_pairs) < len(read):
        left_out = ", ".join(name for name in read if name not in num_pairs)
        logger.warning("one pair alone, so left out of the split halves: %s", left_out)
    return num_pairs


def _combine_counted(scores: HeadScores, counts: Mapping[str, Array]) -> Array:
    """Scores where each pair counts as often as ``counts`` say, [r, l, n].

    ``counts`` hold [r, p] for a sub-probe; sub-probes without are left out.
    """
    capabilities = {record.name: record.capability for record in scores.probes}
    num_resamples = len(next(iter(counts.values())))
    combined = []
    for start in range(0, num_resamples, _AT_ONCE):
        part = {name: drawn[start : start + _AT_ONCE] for name, drawn in counts.items()}
        combined.append(combine(counted_means(scores, part), capabilities, scores.combination))
    return np.concatenate(combined)


def counted_means(scores: HeadScores, counts: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """Mean effects where each pair counts as often as ``counts`` say.

    Args:
        scores: Their combination's scorers are read, and its weights of pairs.
        counts: Sub-probe -> [r, p]; sub-probes without are left out.

    Returns:
        Scorer -> sub-probe -> [r, l, n].
    """
    return {
        scorer: {
            name: _counted_mean(effects, counts[name] * scores.pair_weights(name))
            for name, effects in scores.effects[scorer].items()
            if name in counts
        }
        for scorer in scores.combination.scorers
    }


def _counted_mean(effects: Array, counts: Array) -> Array:
    """Mean of effects [p, l, n] by counts, or weights, [r, p]: [r, l, n].

    Pair by pair and not as a matrix product, whose rounding differs from column to column: heads
    with the same effects must tie, for normalisation would blow up any difference.
    """
    total = np.zeros((len(counts), *effects.shape[1:]))
    for pair, effect in enumerate(effects):
        total += counts[:, pair, None, None] * effect
    return np.asarray(total / counts.sum(axis=1)[:, None, None])
