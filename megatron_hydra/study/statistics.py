"""Whether one arm is better than another: of prompts by a paired bootstrap, else by pairs of runs.

Legend: u = runs of both arms on the same teacher and seed, c = cells, r = resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

Verdict = Literal["holds", "does not hold", "undecided"]
NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """By how much one arm is better.

    Attributes:
        value: The mean over runs: of the shares of right samples, in points; or in nats, the lower
            being the better.
        interval: 95%.
        num_runs: u; the interval of a single run knows nothing of other seeds.
        unit: Of both.
    """

    value: float
    interval: tuple[float, float]
    num_runs: int
    unit: Literal["points", "nats"] = "points"

    @property
    def words(self) -> tuple[str, str]:
        """Value and interval, to be read."""
        digits = 1 if self.unit == "points" else 3
        value, low, high = (f"{each:+.{digits}f}" for each in (self.value, *self.interval))
        # One run's nats have no interval.
        return f"{value} {self.unit}", f"{low} to {high}" if math.isfinite(self.interval[0]) else ""

    @property
    def verdict(self) -> Verdict:
        """On the claim that the arm is better; one run alone decides nothing."""
        if self.num_runs > 1 and self.interval[0] > 0:
            return "holds"
        if self.num_runs > 1 and self.interval[1] < 0:
            return "does not hold"
        return "undecided"


def paired_difference(
    better: Sequence[Sequence[str]], worse: Sequence[Sequence[str]], seed: int = 0
) -> Difference:
    """Compare two arms that were asked the same.

    Resampled are the runs, and within each run and cell the prompts, with both arms' answers to one
    together. A cell's prompts count by what they say of the difference, 1, 0 or -1: to draw n of
    them is to draw these counts from a multinomial distribution.

    Args:
        better: Of each run and cell, a 1 for each prompt that was answered right, else 0.
        worse: The same of the other arm, in the same order.
        seed: Of the resamples.
    """
    counts = np.array([[_counts(*cell) for cell in zip(*run)] for run in zip(better, worse)])
    sizes = counts.sum(-1)  # [u, c]
    values = (counts[..., 0] - counts[..., 2]) / sizes
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(sizes, counts / sizes[..., None], (NUM_RESAMPLES, *sizes.shape))
    by_run = ((drawn[..., 0] - drawn[..., 2]) / sizes).mean(-1)  # [r, u]
    runs = rng.integers(len(counts), size=by_run.shape)
    means = np.take_along_axis(by_run, runs, axis=1).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    value, low, high = (100 * float(each) for each in (values.mean(), low, high))
    return Difference(value, (low, high), len(counts))


def difference_in_nats(better: Sequence[float], worse: Sequence[float]) -> Difference:
    """Compare what two arms have of a loss, by Student's t interval of the paired differences.

    Args:
        better: Of each run, in nats.
        worse: The same of the other arm, in the same order.
    """
    found = np.subtract(worse, better)
    value, half = float(found.mean()), math.inf
    if len(found) > 1:
        error = found.std(ddof=1) / math.sqrt(len(found))
        half = float(stats.t.ppf(0.975, len(found) - 1) * error)
    return Difference(value, (value - half, value + half), len(found), "nats")


def _counts(better: str, worse: str) -> tuple[int, int, int]:
    """Prompts that the first arm alone, both or none, and the other alone answer right."""
    pairs = list(zip(better, worse, strict=True))
    wins, losses = pairs.count(("1", "0")), pairs.count(("0", "1"))
    return wins, len(pairs) - wins - losses, losses


def share_right(cells: Sequence[str]) -> float:
    """Of right samples, the mean over cells."""
    return sum(cell.count("1") / len(cell) for cell in cells) / len(cells)
