"""Tests of the uncertainty of scores: resampling, coverage by simulation, noise floor, halves."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from kit.scores import PROBE, make_scores

from megatron_hydra.errors import UserError
from megatron_hydra.selection.combination import Combination, combine
from megatron_hydra.selection.scores import HeadScores
from megatron_hydra.selection.uncertainty import (
    above_noise_floor,
    bootstrap_scores,
    carries_uncertainty,
    draw_pairs,
    score_intervals,
    split_half_correlation,
)

# Five sub-probes of one capability, two and three of others, as a scoring run has them.
CAPABILITIES = {
    **{f"needle_{i}": "retrieval" for i in range(5)},
    **{f"copy_{i}": "copy" for i in range(2)},
    **{f"text_{i}": "language" for i in range(3)},
}


def two_scorers(num_pairs: tuple[int, ...] = (4, 6, 5)) -> HeadScores:
    generator = np.random.default_rng(1)
    names = dict(zip(("needle_0", "needle_1", "copy_0"), num_pairs))
    mean = generator.uniform(-0.3, 0.3, (3, 4))
    effects = {name: mean + generator.normal(0, 0.2, (p, 3, 4)) for name, p in names.items()}
    sender = {name: generator.normal(0, 0.3, (names[name], 3, 4)) for name in list(names)[:2]}
    return make_scores(
        {"receiver": effects, "sender": sender},
        capabilities=CAPABILITIES,
        combination=Combination(("receiver", "sender"), weights={"copy": 0.5}),
    )


def test_the_bootstrap_equals_a_loop_that_scores_one_resample_at_a_time() -> None:
    scores = two_scorers()
    samples = bootstrap_scores(scores, num_resamples=150, seed=3)  # more than is done at once
    counts = draw_pairs(scores, 150, seed=3)
    for index, sample in enumerate(samples):
        drawn = {
            name: np.repeat(np.arange(rows.shape[1]), rows[index].astype(int))
            for name, rows in counts.items()
        }
        resampled = {
            scorer: {name: values[drawn[name]] for name, values in by_probe.items()}
            for scorer, by_probe in scores.effects.items()
        }
        again = make_scores(resampled, capabilities=CAPABILITIES, combination=scores.combination)
        np.testing.assert_allclose(sample, again.scores, atol=1e-12)


def test_pairs_are_drawn_with_replacement_one_fewer_than_there_are() -> None:
    counts = draw_pairs(two_scorers((4, 6, 1)), 20_000, seed=0)
    assert {name: rows.shape for name, rows in counts.items()} == {
        "needle_0": (20_000, 4),
        "needle_1": (20_000, 6),
        "copy_0": (20_000, 1),
    }
    assert (counts["copy_0"] == 1).all()
    for name, p in {"needle_0": 4, "needle_1": 6}.items():
        assert (counts[name].sum(axis=1) == p - 1).all()
        # Binomial with p - 1 trials: its mean and variance, to 4 standard errors or so.
        np.testing.assert_allclose(counts[name].mean(axis=0), (p - 1) / p, atol=0.03)
        np.testing.assert_allclose(counts[name].var(axis=0), (p - 1) ** 2 / p**2, rtol=0.06)
    # Sub-probes are drawn apart from one another.
    assert abs(np.corrcoef(counts["needle_0"][:, 0], counts["needle_1"][:, 0])[0, 1]) < 0.03


def test_the_spread_is_that_of_a_mean_of_few_pairs() -> None:
    """Drawing as many pairs as there are would give a variance too small by 1/4 here."""
    effects = np.random.default_rng(0).normal(1.0, 0.1, (4, 2, 3))
    samples = bootstrap_scores(make_scores(effects), num_resamples=20_000)
    np.testing.assert_allclose(samples.var(axis=0), effects.var(axis=0, ddof=1) / 4, rtol=0.06)


def test_scorers_share_a_resample_and_the_seed_decides() -> None:
    effects = np.random.default_rng(0).normal(1.0, 0.3, (5, 2, 3))
    both = make_scores({"one": {"p": effects}, "twice": {"p": 2 * effects}})
    one, twice = (
        bootstrap_scores(both.with_combination(Combination((name,), normalise=False)), 50)
        for name in ("one", "twice")
    )
    np.testing.assert_allclose(twice, 2 * one)
    again = bootstrap_scores(both.with_combination(Combination(("one",), normalise=False)), 50, 1)
    assert not np.allclose(again, one)


def test_heads_with_the_same_effects_tie_in_every_resample() -> None:
    one = np.random.default_rng(0).normal(0, 0.3, (7, 1, 1))
    effects = np.broadcast_to(one, (7, 5, 9)).copy()
    effects[:, 0, 0] = 0
    samples = bootstrap_scores(make_scores({"s": {"p": effects}}), 200).reshape(200, -1)
    assert (samples[:, 1:] == samples[:, 1:2]).all()


def true_effects(generator: np.random.Generator) -> np.ndarray:
    """[sub-probes, 4, 8]: two strong heads, eight weak ones of either sign, the rest nothing."""
    base = np.zeros(32)
    base[:2] = generator.uniform(0.1, 0.6, 2)
    base[2:10] = generator.uniform(0.015, 0.1, 8) * np.repeat([1, -1], 4)
    return (base * generator.uniform(0.5, 1.5, (len(CAPABILITIES), 32))).reshape(-1, 4, 8)


def drawn_effects(
    generator: np.random.Generator, truth: np.ndarray, num_pairs: int, skewed: bool, noise: float
) -> dict[str, np.ndarray]:
    """Pairs whose error is 0.4 times the head's effect plus ``noise``."""
    size = (num_pairs, *truth.shape)
    error = generator.gamma(1.0, 1.0, size) - 1 if skewed else generator.standard_normal(size)
    effects = truth + (0.4 * np.abs(truth) + noise) * error
    return {name: effects[:, index] for index, name in enumerate(CAPABILITIES)}


@pytest.mark.parametrize(
    ("num_pairs", "skewed"),
    [(8, False), (12, False), (12, True), pytest.param(40, False, marks=pytest.mark.exhaustive)],
)
def test_intervals_of_95_percent_cover(num_pairs: int, skewed: bool) -> None:
    """The share of heads with an effect whose interval holds the score of the true effects.

    1500 intervals: their share has a standard error of 0.6%, and two of them are allowed.
    """
    generator = np.random.default_rng(0)
    combination = Combination(("s",))
    covered = np.zeros((4, 8))
    for draw in range(150):
        truth = true_effects(generator)
        means = {"s": dict(zip(CAPABILITIES, truth))}
        true_scores = combine(means, CAPABILITIES, combination)
        effects = drawn_effects(generator, truth, num_pairs, skewed, noise=0.003)
        scores = make_scores({"s": effects}, capabilities=CAPABILITIES)
        lower, upper = score_intervals(bootstrap_scores(scores, 400, seed=draw))
        # The strongest head scores 1 in most resamples and in truth: rounding must not decide.
        covered += (lower <= true_scores + 1e-12) & (true_scores <= upper + 1e-12)
    share = covered.ravel()[:10].mean() / 150
    assert 0.94 - 0.012 <= share <= 0.96 + 0.012


def test_a_lone_sub_probe_covers_a_little_less() -> None:
    """Nothing averages out there, and Student's t would be wider than the percentiles."""
    generator = np.random.default_rng(0)
    covered = []
    for draw in range(50):
        scores = make_scores(generator.normal(1.0, 0.2, (12, 8, 8)))
        lower, upper = score_intervals(bootstrap_scores(scores, 400, seed=draw))
        covered.append(((lower <= 1) & (upper >= 1)).mean())
    assert 0.91 <= np.mean(covered) <= 0.94


def test_intervals_are_narrower_for_more_pairs() -> None:
    generator = np.random.default_rng(0)
    width = {}
    for num_pairs in (12, 48):
        samples = bootstrap_scores(make_scores(generator.normal(1, 0.2, (num_pairs, 8, 8))))
        lower, upper = score_intervals(samples)
        width[num_pairs] = (upper - lower).mean()
    assert width[12] / width[48] == pytest.approx(2, rel=0.1)


def noise_only(mean: float, skewed: bool = False) -> HeadScores:
    """2000 heads without notable effect, seen through ten sub-probes of 12 noisy pairs."""
    truth = np.full((len(CAPABILITIES), 40, 50), mean)
    # A true effect of 0 must give an error of 0.2 too.
    effects = drawn_effects(np.random.default_rng(0), 0 * truth, 12, skewed, noise=0.2)
    effects = {name: values + mean for name, values in effects.items()}
    return make_scores({"s": effects}, capabilities=CAPABILITIES)


@pytest.mark.parametrize("mean", [0.0, 0.01, -0.01])
def test_the_noise_floor_lets_few_heads_without_effect_through(mean: float) -> None:
    """Though each has ten chances. Four standard errors are allowed."""
    assert above_noise_floor(noise_only(mean)).mean() <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 2000)


def test_the_noise_floor_of_a_lone_sub_probe_of_few_pairs_is_exact() -> None:
    """Student's t: 5% of heads at three pairs too, less or more would be wrong."""
    effects = np.random.default_rng(0).normal(0, 10, (3, 100, 100))
    share = above_noise_floor(make_scores(effects)).mean()
    assert abs(share - 0.05) <= 4 * math.sqrt(0.05 * 0.95 / 10_000)


def test_the_noise_floor_lets_more_through_where_errors_are_skewed() -> None:
    """As its docstring says: one in five with exponential errors, for Student's t is not exact."""
    assert 0.15 <= above_noise_floor(noise_only(0.0, skewed=True)).mean() <= 0.25


def test_the_noise_floor_answers_what_intervals_cannot() -> None:
    """Heads of noise alone: most intervals leave out the true score 0, and few pass the floor."""
    scores = noise_only(0.0)
    raw = scores.with_combination(Combination(("s",), normalise=False))
    assert (score_intervals(bootstrap_scores(raw, 200)).lower > 0).mean() > 0.9
    assert above_noise_floor(raw).mean() < 0.07


def test_a_clear_effect_of_either_sign_in_one_sub_probe_is_above() -> None:
    generator = np.random.default_rng(0)
    effects = {name: generator.normal(0, 0.04, (12, 2, 3)) for name in CAPABILITIES}
    effects["text_1"][:, 0, 1] += 0.15
    effects["copy_0"][:, 1, 2] -= 0.15
    scores = make_scores({"seen": effects, "other": {"copy_0": np.full((12, 2, 3), 0.5)}})
    seen = scores.with_combination(Combination(("seen",)))
    assert np.argwhere(above_noise_floor(seen)).tolist() == [[0, 1], [1, 2]]
    assert above_noise_floor(scores).all()  # only scorers of the combination count


def test_halves_of_reproducible_effects_agree() -> None:
    effects = np.tile(np.random.default_rng(0).normal(0, 0.3, (1, 4, 8)), (12, 1, 1))
    found = split_half_correlation(make_scores({"s": {"p": effects}}))
    assert dataclasses.astuple(found) == pytest.approx((1.0, 1.0, 1.0, 6))


def test_halves_of_noise_do_not_agree() -> None:
    effects = np.random.default_rng(0).normal(0, 1, (12, 20, 20))
    found = split_half_correlation(make_scores({"s": {"p": effects}}))
    # Of 400 heads without order a rank correlation has a standard deviation of 0.05.
    assert -0.2 < found.lower < found.median < found.upper < 0.2
    assert abs(found.median) < 0.1


def test_split_halves_are_disjoint_and_all_splits_occur() -> None:
    """Four pairs split in three ways: Spearman's correlation of each, by its definition."""
    effects = np.random.default_rng(0).normal(0, 0.3, (4, 3, 4))

    def ranks(pairs: list[int]) -> np.ndarray:
        return np.abs(effects[pairs].mean(axis=0)).ravel().argsort().argsort()

    splits = [([0, 1], [2, 3]), ([0, 2], [1, 3]), ([0, 3], [1, 2])]
    least, middle, most = sorted(np.corrcoef(ranks(a), ranks(b))[0, 1] for a, b in splits)
    found = split_half_correlation(make_scores(effects))
    assert dataclasses.astuple(found) == pytest.approx((middle, least, most, 2))


def test_the_smallest_sub_probe_says_how_many_pairs_a_half_has() -> None:
    assert split_half_correlation(two_scorers((5, 7, 9))).num_pairs_per_half == 2


def test_a_sub_probe_of_one_pair_is_left_out_of_the_halves(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scores = two_scorers((6, 1, 6))
    found = split_half_correlation(scores)
    assert "left out of the split halves: needle_1" in caplog.text
    without = {
        scorer: {name: values for name, values in by_probe.items() if name != "needle_1"}
        for scorer, by_probe in scores.effects.items()
    }
    again = make_scores(without, capabilities=CAPABILITIES, combination=scores.combination)
    assert dataclasses.astuple(found) == pytest.approx(
        dataclasses.astuple(split_half_correlation(again))
    )


def test_scores_of_one_pair_carry_no_uncertainty(caplog: pytest.LogCaptureFixture) -> None:
    control = make_scores(np.arange(8.0).reshape(2, 4))
    assert not carries_uncertainty(control) and carries_uncertainty(two_scorers())
    samples = bootstrap_scores(control, 20)
    assert f"one pair alone, so no uncertainty, in: {PROBE}" in caplog.text
    for limit in score_intervals(samples):
        np.testing.assert_array_equal(limit, control.scores)
    assert not above_noise_floor(control).any()
    with pytest.raises(UserError, match="scorer has two pairs on no sub-probe"):
        split_half_correlation(control)


def same_in_every_head(scores: HeadScores) -> None:
    effects = np.ones_like(scores.effects["receiver"]["needle_0"])
    split_half_correlation(make_scores({"receiver": {"needle_0": effects}}))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda s: bootstrap_scores(s, 0), "0 resamples; at least 1"),
        (same_in_every_head, "in 100 of 100 splits all heads of a half score the same"),
        (
            lambda s: split_half_correlation(two_scorers((4, 4, 1))),
            "no sub-probe of capability 'copy' keeps two pairs",
        ),
    ],
)
def test_what_cannot_be_answered_is_said(call: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        call(two_scorers())


def with_gaps(gaps: tuple[float, ...], effects: np.ndarray, weigh: bool = True) -> HeadScores:
    """One sub-probe whose first pair was dropped and whose kept pairs have these gaps."""
    scores = make_scores({"scorer": {PROBE: effects}})
    record = dataclasses.replace(
        scores.probes[0],
        num_pairs=len(gaps) + 1,
        kept=tuple(range(1, len(gaps) + 1)),
        gaps=(-9.0, *gaps),
    )
    combination = Combination(("scorer",), consistency=False, normalise=False, weigh_by_gap=weigh)
    return dataclasses.replace(scores, probes=(record,), combination=combination)


def test_pairs_weigh_as_much_as_their_gap_everywhere() -> None:
    """Catches a mean, a resample or a floor that forgets the weights or a dropped pair's place."""
    generator = np.random.default_rng(0)
    gaps = (0.5, 4.0, 2.0, 1.0)
    lost = generator.normal(0.3, 0.1, (4, 2, 3))  # m(x) - m(patched)
    effects = lost / np.array(gaps)[:, None, None]
    scores = with_gaps(gaps, effects)
    np.testing.assert_allclose(scores.scores, np.abs(lost.sum(axis=0) / sum(gaps)), rtol=1e-12)
    np.testing.assert_allclose(
        with_gaps(gaps, effects, weigh=False).scores, np.abs(effects.mean(axis=0)), rtol=1e-12
    )
    counts = draw_pairs(scores, 20, seed=1)[PROBE]
    for sample, count in zip(bootstrap_scores(scores, 20, seed=1), counts):
        total = (count[:, None, None] * lost).sum(axis=0) / (count * gaps).sum()
        np.testing.assert_allclose(sample, np.abs(total), rtol=1e-12)


def test_the_floor_of_weighted_pairs_lets_few_noise_heads_pass_and_finds_real_ones() -> None:
    """Errors as large as the gap is small, as on running text: the plain mean finds nothing."""
    generator = np.random.default_rng(0)
    gaps = tuple(generator.uniform(0.2, 4.0, 24))
    lost = generator.normal(0, 0.05, (24, 40, 50))
    lost[:, 20:] += 0.06 * np.array(gaps)[:, None, None]
    effects = lost / np.array(gaps)[:, None, None]
    above = above_noise_floor(with_gaps(gaps, effects))
    plain = above_noise_floor(with_gaps(gaps, effects, weigh=False))
    assert above[:20].mean() < 0.05
    assert above[20:].mean() > 0.99
    assert plain[20:].mean() < above[20:].mean()
