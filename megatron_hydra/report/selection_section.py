"""The report's section on the head selection: how sure it is, and why each head is in the plan."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.report.capabilities import capability_figure
from megatron_hydra.report.chart_style import format_bytes, to_svg
from megatron_hydra.report.pareto_chart import pareto_figure, plan_row
from megatron_hydra.report.ranking import rank_figure
from megatron_hydra.report.sections import details, escape, figure, table
from megatron_hydra.selection.cost import GIB, Costs, find_device
from megatron_hydra.selection.explanation import SURE, ChosenHead, Explanation
from megatron_hydra.selection.pareto import ParetoRow, ParetoTable
from megatron_hydra.selection.policy import read_explanation
from megatron_hydra.selection.scores import HeadScores
from megatron_hydra.selection.uncertainty import carries_uncertainty

_REASONS = (
    "score: among as many heads with the highest scores; tie: the same, but a head left out has "
    "the same score; layer minimum, multiple: its layer had to have so many; group: its query "
    "group is stored anyway, or had to be whole; random: drawn"
)


def selection_section(scores: HeadScores, plan: HeadPlan, pareto: ParetoTable | None) -> str:
    """Tiles, charts and tables; must be called in :func:`chart_style`.

    Args:
        scores: What the plan was made from.
        plan: With or without an explanation in its file.
        pareto: Of the same scores; None leaves it out.

    Raises:
        UserError: If the plan or the table is of another teacher or other scores.
    """
    explanation = read_explanation(plan)
    bars = " Bars: 95% of resamples of the pairs." if carries_uncertainty(scores) else ""
    ranks = to_svg(rank_figure(scores, plan), "ranks", "score of each head by its rank")
    maps = to_svg(capability_figure(scores, plan), "capabilities", "heads by capability")
    return "".join(
        (
            _unexplained() if explanation is None else _how_sure(explanation),
            figure(ranks, f"Heads from the highest score to the lowest.{bars}"),
            "<h3>By capability</h3>",
            figure(maps, "Score of each head for each capability, before weights, on one scale."),
            "" if explanation is None else _why(explanation, scores.combination.scorers),
            "" if pareto is None else _pareto(pareto, scores, plan),
        )
    )


def _unexplained() -> str:
    return (
        "<p>The plan's file does not say why its heads were chosen: it was written by hand, or by "
        "an earlier release. <code>megatron-hydra plan</code> makes one that does.</p>"
    )


def _how_sure(explanation: Explanation) -> str:
    num_heads = len(explanation.heads)
    tiles = []
    if explanation.num_sure is not None:
        what = f"FA heads are chosen again in {SURE:.0%} of resamples"
        tiles.append(_tile(explanation.num_sure, f" of {num_heads}", what, _tie_note(explanation)))
    if explanation.kept_interval is not None:
        low = explanation.num_below_noise_floor
        what = "FA heads are below the noise floor"
        tiles.append(_tile(low, f" of {num_heads}", what, "no effect that the pairs make sure"))
    tiles.append(
        _tile(
            f"{100 * explanation.kept_share:.1f}", "%", "of the sum of scores kept by the FA heads",
            _interval_note(explanation.kept_interval),
        )
    )  # fmt: skip
    if (split := explanation.split_half) is not None:
        note = (
            f"Spearman; 95% of splits {split.lower:.2f} to {split.upper:.2f}, "
            f"{split.num_pairs_per_half} pairs or more a half"
        )
        tiles.append(_tile(f"{split.median:.2f}", "", "rank correlation of split halves", note))
    missing = f"<p>{escape(explanation.no_split_half)}</p>" if explanation.no_split_half else ""
    return f'<div class="tiles">{"".join(tiles)}</div>{missing}'


def _tile(value: object, unit: str, what: str, note: str) -> str:
    return (
        f'<div class="tile"><div class="big">{value}<small>{unit}</small></div>'
        f'<div>{escape(what)}</div><div class="muted">{escape(note)}</div></div>'
    )


def _tie_note(explanation: Explanation) -> str:
    number = explanation.num_tie_filled
    return f"a head of equal score could replace {number}" if number else "no ties"


def _interval_note(interval: tuple[float, float] | None) -> str:
    if interval is None:
        return "one pair a sub-probe: no interval"
    return f"95% of resamples {100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _why(explanation: Explanation, scorers: Sequence[str]) -> str:
    head = [
        "Layer.head", "Rank", "Score", "95% interval", "Chosen again", "Noise floor",
        "Strongest effect", "Reason",
    ]  # fmt: skip
    ranked = sorted(explanation.heads, key=lambda found: found.rank)
    rows = [_why_row(explanation, found, scorers) for found in ranked]
    body = table(head, rows, numeric=False) + f'<p class="muted">{_REASONS}.</p>'
    return details("Why each head is in the plan", body)


def _why_row(explanation: Explanation, found: ChosenHead, scorers: Sequence[str]) -> list[str]:
    interval = "–" if found.interval is None else "{:.3f} to {:.3f}".format(*found.interval)
    return [
        f"{found.layer}.{found.head}",
        str(found.rank),
        f"{found.score:.3f}",
        interval,
        "–" if found.chosen_again is None else f"{found.chosen_again:.0%}",
        "above" if found.above_noise_floor else "below",
        _strongest_effect(explanation, found, scorers),
        found.reason,
    ]


def _strongest_effect(explanation: Explanation, found: ChosenHead, scorers: Sequence[str]) -> str:
    """The largest mean effect among the scorers that the score stands on."""
    effect, scorer, probe = explanation.strongest_effects(found, scorers)[0]
    names = f"{scorer} on {probe}".replace("_", " ")
    return f"{effect:+.3f} <small>{escape(names)}</small>"


def _pareto(pareto: ParetoTable, scores: HeadScores, plan: HeadPlan) -> str:
    svg = to_svg(pareto_figure(pareto, scores, plan), "pareto", "kept score against cache")
    teacher = pareto.teacher
    head = [
        "Budget", "FA heads", "Kept score", f"Cache, state ({teacher.serve_dtype})", "Share",
        "GFLOPs a token", f"Decode, ms ({teacher.serve_dtype})", "Step, s",
    ]  # fmt: skip
    rows = [*pareto.rows, plan_row(pareto, scores, plan)]
    rows.append(ParetoRow("teacher", 1.0, None, teacher))
    cells = [_pareto_cells(row, teacher) for row in rows]
    length = f"{teacher.context_tokens:,}"
    times = (
        f"Costs of one sequence of {length} tokens, weights and KV cache served in "
        f"{teacher.serve_dtype}, the LA state's matrices in fp32; share: of what the teacher "
        "stores; decode: of one token; step: forward and backward. Times are predicted for one "
        f"{find_device(teacher.device).name}, not measured. Pale: another budget is as good and "
        "cheaper."
    )
    caption = (
        "Share of the sum of all scores that the FA heads hold. Bars: 95% of resamples, the plan "
        "kept; a plan suits the pairs that chose it best, so its point may lie above its bar."
    )
    return (
        f"<h3>What a budget buys</h3>{figure(svg, caption)}"
        f'{table(head, cells)}<p class="muted">{escape(times)}</p>'
    )


def _pareto_cells(row: ParetoRow, teacher: Costs) -> list[str]:
    costs = row.costs
    kept = f"{100 * row.kept_share:.1f}%"
    if row.kept_interval is not None:
        kept += "<small> {:.1f}–{:.1f}</small>".format(*(100 * end for end in row.kept_interval))
    cells = [
        escape(row.budget),
        f"{costs.num_fa_heads:,}",
        kept,
        format_bytes(costs.cache_gib * GIB),
        f"{costs.cache_gib / teacher.cache_gib:.0%}",
        f"{costs.flops_per_token / 1e9:.3g}",
        f"{costs.decode_ms:.3g}",
        f"{costs.training_step_s:.3g}",
    ]
    if row.is_dominated:
        return [f'<span class="muted">{cell}</span>' for cell in cells]
    return cells
