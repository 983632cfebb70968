"""The Pareto table: what each of several budgets keeps of the scores, and what it costs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_hydra.errors import UserError
from megatron_hydra.files import read_json, write_json
from megatron_hydra.schema import from_json
from megatron_hydra.selection.budget import Budget, Constraints
from megatron_hydra.selection.cost import Costs, ServeDtype, costs_of
from megatron_hydra.selection.explanation import NUM_RESAMPLES, kept_shares
from megatron_hydra.selection.optimiser import Solver
from megatron_hydra.selection.policy import choose_plan
from megatron_hydra.selection.scores import HeadScores
from megatron_hydra.selection.uncertainty import bootstrap_scores, carries_uncertainty

SCHEMA_VERSION = 1
_FILE_KIND = "pareto_table"


@dataclass(frozen=True)
class ParetoRow:
    """One budget's plan.

    Attributes:
        budget: In words.
        kept_share: Share of the sum of all scores that the plan's FA heads hold.
        kept_interval: 95% of that share if the pairs are drawn again and the plan stays; None if
            the scores carry no uncertainty.
        costs: Of the plan.
        is_dominated: Whether another row keeps as much or more and costs as little or less in
            cache, FLOPs and decode time, and is better in one of these.
    """

    budget: str
    kept_share: float
    kept_interval: tuple[float, float] | None
    costs: Costs
    is_dominated: bool = False


@dataclass(frozen=True)
class ParetoTable:
    """Rows in the order of their budgets, and the teacher's costs, which keeps everything."""

    rows: tuple[ParetoRow, ...]
    teacher: Costs

    def save(
        self, path: str | os.PathLike[str], provenance: dict[str, Any], overwrite: bool = False
    ) -> None:
        """Write the table as JSON.

        Raises:
            UserError: If ``path`` exists and ``overwrite`` is False, or cannot be written.
        """
        data = {"schema_version": SCHEMA_VERSION, "kind": _FILE_KIND, **asdict(self)}
        write_json(path, {**data, "provenance": provenance}, overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ParetoTable:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: If the file cannot be read or is no such table; names the file.
        """
        data = read_json(path, _FILE_KIND, SCHEMA_VERSION)
        teacher = data.get("teacher")
        if isinstance(teacher, dict) and teacher and "serve_dtype" not in teacher:
            raise UserError(
                f"{os.fspath(path)} does not name the number format of its costs, as tables of "
                "earlier releases do not: write it anew with megatron-hydra pareto"
            )
        return from_json(cls, data, os.fspath(path), ("schema_version", "kind", "provenance"))


def pareto_table(
    scores: HeadScores,
    budgets: Sequence[Budget],
    constraints: Constraints,
    context_tokens: int,
    device: str,
    serve_dtype: ServeDtype = "bf16",
    *,
    solver: Solver = "exact",
    num_resamples: int = NUM_RESAMPLES,
) -> ParetoTable:
    """Plan every budget and cost it.

    Args:
        scores: Of every head.
        budgets: One per row.
        constraints: Of each layer, for all rows.
        context_tokens: Where costs are told.
        device: On which times are predicted.
        serve_dtype: Number format of weights and caches.
        solver: `exact` or `greedy`.
        num_resamples: Behind the intervals.

    Raises:
        UserError: If a budget cannot be met; says what is possible.
    """
    samples = None
    if carries_uncertainty(scores):
        samples = bootstrap_scores(scores, num_resamples)
    rows = []
    for budget in budgets:
        plan = choose_plan(scores, budget, constraints, solver)
        interval = None
        if samples is not None:
            low, high = np.quantile(kept_shares(samples, plan), [0.025, 0.975]).tolist()
            interval = (low, high)
        kept = float(kept_shares(scores.scores, plan))
        costs = costs_of(scores.shape, plan, context_tokens, device, serve_dtype)
        rows.append(ParetoRow(budget.words, kept, interval, costs))
    teacher = costs_of(scores.shape, None, context_tokens, device, serve_dtype)
    return ParetoTable(mark_dominated(rows), teacher)


def mark_dominated(rows: Sequence[ParetoRow]) -> tuple[ParetoRow, ...]:
    """The rows with :attr:`ParetoRow.is_dominated` set by comparing each with all others."""
    figures = np.array([_figures(row) for row in rows])
    return tuple(
        ParetoRow(
            row.budget,
            row.kept_share,
            row.kept_interval,
            row.costs,
            bool(((figures <= own).all(axis=1) & (figures < own).any(axis=1)).any()),
        )
        for row, own in zip(rows, figures)
    )


def _figures(row: ParetoRow) -> list[float]:
    """What a row is judged by; less is better."""
    costs = row.costs
    return [-row.kept_share, costs.cache_gib, costs.flops_per_token, costs.decode_ms]
