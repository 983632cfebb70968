"""Tests of the combination: Eq 12 worked out by hand, its switches, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from megatron_hydra.errors import UserError
from megatron_hydra.schema import from_json
from megatron_hydra.selection.combination import (
    NOTABLE_EFFECT,
    Combination,
    capability_scores,
    combine,
)


def heads(*values: float) -> np.ndarray:
    """A model of one layer."""
    return np.array([values], dtype=np.float64)


CAPABILITIES = {"needle_1": "retrieval", "needle_2": "retrieval", "repeat": "copy"}
MEANS = {
    "receiver": {
        "needle_1": heads(0.6, 0.0, 0.016),
        "needle_2": heads(0.0, -0.1, 0.0),
        "repeat": heads(0.0, 0.2, -0.1),
    },
    "sender": {
        "needle_1": heads(0.1, 0.5, 0.0),
        "needle_2": heads(0.009, 0.3, 0.0),
    },
}
PAPER = Combination(("receiver", "sender"))
# Retrieval: mean |effect| of the receivers (0.3, 0.05, 0.008), of the senders (0.0545, 0.4, 0).
STRENGTH = (0.3, 0.4, 0.008)
# Head 0 is notable on needle_1 alone (0.009 is too small), head 1 on both, head 2 on needle_1.
KAPPA = (0.5, 1.0, 0.5)


def combined(**switches: Any) -> np.ndarray:
    return combine(MEANS, CAPABILITIES, dataclasses.replace(PAPER, **switches))[0]


def test_equation_12_by_hand() -> None:
    retrieval, copy = capability_scores(MEANS, CAPABILITIES, PAPER).values()
    # 0.15, 0.4 and 0.004, from the least to the largest.
    np.testing.assert_allclose(retrieval, heads(0.146 / 0.396, 1.0, 0.0))
    np.testing.assert_allclose(copy, heads(0.0, 1.0, 0.5))  # the sender has no such sub-probe
    np.testing.assert_allclose(combined(), [0.146 / 0.396 / 2, 1.0, 0.25])


def test_each_switch_changes_its_step_alone() -> None:
    without_kappa = capability_scores(
        MEANS, CAPABILITIES, dataclasses.replace(PAPER, consistency=False)
    )
    np.testing.assert_allclose(without_kappa["retrieval"], heads(0.292 / 0.392, 1.0, 0.0))

    raw = capability_scores(MEANS, CAPABILITIES, dataclasses.replace(PAPER, normalise=False))
    np.testing.assert_allclose(raw["retrieval"], heads(*np.multiply(STRENGTH, KAPPA)))
    np.testing.assert_allclose(raw["copy"], heads(0.0, 0.2, 0.1))

    np.testing.assert_allclose(
        combined(consistency=False, normalise=False), np.add(STRENGTH, (0.0, 0.2, 0.1)) / 2
    )


def test_a_scorer_left_out_counts_neither_for_strength_nor_for_consistency() -> None:
    receiver = Combination(("receiver",), normalise=False)
    found = capability_scores(MEANS, CAPABILITIES, receiver)["retrieval"]
    np.testing.assert_allclose(found, heads(0.3 * 0.5, 0.05 * 0.5, 0.008 * 0.5))
    # Alone, the sender has nothing to say of copying: the capability does not enter at all.
    sender = Combination(("sender",), normalise=False)
    np.testing.assert_allclose(combine(MEANS, CAPABILITIES, sender), heads(0.0545 * 0.5, 0.4, 0.0))


def test_weights_are_relative_and_1_where_absent() -> None:
    np.testing.assert_allclose(combined(weights={"copy": 3.0}), [0.146 / 0.396 / 4, 1.0, 0.375])
    np.testing.assert_allclose(combined(weights={"copy": 0}), [0.146 / 0.396, 1.0, 0.0])
    doubled = combined(weights={"copy": 2.0, "retrieval": 2})
    np.testing.assert_allclose(doubled, combined())


def test_an_effect_of_the_threshold_is_notable_whatever_its_sign() -> None:
    means = {"s": {"p": heads(NOTABLE_EFFECT, -NOTABLE_EFFECT, NOTABLE_EFFECT * 0.999)}}
    found = combine(means, {"p": "c"}, Combination(("s",), normalise=False))
    np.testing.assert_allclose(found, heads(NOTABLE_EFFECT, NOTABLE_EFFECT, 0.0))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("consistency", [True, False])
def test_resamples_in_front_equal_a_loop_over_them(consistency: bool, normalise: bool) -> None:
    generator = np.random.default_rng(0)
    means = {
        scorer: {name: generator.normal(0, 0.02, (2, 5, 3, 4)) for name in by_probe}
        for scorer, by_probe in MEANS.items()
    }
    switches = Combination(("receiver", "sender"), consistency, normalise, {"copy": 0.5})
    found = combine(means, CAPABILITIES, switches)
    assert found.shape == (2, 5, 3, 4)
    for index in np.ndindex(2, 5):
        one = {s: {p: values[index] for p, values in by.items()} for s, by in means.items()}
        np.testing.assert_allclose(found[index], combine(one, CAPABILITIES, switches))


def test_a_constant_map_scores_0_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    found = combine({"s": {"p": heads(0.3, 0.3)}}, {"p": "retrieval"}, Combination(("s",)))
    assert found.tolist() == [[0.0, 0.0]]
    assert "all heads score 0.3 for retrieval: none stands out" in caplog.text


@pytest.mark.parametrize(
    ("switches", "sentence"),
    [
        ({"scorers": ("receiver", "zero")}, "names scorer 'zero', but the effects are of receiver"),
        ({"scorers": ()}, "the combination names no scorer"),
        ({"weights": {"coding": 1.0}}, "capability 'coding'; the scores have: copy, retrieval"),
        ({"weights": {"copy": -1.0}}, r"weights\.copy is -1.0; it must be 0 or more"),
        ({"weights": {"copy": float("nan")}}, r"weights\.copy is nan; a number is needed"),
        ({"weights": {"copy": float("inf")}}, r"weights\.copy is inf; a number is needed"),
        ({"weights": {"copy": True}}, r"weights\.copy is True; a number is needed"),
        ({"weights": {"copy": "1"}}, r"weights\.copy is '1'; a number is needed"),
        ({"weights": {"copy": 0, "retrieval": 0.0}}, "weights of all capabilities are 0"),
    ],
)
def test_bad_switches_are_explained(switches: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        combined(**switches)


def test_a_combination_survives_json() -> None:
    switches = Combination(("a", "b"), False, True, {"copy": 0.5})
    values = dataclasses.asdict(switches)
    assert from_json(Combination, values, "it") == switches
    assert from_json(Combination, json.loads(json.dumps(values)), "it") == switches


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"surprise": 1}, "unknown key surprise; known here: scorers, consistency"),
        ({"scorers": "receiver"}, "scorers is 'receiver'; a list is needed"),
        ({"weights": [1.0]}, r"weights is \[1.0\]; a JSON object is needed"),
        ({"consistency": "false"}, "consistency is 'false'; true or false is needed"),
        ({"normalise": 1}, "normalise is 1; true or false is needed"),
    ],
)
def test_a_malformed_combination_is_explained(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        from_json(Combination, dataclasses.asdict(PAPER) | change, "it")
