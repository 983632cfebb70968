"""The paired bootstrap against a known case, and against resampling prompt by prompt."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.stats import ttest_rel

from megatron_hydra.study.statistics import (
    Difference,
    difference_in_nats,
    paired_difference,
    share_right,
)


def test_one_cell_has_the_interval_of_its_mean() -> None:
    """The mean of n differences of 1, 0 and -1: its standard error is known."""
    # 300 prompts: 90 that the first arm alone answers, 30 that the other alone does.
    better, worse = "1" * 190 + "0" * 110, "0" * 90 + "1" * 100 + "1" * 30 + "0" * 80
    found = paired_difference([[better]], [[worse]])
    mean = 60 / 300
    error = np.sqrt((120 / 300 - mean**2) / 300)
    assert found.value == pytest.approx(100 * mean)
    bounds = (100 * (mean - 1.96 * error), 100 * (mean + 1.96 * error))
    assert found.interval == pytest.approx(bounds, abs=1.0)
    other = paired_difference([[worse]], [[better]])
    assert other.value == pytest.approx(-100 * mean)


def test_pairs_count_and_not_shares_alone() -> None:
    """Arms that differ on the same few prompts are told apart where unpaired ones would not be."""
    same = "10" * 100
    found = paired_difference([["1" * 8 + same]], [["0" * 8 + same]])
    assert found.interval[0] > 0.0
    crossed = paired_difference([["1" * 8 + same]], [["0" * 8 + same[::-1]]])
    assert crossed.interval[0] < 0.0 < crossed.interval[1]


def test_equal_to_resampling_prompt_by_prompt() -> None:
    """Runs, cells of unequal size, and both levels of resampling, written out as loops."""
    rng = random.Random(0)
    sizes = (40, 60)

    def draw(share: float) -> list[str]:
        return ["".join(str(int(rng.random() < share)) for _ in range(n)) for n in sizes]

    better, worse = [draw(p) for p in (0.9, 0.7, 0.6)], [draw(p) for p in (0.4, 0.5, 0.55)]
    found = paired_difference(better, worse)
    means = []
    for _ in range(2000):
        of_runs = []
        for _ in range(3):
            run = rng.randrange(3)
            cells = []
            for a, b in zip(better[run], worse[run], strict=True):
                picked = [rng.randrange(len(a)) for _ in a]
                cells.append(sum(int(a[i]) - int(b[i]) for i in picked) / len(a))
            of_runs.append(sum(cells) / 2)
        means.append(sum(of_runs) / 3)
    assert found.value == pytest.approx(
        100 * np.mean([share_right(a) - share_right(b) for a, b in zip(better, worse, strict=True)])
    )
    assert found.interval == pytest.approx(100 * np.quantile(means, (0.025, 0.975)), abs=2)


def test_seeds_that_disagree_leave_it_undecided() -> None:
    right, wrong = ["1" * 100], ["0" * 100]
    assert paired_difference([right, right], [wrong, wrong]).verdict == "holds"
    assert paired_difference([wrong, wrong], [right, right]).verdict == "does not hold"
    assert paired_difference([right, wrong], [wrong, right]).verdict == "undecided"
    assert paired_difference([right], [wrong]).verdict == "undecided", "one seed"
    assert Difference(0.1, (0.0, 0.2), 3).verdict == "undecided"


def test_differences_in_nats_have_the_interval_of_a_paired_test() -> None:
    """scipy's own, of the runs' pairs."""
    better, worse = [2.1, 2.3, 2.2, 2.4], [2.2, 2.5, 2.25, 2.55]
    found = difference_in_nats(better, worse)
    expected = ttest_rel(worse, better).confidence_interval(0.95)
    assert found.value == pytest.approx(0.125) and found.verdict == "holds"
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert difference_in_nats(worse, better).verdict == "does not hold"
    assert difference_in_nats([2.1, 2.4], [2.2, 2.3]).verdict == "undecided"
    one = difference_in_nats([2.1], [2.3])
    assert one.verdict == "undecided" and one.words == ("+0.200 nats", "")


def test_arms_that_were_not_asked_the_same_are_not_compared() -> None:
    with pytest.raises(ValueError, match="shorter|longer"):
        paired_difference([["10"]], [["1"]])
