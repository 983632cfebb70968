"""`inspect`: what a head plan keeps and costs, how sure its choice is, and another beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_hydra.errors import UserError
from megatron_hydra.files import check_outputs
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.budget import Budget, Constraints
from megatron_hydra.selection.comparison import PlanComparison, compare_plans
from megatron_hydra.selection.cost import Costs, ServeDtype, costs_of
from megatron_hydra.selection.explanation import Explanation
from megatron_hydra.selection.pareto import ParetoTable
from megatron_hydra.selection.policy import (
    DEFAULT_CONTEXT_TOKENS,
    read_budget,
    read_constraints,
    read_explanation,
    read_shape,
    scores_as_planned,
    weakness,
)
from megatron_hydra.selection.scores import HeadScores
from megatron_hydra.selection.shape import ModelShape


@dataclass(frozen=True)
class Inspection:
    """All that a plan's file tells.

    Attributes:
        plan: The plan.
        scores: That it was made from, combined as it says; None if they were not given.
        shape: The teacher's sizes; None where neither plan nor scores say them.
        budget: That it was made for; None of a plan written by hand.
        constraints: That it was made within; None of a plan written by hand.
        warning: A sentence if it keeps no head, or all heads of some layer; else None.
        costs: The hybrid's and the teacher's, where the sizes are known.
        explanation: Why its heads were chosen; None of a plan written by hand.
        left_out: The best heads that are not FA, best first: layer, head, score.
        comparison: With another plan; None if none was given.
    """

    plan: HeadPlan
    scores: HeadScores | None
    shape: ModelShape | None
    budget: Budget | None
    constraints: Constraints | None
    warning: str | None
    costs: tuple[Costs, Costs] | None
    explanation: Explanation | None
    left_out: tuple[tuple[int, int, float], ...]
    comparison: PlanComparison | None


def inspect(
    plan: Path,
    scores: Path | None = None,
    against: Path | None = None,
    *,
    context_tokens: int | None = None,
    device: str | None = None,
    serve_dtype: ServeDtype | None = None,
) -> Inspection:
    """Read a plan and work out what it costs.

    Args:
        plan: What :func:`~megatron_hydra.api.plan.plan` wrote, or a file written by hand.
        scores: Those it was made from; they know the teacher's sizes where the plan does not.
        against: Another plan to compare it with.
        context_tokens: Of the sequence at which costs are told. This and what follows are None for
            what the plan's budget was counted at, or the defaults.
        device: For which times are predicted, see :mod:`megatron_hydra.selection.cost`.
        serve_dtype: Number format of weights and caches.

    Raises:
        UserError: If a file cannot be read, or the scores are not the plan's.
    """
    found = HeadPlan.load(plan)
    own = None if scores is None else scores_as_planned(HeadScores.load(scores), found)
    budget = read_budget(found)
    counted_at = budget or Budget("fa_heads", 0)
    where = (
        context_tokens or counted_at.context_tokens or DEFAULT_CONTEXT_TOKENS,
        device or counted_at.device,
        serve_dtype or counted_at.serve_dtype,
    )
    shape = read_shape(found) or (own.shape if own else None)
    constraints = read_constraints(found)
    costs = None
    if shape is not None:
        costs = costs_of(shape, found, *where), costs_of(shape, None, *where)
    explanation = read_explanation(found)
    return Inspection(
        plan=found,
        scores=own,
        shape=shape,
        budget=budget,
        constraints=constraints,
        warning=weakness(found, shape, budget, constraints or Constraints()),
        costs=costs,
        explanation=explanation,
        left_out=() if explanation is None else _left_out(found, explanation),
        comparison=None
        if against is None
        else compare_plans(found, HeadPlan.load(against), *where),
    )


def draw(
    found: Inspection,
    folder: Path,
    pareto: Path | None = None,
    *,
    keep: Sequence[Path | None] = (),
    overwrite: bool = False,
) -> list[Path]:
    """Write the pictures of a plan's choice; return their paths.

    Args:
        found: What :func:`inspect` returned, with scores.
        folder: For the pictures.
        pareto: What :func:`~megatron_hydra.api.pareto.pareto` wrote, for one more picture.
        keep: Files that were read, onto which no picture may be written.
        overwrite: Replace existing pictures.

    Raises:
        UserError: Without scores, or if a picture exists or cannot be written.
    """
    if found.scores is None:
        raise UserError("pictures need the scores that the plan was made from")
    # matplotlib takes a while to import.
    from megatron_hydra.report.pictures import PICTURES, save_selection_pictures

    check_outputs([folder / name for name in PICTURES], (*keep, pareto))
    table = None if pareto is None else ParetoTable.load(pareto)
    return list(save_selection_pictures(folder, found.scores, found.plan, overwrite, table))


def _left_out(plan: HeadPlan, explanation: Explanation) -> tuple[tuple[int, int, float], ...]:
    scores = np.array(explanation.scores)
    is_fa = np.array([[kind == "fa" for kind in layer.kinds] for layer in plan.layers])
    order = np.lexsort((is_fa.ravel(), -np.where(is_fa, -np.inf, scores).ravel()))
    best = [np.unravel_index(i, scores.shape) for i in order[: (~is_fa).sum()]]
    return tuple((int(layer), int(head), float(scores[layer, head])) for layer, head in best)
