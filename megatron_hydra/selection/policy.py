"""The policy: head scores, a budget and constraints become a head plan that explains itself."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from megatron_hydra.errors import UserError
from megatron_hydra.files import versions
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.mixers.costs import WINDOW_KIND
from megatron_hydra.schema import Config, from_json
from megatron_hydra.selection.budget import Budget, Constraints, Problem
from megatron_hydra.selection.combination import Array, Combination
from megatron_hydra.selection.cost import SERVE_DTYPES, costs_of
from megatron_hydra.selection.explanation import (
    FORMER_REASONS,
    NUM_RESAMPLES,
    Explanation,
    explain,
)
from megatron_hydra.selection.optimiser import Head, Solver, choose_heads, least_excess
from megatron_hydra.selection.scores import HeadScores
from megatron_hydra.selection.shape import ModelShape
from megatron_hydra.selection.windows import choose_windows

DEFAULT_CONTEXT_TOKENS = 32768
"""Where costs are told when a budget names no length."""


@dataclass(frozen=True)
class PlanSummary:
    """A plan, and what a reader should know of it beside its heads.

    Attributes:
        plan: The plan; its provenance holds all of this.
        shape: Sizes of the teacher.
        budget: The budget that it meets.
        constraints: The constraints that it keeps to.
        explanation: Why each head is there.
    """

    plan: HeadPlan
    shape: ModelShape
    budget: Budget
    constraints: Constraints
    explanation: Explanation

    @property
    def fa_heads_per_layer(self) -> tuple[int, ...]:
        """Number of FA heads of each layer."""
        return tuple(len(layer.fa_heads) for layer in self.plan.layers)

    @property
    def asked_for(self) -> Fraction | None:
        """The exact number of heads that a ratio stands for, when it was rounded."""
        if self.budget.kind != "fa_ratio":
            return None
        exact = Fraction(self.budget.amount) * self.shape.total_heads
        return None if exact == self.plan.num_fa_heads else exact


def plan_from_scores(
    scores: HeadScores,
    budget: Budget,
    constraints: Constraints = Constraints(),
    *,
    solver: Solver = "exact",
    window_ratio: Fraction = Fraction(0),
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> PlanSummary:
    """Keep full attention in the heads that hold most of the scores' sum.

    How scores, ties and limits are read, see
    :func:`~megatron_hydra.selection.optimiser.choose_heads`. A least number per layer is the
    paper's Global-Interp-C.

    Args:
        scores: Of every head.
        budget: What the plan may keep.
        constraints: Of each layer.
        solver: `exact`, or `greedy` to compare.
        window_ratio: Share of all heads that become sliding windows, see
            :func:`~megatron_hydra.selection.windows.choose_windows`.
        seed: Of the resamples that say how sure the choice is.
        num_resamples: How many.

    Raises:
        UserError: If no plan keeps to the budget; says what is possible.
    """
    problem, chosen = _choose(scores, budget, constraints, solver)

    def choose(problem: Problem, values: Array, effect_size: Array) -> frozenset[Head] | None:
        return choose_heads(problem, values, effect_size, solver)

    explanation = explain(scores, problem, chosen, choose, seed, num_resamples)
    made_by = {"policy": "highest_scores", "solver": solver, "resamples_seed": seed}
    windows = choose_windows(scores, chosen, window_ratio, budget) if window_ratio else {}
    return _summary(scores, chosen, budget, constraints, explanation, made_by, windows)


def choose_plan(
    scores: HeadScores, budget: Budget, constraints: Constraints, solver: Solver = "exact"
) -> HeadPlan:
    """The plan of :func:`plan_from_scores` without its explanation, which takes longer."""
    _, chosen = _choose(scores, budget, constraints, solver)
    return _make_plan(scores, chosen, {})


def random_plan(
    scores: HeadScores,
    budget: Budget,
    constraints: Constraints = Constraints(),
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> PlanSummary:
    """The control for a scorer: the same budget and constraints for scores drawn at random.

    Args:
        scores: Say what the plan keeps of the true scores; they decide nothing.
        budget: What the plan may keep.
        constraints: Of each layer.
        seed: Of the drawn scores, and of the resamples.
        num_resamples: How many.

    Raises:
        UserError: As :func:`plan_from_scores`.
    """
    shape = scores.shape
    problem = budget.problem(shape, constraints)
    draw = random.Random(seed)
    drawn = [[1 - draw.random() for _ in range(shape.num_heads)] for _ in range(shape.num_layers)]
    values = np.array(drawn)
    chosen = choose_heads(problem, values, np.zeros_like(values))
    if chosen is None:
        raise UserError(_impossible(budget, problem, "exact"))
    explanation = explain(scores, problem, chosen, None, seed, num_resamples)
    return _summary(
        scores, chosen, budget, constraints, explanation, {"policy": "random", "seed": seed}, {}
    )


def read_explanation(plan: HeadPlan) -> Explanation | None:
    """What the plan's file says of its choice; None for a plan that was written by hand.

    Raises:
        UserError: If it is malformed.
    """
    provenance = copy.deepcopy(plan.provenance)
    with suppress(TypeError, AttributeError, KeyError):  # what is malformed is named below
        for head in provenance["explanation"]["heads"]:
            if head.get("reason") in FORMER_REASONS:
                head["reason"] = "constraint"
    return _entry(Explanation, provenance, "explanation")


def read_shape(plan: HeadPlan) -> ModelShape | None:
    """The teacher's sizes by the plan's file; None for a plan that was written by hand.

    Raises:
        UserError: If they are malformed or contradict the plan.
    """
    shape = _entry(ModelShape, plan.provenance, "shape")
    if shape is not None:
        plan.check_teacher(shape.num_layers, shape.num_heads, shape.num_query_groups, "")
    return shape


def read_constraints(plan: HeadPlan) -> Constraints | None:
    """What the plan's file says it was made within; None for a plan that was written by hand.

    Raises:
        UserError: If it is malformed.
    """
    return _entry(Constraints, plan.provenance, "constraints")


def read_budget(plan: HeadPlan) -> Budget | None:
    """The budget that the plan's file names; None for a plan that was written by hand.

    Raises:
        UserError: If it is malformed.
    """
    budget = _entry(Budget, plan.provenance, "budget")
    if budget is None or budget.kind not in ("cache_gib", "decode_ms"):
        return budget
    if "serve_dtype" in plan.provenance["budget"]:
        return budget
    # Earlier releases counted in the format that the weights had while they were scored.
    shape = plan.provenance.get("shape")
    num_bytes = shape.get("value_bytes") if isinstance(shape, Mapping) else None
    for dtype, size in SERVE_DTYPES.items():
        if size == num_bytes:
            return replace(budget, serve_dtype=dtype)
    raise UserError(
        "the budget in the head plan names no serve_dtype, and its shape no value_bytes: 2 or 4 is "
        "needed"
    )


def weakness(
    plan: HeadPlan, shape: ModelShape | None, budget: Budget | None, constraints: Constraints
) -> str | None:
    """What the hybrid of a plan will do badly, as far as the plan tells; None for most.

    Args:
        plan: The plan.
        shape: Of its teacher.
        budget: That it was made for; with None, or without a shape, no way out is named.
        constraints: That it keeps to.

    Returns:
        One sentence.
    """
    return _no_fa_heads(plan, shape, budget, constraints) or _whole_layers(
        plan, shape, budget, constraints
    )


def _whole_layers(
    plan: HeadPlan, shape: ModelShape | None, budget: Budget | None, constraints: Constraints
) -> str | None:
    """Which layers have FA heads alone, where not all have; what it costs is docs/study.md's."""
    whole = [index for index, layer in enumerate(plan.layers) if {*layer.kinds} == {"fa"}]
    if not whole or len(whole) == plan.num_layers:
        return None
    sentence = (
        f"layer{'s' if len(whole) > 1 else ''} {', '.join(map(str, whole))} would have FA heads "
        "alone: in this project's study (docs/study.md) almost all hybrids with such a layer "
        "lost most of what lies beyond the training length"
    )
    if budget is None or shape is None:
        return sentence
    # The study's hybrids with up to 14 of a layer's 16 heads FA, and others in other layers, lost
    # nothing.
    most = plan.num_heads - max(1, plan.num_heads // 8)
    try:
        budget.problem(shape, replace(constraints, max_fa_per_layer=most))
    except UserError:  # the budget or other constraints leave no such plan
        return sentence
    return f"{sentence}; --max-fa-per-layer {most} leaves every layer other heads"


def _no_fa_heads(
    plan: HeadPlan, shape: ModelShape | None, budget: Budget | None, constraints: Constraints
) -> str | None:
    """What a plan without a single FA head means, and the least budget that keeps one."""
    if plan.num_fa_heads:
        return None
    sentence = (
        "no head keeps full attention: this hybrid can look nothing up beyond what the fixed "
        "state of its LA heads still holds"
    )
    if budget is None or shape is None:
        return sentence
    explanation = read_explanation(plan)
    if budget.kind in ("fa_heads", "fa_ratio"):
        step = constraints.step(shape)
        least = "1 FA head" if step == 1 else f"{step} FA heads"
        possible = constraints.layer_counts(shape)[-1] > 0
    elif explanation is not None and np.max(explanation.scores) <= 0:
        return f"{sentence}; no head has a score above 0, so only --fa-heads would keep one"
    else:
        problem = budget.problem(shape, constraints)
        excess = least_excess(problem, num_fa_heads=1)
        possible = math.isfinite(excess)
        least = _times(budget, problem, excess) if possible else ""
    if not possible:
        return f"{sentence}; {constraints.words} allows none"
    return f"{sentence}; the least budget that keeps one is {least}"


def _choose(
    scores: HeadScores, budget: Budget, constraints: Constraints, solver: Solver
) -> tuple[Problem, frozenset[Head]]:
    problem = budget.problem(scores.shape, constraints)
    chosen = choose_heads(problem, scores.scores, scores.effect_size, solver)
    if chosen is None:
        raise UserError(_impossible(budget, problem, solver))
    return problem, chosen


def _make_plan(
    scores: HeadScores,
    chosen: frozenset[Head],
    windows: Mapping[int, Sequence[int]],
) -> HeadPlan:
    return HeadPlan.from_fa_heads(
        {layer: [h for i, h in sorted(chosen) if i == layer] for layer, _ in chosen},
        scores.num_layers,
        scores.num_heads,
        scores.num_query_groups,
        scores.teacher_config_hash,
        other_kinds={layer: {WINDOW_KIND: heads} for layer, heads in windows.items()},
    )


def _summary(
    scores: HeadScores,
    chosen: frozenset[Head],
    budget: Budget,
    constraints: Constraints,
    explanation: Explanation,
    made_by: Mapping[str, Any],
    windows: Mapping[int, Sequence[int]],
) -> PlanSummary:
    shape, plan = scores.shape, _make_plan(scores, chosen, windows)
    context = budget.context_tokens or DEFAULT_CONTEXT_TOKENS
    provenance = {
        **made_by,
        "budget": budget.to_dict(),
        "constraints": asdict(constraints),
        "shape": asdict(shape),
        "costs": {
            name: asdict(costs_of(shape, of, context, budget.device, budget.serve_dtype))
            for name, of in (("plan", plan), ("teacher", None))
        },
        "combination": asdict(scores.combination),
        "explanation": asdict(explanation),
        "scores": dict(scores.provenance),
        "teacher_weights_hash": scores.teacher_weights_hash,
        "versions": versions(),
    }
    plan = replace(plan, provenance=provenance)
    return PlanSummary(plan, shape, budget, constraints, explanation)


def _impossible(budget: Budget, problem: Problem, solver: Solver) -> str:
    """One sentence on a budget that no plan keeps to: what the least possible one is."""
    excess = least_excess(problem)
    if excess <= 1:
        return f"the {solver} solver finds no plan within {budget.words}, but there is one"
    least = _times(budget, problem, excess)
    asked = problem.constraints.words
    under = f" with {asked}" if asked else ""
    sentence = f"no plan keeps to {budget.words}{under}: the least possible is {least}"
    with_a_head = least_excess(problem, num_fa_heads=1)
    if excess < with_a_head < math.inf:
        sentence += f", and {_times(budget, problem, with_a_head)} with a head on full attention"
    return sentence


def _times(budget: Budget, problem: Problem, excess: float) -> str:
    """So many times the budget, in its unit."""
    if budget.kind == "kv_cache_ratio":
        ((_, groups),) = problem.limits
        return str(Fraction(round(excess * groups), problem.shape.total_groups))
    unit = "GiB" if budget.kind == "cache_gib" else "ms"
    return f"{_round_up(float(budget.amount) * excess)} {unit}"


def _round_up(value: float) -> str:
    """Three digits, not below ``value``."""
    rounded = float(f"{value:.3g}")
    if rounded < value:
        rounded = float(f"{value * 1.005:.3g}")
    return f"{rounded:g}"


def scores_as_planned(scores: HeadScores, plan: HeadPlan) -> HeadScores:
    """The scores in the combination that a plan was made with.

    Raises:
        UserError: If plan and scores are of different teachers.
    """
    plan.check_teacher(
        scores.num_layers, scores.num_heads, scores.num_query_groups, scores.teacher_config_hash
    )
    combination = _entry(Combination, plan.provenance, "combination")
    # Without one the plan was written by hand.
    return scores if combination is None else scores.with_combination(combination)


def _entry(cls: type[Config], provenance: Mapping[str, Any], key: str) -> Config | None:
    """An entry of a plan's provenance; None where a plan that was written by hand has none."""
    found = provenance.get(key)
    return None if found is None else from_json(cls, found, f"the {key} in the head plan")
