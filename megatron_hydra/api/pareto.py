"""`pareto`: what several budgets keep of the scores, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from megatron_hydra.api.plan import recombine
from megatron_hydra.files import check_output, check_outputs
from megatron_hydra.provenance import origin
from megatron_hydra.selection.budget import Budget, Constraints
from megatron_hydra.selection.cost import ServeDtype
from megatron_hydra.selection.pareto import ParetoTable, pareto_table
from megatron_hydra.selection.policy import DEFAULT_CONTEXT_TOKENS
from megatron_hydra.selection.scores import HeadScores


def pareto(
    scores: Path,
    out: Path,
    budgets: Sequence[Budget],
    constraints: Constraints = Constraints(),
    *,
    context_tokens: int = DEFAULT_CONTEXT_TOKENS,
    device: str = "h100",
    serve_dtype: ServeDtype = "bf16",
    combine: Sequence[str] = (),
    solver: Literal["exact", "greedy"] = "exact",
    overwrite: bool = False,
) -> ParetoTable:
    """Plan every budget and write the table.

    Args:
        scores: What :func:`~megatron_hydra.api.score.score` wrote.
        out: The table's JSON file.
        budgets: One row each.
        constraints: Of every plan.
        context_tokens: Of the sequence at which costs are told.
        device: For which times are predicted, see :mod:`megatron_hydra.selection.cost`.
        serve_dtype: Number format of weights and caches.
        combine: As :func:`~megatron_hydra.api.plan.recombine`.
        solver: As :func:`~megatron_hydra.api.plan.plan`.
        overwrite: Replace an existing output.

    Raises:
        UserError: As :func:`~megatron_hydra.api.plan.plan`.
    """
    check_outputs([out], [scores])
    check_output(out, overwrite, "file")
    combined = recombine(HeadScores.load(scores), combine)
    table = pareto_table(
        combined, budgets, constraints, context_tokens, device, serve_dtype, solver=solver
    )
    provenance = origin(
        constraints=asdict(constraints),
        solver=solver,
        combination=asdict(combined.combination),
        scores=dict(combined.provenance),
    )
    table.save(out, provenance, overwrite)
    return table
