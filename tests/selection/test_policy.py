"""Tests of the policy: budgets and their errors, reasons, how sure, provenance, random control."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit.scores import make_scores

from megatron_hydra import cpu
from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.schema import from_json
from megatron_hydra.selection.budget import Budget, Constraints
from megatron_hydra.selection.combination import Combination
from megatron_hydra.selection.explanation import Explanation
from megatron_hydra.selection.policy import (
    PlanSummary,
    choose_plan,
    plan_from_scores,
    random_plan,
    read_explanation,
    read_shape,
)
from megatron_hydra.selection.scores import HeadScores

cpu.install_if_needed()


def chosen(plan: HeadPlan) -> list[tuple[int, int]]:
    return [(index, head) for index, layer in enumerate(plan.layers) for head in layer.fa_heads]


def plan_heads(rows: Sequence[Sequence[float]], number: int, **asked: Any) -> PlanSummary:
    scores = make_scores(rows, num_query_groups=asked.pop("num_query_groups", None))
    return plan_from_scores(scores, Budget("fa_heads", number), Constraints(**asked))


def reasons(summary: PlanSummary) -> dict[tuple[int, int], str]:
    return {(head.layer, head.head): head.reason for head in summary.explanation.heads}


def noisy_scores(num_pairs: int = 12, spread: float = 0.3) -> HeadScores:
    """Head 0.0 stands out, 0.1 and 1.0 are alike, the others have small effects."""
    generator = np.random.default_rng(5)
    means = np.array([[1.0, 0.4, 0.0, 0.0], [0.4, 0.02, 0.0, 0.0]])
    noise = generator.normal(0, spread, (num_pairs, 2, 4)) * (means + 0.02)
    return make_scores(means + noise - noise.mean(axis=0) * (means == 0.4))


def test_layer_minimum_displaces_the_weakest_of_other_layers() -> None:
    rows = [[0.9, 0.8, 0.7, 0.6], [0.3, 0.2, 0.1, 0.05]]
    assert chosen(plan_heads(rows, 3).plan) == [(0, 0), (0, 1), (0, 2)]
    summary = plan_heads(rows, 3, min_fa_per_layer=1)
    assert chosen(summary.plan) == [(0, 0), (0, 1), (1, 0)]
    assert reasons(summary) == {(0, 0): "score", (0, 1): "score", (1, 0): "constraint"}
    assert summary.explanation.num_tie_filled == 0
    assert reasons(plan_heads(rows, 4, per_layer=2))[1, 1] == "constraint"


def test_whole_groups_and_multiples_are_a_reason() -> None:
    rows = [[0.9, 0.1, 0.2, 0.3], [0.8, 0.7, 0.0, 0.0]]
    summary = plan_heads(rows, 4, whole_groups=True)
    assert reasons(summary) == {
        (0, 0): "score",
        (0, 1): "constraint",
        (1, 0): "score",
        (1, 1): "score",
    }
    rows = [[0.9, 0.5, 0.0, 0.0], [0.8, 0.7, 0.6, 0.0]]
    assert reasons(plan_heads(rows, 4)) == dict.fromkeys([(0, 0), (1, 0), (1, 1), (1, 2)], "score")
    summary = plan_heads(rows, 4, multiple_of=2)
    assert reasons(summary)[0, 1] == "constraint"
    assert (1, 2) not in reasons(summary)


def test_under_a_cache_budget_a_stored_group_keeps_what_has_a_score_and_no_more() -> None:
    """A second head of a stored group costs no cache, but FLOPs: without a score it stays LA."""
    scores = make_scores([[0.9, 0.1, 0.8, 0.0], [0.7, 0.0, 0.3, 0.2]], num_query_groups=2)
    summary = plan_from_scores(scores, Budget("kv_cache_ratio", Fraction(3, 4)))
    assert reasons(summary) == {
        (0, 0): "score",
        (0, 1): "constraint",
        (0, 2): "score",
        (1, 0): "score",
    }
    scores = make_scores([[0.9, 0.1, 0.2, 0.2], [0.3, 0.0, 0.0, 0.0]], num_query_groups=2)
    summary = plan_from_scores(scores, Budget("kv_cache_ratio", Fraction(1, 2)), Constraints(1))
    assert reasons(summary) == {(0, 0): "score", (0, 1): "constraint", (1, 0): "score"}


def test_heads_without_evidence_are_ordered_by_effect_size_then_index() -> None:
    """An effect that is not notable in any sub-probe gives score 0, but orders the heads."""
    effects = np.array([[[0.001, 0.5, 0.003, 0.001]]])
    plain = Combination(("s",), normalise=False)
    scores = make_scores({"s": {"p": effects}}, combination=plain)
    summary = plan_from_scores(scores, Budget("fa_heads", 3))
    assert chosen(summary.plan) == [(0, 0), (0, 1), (0, 2)]
    assert summary.explanation.num_without_evidence == 2
    assert summary.explanation.num_tie_filled == 2
    assert reasons(summary) == {(0, 0): "tie", (0, 1): "score", (0, 2): "tie"}
    assert [head.rank for head in summary.explanation.heads] == [3, 1, 2]
    summary = plan_from_scores(scores, Budget("fa_heads", 2))
    assert chosen(summary.plan) == [(0, 1), (0, 2)]


def test_ties_above_zero_are_counted_too() -> None:
    summary = plan_heads([[0.9, 0.5, 0.5, 0.5]], 3)
    assert chosen(summary.plan) == [(0, 0), (0, 1), (0, 2)]
    assert summary.explanation.num_tie_filled == 2
    assert summary.explanation.num_without_evidence == 0
    assert plan_heads([[0.9, 0.5, 0.5, 0.5]], 4).explanation.num_tie_filled == 0


def test_a_head_held_by_its_layer_is_no_tie_with_another_layer() -> None:
    rows = [[0.9, 0.8], [0.8, 0.1]]
    assert plan_heads(rows, 2, min_fa_per_layer=1).explanation.num_tie_filled == 0
    assert plan_heads(rows, 2).explanation.num_tie_filled == 1


def test_whole_groups_tie_as_groups_and_within_limits() -> None:
    rows = [[0.6, 0.2, 0.4, 0.4]]
    assert plan_heads(rows, 2, whole_groups=True).explanation.num_tie_filled == 2
    assert plan_heads(rows, 2).explanation.num_tie_filled == 1  # a head of 0.4 for the other
    scores = make_scores([[0.5, 0.5, 0.5, 0.0]], num_query_groups=2)
    summary = plan_from_scores(scores, Budget("kv_cache_ratio", Fraction(1, 2)))
    assert chosen(summary.plan) == [(0, 0), (0, 1)]
    assert summary.explanation.num_tie_filled == 0, "a swap would store both groups"


def test_kept_share_is_of_the_sum_of_scores() -> None:
    explanation = plan_heads([[0.5, 0.3, 0.2, 0.0]], 2).explanation
    assert explanation.kept_share == pytest.approx(0.8)
    assert explanation.kept_interval is None, "one pair carries no uncertainty"
    assert plan_heads([[0.0, 0.0]], 1).explanation.kept_share == 1


def test_resamples_say_which_heads_would_be_chosen_again() -> None:
    scores = noisy_scores()
    summary = plan_from_scores(scores, Budget("fa_heads", 2))
    first, second = summary.explanation.heads
    assert (first.layer, first.head, first.chosen_again) == (0, 0, 1.0)
    assert second.chosen_again is not None and 0.3 < second.chosen_again < 0.7, "one of two alike"
    assert summary.explanation.num_sure == 1
    assert first.above_noise_floor and first.interval is not None
    assert first.interval[0] < first.score < first.interval[1]
    assert summary.explanation.num_solved == summary.explanation.num_resamples == 1000
    all_heads = plan_from_scores(scores, Budget("fa_heads", 8)).explanation
    assert {head.chosen_again for head in all_heads.heads} == {1.0}
    assert 0 < all_heads.num_below_noise_floor < 6
    assert all_heads.kept_interval == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize("solver", ["exact", "greedy"])
def test_resamples_are_solved_under_limits_too(solver: Any) -> None:
    budget = Budget("kv_cache_ratio", Fraction(1, 2))
    summary = plan_from_scores(noisy_scores(), budget, solver=solver, num_resamples=50)
    shares = {(h.layer, h.head): h.chosen_again for h in summary.explanation.heads}
    assert shares[0, 0] == 1.0 and shares[1, 0] == 1.0, "each is the best of its group by far"
    assert summary.explanation.num_solved == 50


def test_seeds_repeat_and_differ() -> None:
    def shares(seed: int) -> list[float | None]:
        summary = plan_from_scores(noisy_scores(), Budget("fa_heads", 2), seed=seed)
        return [head.chosen_again for head in summary.explanation.heads]

    assert shares(1) == shares(1) != shares(2)


def test_the_file_explains_itself(tmp_path: Path) -> None:
    scores = dataclasses.replace(noisy_scores(), teacher_weights_hash="feed")
    budget = Budget("cache_gib", 1.8e-5, 128)
    constraints = Constraints(min_fa_per_layer=1)
    summary = plan_from_scores(scores, budget, constraints, num_resamples=40)
    summary.plan.save(tmp_path / "plan.json")
    plan = HeadPlan.load(tmp_path / "plan.json")
    assert plan.layers == summary.plan.layers
    assert plan.teacher_config_hash == scores.teacher_config_hash
    assert read_explanation(plan) == summary.explanation
    assert read_shape(plan) == scores.shape
    made_by = plan.provenance
    assert made_by["teacher_weights_hash"] == "feed"
    assert from_json(Budget, made_by["budget"], "it") == budget
    assert Constraints(**made_by["constraints"]) == constraints
    assert made_by["costs"]["plan"]["context_tokens"] == 128
    assert from_json(Combination, made_by["combination"], "it") == scores.combination
    head = summary.explanation.heads[0]
    mean = scores.mean_effects("scorer", "probe")[head.layer, head.head]
    assert head.effects == {"scorer": [pytest.approx(mean, rel=1e-3)]}
    np.testing.assert_allclose(summary.explanation.scores, scores.scores)


def test_plans_by_hand_explain_nothing() -> None:
    plan = HeadPlan.from_fa_heads({0: [1]}, 1, 2, 1)
    assert read_explanation(plan) is None and read_shape(plan) is None


def spoiled(plan: HeadPlan, key: str, value: object) -> HeadPlan:
    provenance = json.loads(json.dumps(plan.provenance))
    return HeadPlan(plan.layers, plan.num_query_groups, "", {**provenance, key: value})


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (3, " is 3; a JSON object is needed"),
        ({}, ": key heads is missing"),
        ({"heads": [{"layer": 1}]}, r": key heads\[0\]\.head is missing"),
    ],
)
def test_malformed_explanations_are_refused(value: object, sentence: str) -> None:
    plan = spoiled(plan_heads([[0.1, 0.2]], 1).plan, "explanation", value)
    with pytest.raises(UserError, match=f"^the explanation in the head plan{sentence}$"):
        read_explanation(plan)


def test_a_shape_that_contradicts_the_plan_is_refused() -> None:
    plan = plan_heads([[0.1, 0.2]], 1).plan
    shape: Mapping[str, Any] = plan.provenance["shape"]
    with pytest.raises(UserError, match="the teacher has 2 layers"):
        read_shape(spoiled(plan, "shape", {**shape, "num_layers": 2}))
    with pytest.raises(
        UserError, match="shape in the head plan: unknown key layers: did you mean num_layers"
    ):
        read_shape(spoiled(plan, "shape", {"layers": 2}))


def test_summary_counts_heads() -> None:
    summary = plan_heads([[1, 1, 0, 0], [1, 0, 1, 0]], 4)
    assert summary.fa_heads_per_layer == (2, 2)


@pytest.mark.parametrize(
    ("ratio", "num_heads", "asked", "expected", "asked_for"),
    [
        (Fraction(1, 4), 8, {}, 4, None),
        (Fraction(1, 3), 8, {}, 5, Fraction(16, 3)),
        (Fraction(1, 32), 8, {}, 1, Fraction(1, 2)),
        (Fraction(1), 8, {}, 16, None),
        (Fraction(1, 3), 8, {"whole_groups": True}, 6, Fraction(16, 3)),
        (Fraction(1, 3), 8, {"multiple_of": 4}, 4, Fraction(16, 3)),
    ],
)
def test_ratio_is_rounded_to_heads_that_are_possible_and_says_so(
    ratio: Fraction,
    num_heads: int,
    asked: dict[str, Any],
    expected: int,
    asked_for: Fraction | None,
) -> None:
    scores = make_scores(np.ones((2, num_heads)))
    summary = plan_from_scores(scores, Budget("fa_ratio", ratio), Constraints(**asked))
    assert (summary.plan.num_fa_heads, summary.asked_for) == (expected, asked_for)


@pytest.mark.parametrize(
    ("budget", "asked", "sentence"),
    [
        (("fa_ratio", Fraction(0)), {}, "ratio of FA heads 0 must be above 0 and at most 1"),
        (("fa_ratio", Fraction(3, 2)), {}, "ratio of FA heads 3/2 must be above 0 and at most 1"),
        (("fa_ratio", Fraction(1, 100)), {}, "ratio 1/100 of 12 heads is less than half a head"),
        (("fa_ratio", Fraction(1, 100)), {"multiple_of": 2}, "less than half the 2 heads"),
        (("fa_heads", 13), {}, "13 FA heads asked for, but the model has 12 heads"),
        (("fa_heads", -1), {}, "-1 FA heads asked for"),
        (("fa_heads", 2), {"min_fa_per_layer": 1}, "cannot give 1 to each of 3 layers: .* 3"),
        (("fa_heads", 12), {"min_fa_per_layer": 5}, "but a layer has 4"),
        (
            ("fa_heads", 12),
            {"min_fa_per_layer": -1},
            "min_fa_per_layer is -1; it must be 0 or more",
        ),
        (("fa_heads", 7), {"per_layer": 2}, "too large for 2 in each of 3 layers: that makes 6"),
        (("fa_heads", 5), {"per_layer": 2}, "cannot give 2 to each of 3 layers"),
        (("fa_heads", 4), {"per_layer": -1}, "per_layer is -1; it must be 0 or more"),
        (("fa_heads", 6), {"per_layer": 2, "min_fa_per_layer": 3}, "contradict at least 3"),
        (("fa_heads", 3), {"per_layer": 1, "whole_groups": True}, "a multiple of 2 can be FA"),
        (("fa_heads", 7), {"whole_groups": True}, "2 at a time .* ask for 6 or 8"),
        (("fa_heads", 10), {"multiple_of": 3}, "too large for 3 in each of 3 layers"),
        (("fa_heads", 4), {"multiple_of": 0}, "multiple_of is 0; it must be 1 or more"),
        (("kv_cache_ratio", Fraction(2)), {}, "ratio of the KV cache 2 must be above 0"),
        (("kv_cache_ratio", Fraction(1, 10)), {}, "less than one group: 1/6 is the least"),
        (("kv_cache_ratio", Fraction(1, 3)), {"per_layer": 1}, "the least possible is 1/2"),
        (("cache_gib", 1.0), {}, "needs a context length"),
        (
            ("cache_gib", 0.0, 100),
            {},
            r"0 GiB of cache and state at 100 tokens \(bf16\) must be above 0",
        ),
        (("cache_gib", 1e-6, 100), {}, "no plan keeps to 1e-06 GiB .*: the least .* [0-9.e-]+ GiB"),
        (("decode_ms", 1e-9, 100), {}, "no plan keeps to 1e-09 ms .*: the least possible is"),
        (("decode_ms", float("nan"), 100), {}, "nan ms per decoded token"),
        (("layers", 3), {}, "kind is 'layers'; allowed: fa_heads, fa_ratio"),
    ],
)
def test_budgets_that_cannot_be_met_are_explained(
    budget: tuple[Any, ...], asked: dict[str, Any], sentence: str
) -> None:
    scores = make_scores(np.ones((3, 4)))
    with pytest.raises(UserError, match=sentence):
        plan_from_scores(scores, Budget(*budget), Constraints(**asked))


@pytest.mark.parametrize("kind", ["cache_gib", "decode_ms"])
@pytest.mark.parametrize("context", [1, 1000])
def test_the_least_that_is_said_to_be_possible_is(kind: Any, context: int) -> None:
    scores, constraints = make_scores(np.ones((3, 4))), Constraints(min_fa_per_layer=2)
    with pytest.raises(UserError) as error:
        plan_from_scores(scores, Budget(kind, 1e-12, context), constraints)
    least = float(str(error.value).split()[-2])
    assert choose_plan(scores, Budget(kind, least, context), constraints).num_fa_heads >= 6
    with pytest.raises(UserError, match="no plan keeps to"):
        plan_from_scores(scores, Budget(kind, 0.99 * least, context), constraints)


def test_greedy_says_that_another_solver_may_do_better() -> None:
    """Each layer's best two heads are in two groups; the budget has room for one per layer."""
    scores = make_scores([[0.9, 0.1, 0.8, 0.0]] * 2, num_query_groups=2)
    budget, constraints = Budget("kv_cache_ratio", Fraction(1, 2)), Constraints(per_layer=2)
    assert chosen(choose_plan(scores, budget, constraints)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    with pytest.raises(UserError, match="the greedy solver finds no plan .* but there is one"):
        choose_plan(scores, budget, constraints, "greedy")


@pytest.mark.parametrize("seed", range(2))
def test_random_plans_keep_to_every_kind_of_budget(seed: int) -> None:
    scores, constraints = make_scores(np.ones((3, 8))), Constraints(min_fa_per_layer=1)
    budgets = [
        Budget("fa_heads", 6),
        Budget("kv_cache_ratio", Fraction(1, 2)),
        Budget("cache_gib", 3e-5, 100),
    ]
    for budget in budgets:
        summary = random_plan(scores, budget, constraints, seed=seed)
        assert all(layer.fa_heads for layer in summary.plan.layers)
        counts = summary.plan.num_fa_heads, sum(len(summary.plan.fa_groups(i)) for i in range(3))
        assert budget.problem(scores.shape, constraints).allows(*counts)
        assert {head.reason for head in summary.explanation.heads} == {"random"}
        assert summary.plan.provenance["policy"] == "random"


def test_random_plans_follow_their_seed_and_give_each_head_its_chance() -> None:
    scores, budget = make_scores(np.ones((3, 8)), teacher_config_hash="abc"), Budget("fa_heads", 6)
    plans = [random_plan(scores, budget, seed=seed).plan for seed in range(20)]
    assert random_plan(scores, budget, seed=7).plan.layers == plans[7].layers
    assert plans[7].teacher_config_hash == "abc"
    assert len({plan.layers for plan in plans}) == 20
    counts = [sum((0, head) in chosen(plan) for plan in plans) for head in range(8)]
    assert min(counts) > 0
    with pytest.raises(UserError, match="cannot give 3 to each of 3 layers"):
        random_plan(scores, budget, Constraints(min_fa_per_layer=3), seed=0)


def key_rows(plan: HeadPlan | None) -> int:
    """Rows that project keys in a built model: what its cache stores of a token, in values."""
    from kit.tiny import tiny_config

    from megatron_hydra.model.build import build_model
    from megatron_hydra.parallel import initialize_model_parallel

    initialize_model_parallel()
    rows = 0
    for layer in build_model(tiny_config(), plan).decoder.layers:
        attention = layer.self_attention
        if plan is None:  # query, key and value of 8 heads in 4 groups of 8 channels
            rows += (attention.linear_qkv.weight.shape[0] - 8 * 8) // 2
        else:
            keys = next(s for s in attention.layout.sections if s.name == "fa_key")
            rows += len(keys.units) * keys.width
    return rows


def test_whole_groups_reach_the_cache_they_promise_in_the_built_model() -> None:
    """And heads chosen without regard to groups store more, at the same number of heads."""
    scores = make_scores(np.random.default_rng(2).random((2, 8)), num_query_groups=4)
    quarter, whole = Fraction(1, 4), Constraints(whole_groups=True)
    by_heads = choose_plan(scores, Budget("fa_ratio", quarter), whole)
    by_cache = choose_plan(scores, Budget("kv_cache_ratio", quarter), whole)
    blind = choose_plan(scores, Budget("fa_ratio", quarter), Constraints())
    assert by_heads.num_fa_heads == by_cache.num_fa_heads == blind.num_fa_heads == 4
    assert key_rows(by_heads) == key_rows(by_cache) == key_rows(None) / 4
    assert key_rows(blind) > key_rows(None) / 4


def test_an_explanation_without_uncertainty_says_nothing_of_it() -> None:
    explanation: Explanation = plan_heads([[0.5, 0.3]], 1).explanation
    assert explanation.num_sure is None and explanation.num_resamples == 0
    assert explanation.split_half is None and explanation.no_split_half
    assert explanation.heads[0].interval is None and explanation.heads[0].chosen_again is None
