"""What the report shows of the head selection: how sure it is, and why each head is in the plan."""

from __future__ import annotations

from typing import Any

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.report.capabilities import capability_figure
from megatron_hydra.report.chart_style import to_picture
from megatron_hydra.report.pareto_chart import pareto_figure, plan_row
from megatron_hydra.report.ranking import rank_figure
from megatron_hydra.selection.combination import NOTABLE_EFFECT
from megatron_hydra.selection.cost import find_device
from megatron_hydra.selection.explanation import SURE
from megatron_hydra.selection.pareto import ParetoRow, ParetoTable
from megatron_hydra.selection.policy import read_explanation
from megatron_hydra.selection.scores import HeadScores
from megatron_hydra.selection.uncertainty import carries_uncertainty


def selection_section(
    scores: HeadScores, plan: HeadPlan, pareto: ParetoTable | None
) -> dict[str, Any]:
    """Tiles, charts and tables; must be called in :func:`chart_style`.

    Args:
        scores: What the plan was made from.
        plan: With or without an explanation in its file.
        pareto: Of the same scores; None leaves it out.

    Raises:
        UserError: If the plan or the table is of another teacher or other scores.
    """
    return {
        "explanation": read_explanation(plan),
        "scorers": scores.combination.scorers,
        "sure": SURE,
        "ranks": to_picture(
            rank_figure(scores, plan),
            "ranks",
            "score of each head by its rank",
            _rank_caption(scores, plan),
        ),
        "maps": to_picture(
            capability_figure(scores, plan),
            "capabilities",
            "heads by capability",
            "Score of each head for each capability, before weights, on one scale.",
        ),
        "pareto": None if pareto is None else _pareto(pareto, scores, plan),
    }


def _rank_caption(scores: HeadScores, plan: HeadPlan) -> str:
    caption = "Heads from the highest score to the lowest."
    if plan.num_fa_heads:
        caption += " Dashed: the lowest score within the budget if scores alone choose."
    if carries_uncertainty(scores):
        caption += (
            " Bars: 95% of resamples of the pairs. Hollow: below the noise floor, that is, the "
            "pairs do not make sure that any effect of the head is beyond "
            f"±{NOTABLE_EFFECT:g}; it is a floor of effects, so no line of scores can show it."
        )
    return caption


def _pareto(pareto: ParetoTable, scores: HeadScores, plan: HeadPlan) -> dict[str, Any]:
    return {
        "chart": to_picture(
            pareto_figure(pareto, scores, plan),
            "pareto",
            "kept score against cache",
            "Share of the sum of all scores that the FA heads hold. Bars: 95% of resamples, the "
            "plan kept; a plan suits the pairs that chose it best, so its point may lie above its "
            "bar.",
        ),
        "rows": [
            *pareto.rows,
            plan_row(pareto, scores, plan),
            ParetoRow("teacher", 1.0, None, pareto.teacher),
        ],
        "teacher": pareto.teacher,
        "device": find_device(pareto.teacher.device).name,
    }
