"""``megatron-hydra inspect``: what a head plan keeps, what it costs, and how sure its choice is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hydra_tools.on_plans import add_cost_arguments, align, cost_lines, how_sure
from megatron_hydra.errors import UserError
from megatron_hydra.files import check_outputs
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.schema import from_json
from megatron_hydra.selection.budget import Budget, Constraints
from megatron_hydra.selection.comparison import PlanComparison, compare_plans
from megatron_hydra.selection.cost import (
    ModelShape,
    ServeDtype,
    costs_of,
)
from megatron_hydra.selection.explanation import ChosenHead, Explanation
from megatron_hydra.selection.pareto import ParetoTable
from megatron_hydra.selection.policy import (
    DEFAULT_CONTEXT_TOKENS,
    no_fa_heads,
    read_budget,
    read_explanation,
    read_shape,
    scores_as_planned,
)
from megatron_hydra.selection.scores import HeadScores

_NUM_EFFECTS = 2  # shown of a head, the largest first
_NUM_LEFT_OUT = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("plan", type=Path, help="what `plan` wrote")
    parser.add_argument("--scores", type=Path, help="the scores it was made from, for the pictures")
    parser.add_argument("--against", type=Path, metavar="PLAN", help="another plan to compare")
    parser.add_argument(
        "--pictures", type=Path, metavar="DIR", help="folder to write pictures to; needs --scores"
    )
    parser.add_argument("--pareto", type=Path, help="what `pareto` wrote, for one more picture")
    add_cost_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace existing pictures")


def run(args: argparse.Namespace) -> int:
    """Print what the file says; write pictures if asked."""
    if args.pictures and not args.scores:
        raise UserError("--pictures needs --scores: the pictures show the effects of every head")
    plan = HeadPlan.load(args.plan)
    scores = None if args.scores is None else scores_as_planned(HeadScores.load(args.scores), plan)
    where = _where_costs_are_told(plan, args.context, args.device, args.serve_dtype)
    print("\n".join(describe_plan(plan, scores, *where)))
    if args.against:
        other = HeadPlan.load(args.against)
        comparison = compare_plans(plan, other, *where)
        names = str(args.plan), str(args.against)
        print("\n" + "\n".join(describe_comparison(comparison, *names)))
    if args.pictures and scores is not None:
        # matplotlib takes a while to import: the text comes first.
        from megatron_hydra.report.pictures import PICTURES, save_selection_pictures

        inputs = (args.plan, args.scores, args.against, args.pareto)
        check_outputs([args.pictures / name for name in PICTURES], inputs)
        table = None if args.pareto is None else ParetoTable.load(args.pareto)
        for path in save_selection_pictures(args.pictures, scores, plan, args.overwrite, table):
            print(f"picture: {path}")
    return 0


def describe_plan(
    plan: HeadPlan,
    scores: HeadScores | None,
    context: int,
    device: str,
    serve_dtype: ServeDtype,
) -> list[str]:
    """All that a plan's file tells, line by line.

    Args:
        plan: The plan.
        scores: Know the teacher's sizes where a plan written by hand does not.
        context: Tokens at which costs are told.
        device: To predict times for.
        serve_dtype: Number format of weights and caches.
    """
    total = plan.num_layers * plan.num_heads
    lines = [f"{plan.num_fa_heads} of {total} heads keep full attention (FA)"]
    shape = read_shape(plan) or (scores.shape if scores else None)
    lines += [*_origin(plan, shape), "", *_layers(plan), ""]
    if shape is None:
        lines.append("costs: the plan does not say the teacher's sizes; pass --scores")
    else:
        where = context, device, serve_dtype
        lines += cost_lines(costs_of(shape, plan, *where), costs_of(shape, None, *where))
    explanation = read_explanation(plan)
    if explanation is None:
        return [*lines, "", "the plan does not say why its heads were chosen: written by hand?"]
    combined = plan.provenance.get("combination", {}).get("scorers", ())
    lines += ["", *how_sure(explanation)]
    if explanation.heads:
        lines += ["", *_head_lines(explanation, combined)]
    return [*lines, "", *_left_out(plan, explanation)]


def describe_comparison(comparison: PlanComparison, first: str, second: str) -> list[str]:
    """Sentences on two plans: heads that differ, overlap, rank correlation, cost difference."""
    lines = [
        f"against {second}: {len(comparison.shared)} FA heads in both; Jaccard "
        f"{comparison.jaccard:.2f} (by chance {comparison.jaccard_by_chance:.2f})"
    ]
    for name, heads in ((first, comparison.only_first), (second, comparison.only_second)):
        listed = ", ".join(f"{layer}.{head}" for layer, head in heads) or "none"
        lines.append(f"only in {name} ({len(heads)} heads, layer.head): {listed}")
    correlation = comparison.rank_correlation
    if correlation is None:
        lines.append("rank correlation of the scores: not both plans carry scores that differ")
    else:
        lines.append(f"rank correlation (Spearman) of the scores of all heads: {correlation:.2f}")
    if comparison.costs is None:
        return [*lines, "cost difference: neither plan says the teacher's sizes"]
    ours, others = comparison.costs
    gib, ms = ours.cache_gib - others.cache_gib, ours.decode_ms - others.decode_ms
    share = ours.flops_per_token / others.flops_per_token - 1
    return [
        *lines,
        f"cost of {first} less that of {second} at {ours.context_tokens:,} tokens, served in "
        f"{ours.serve_dtype}: cache and state {gib:+.4g} GiB, FLOPs a token {share:+.1%}, "
        f"predicted decode {ms:+.3g} ms",
    ]


def _where_costs_are_told(
    plan: HeadPlan, context: int | None, device: str | None, serve_dtype: ServeDtype | None
) -> tuple[int, str, ServeDtype]:
    """What was asked for, else what the plan's budget was counted at, else the defaults."""
    budget = read_budget(plan) or Budget("fa_heads", 0)
    return (
        context or budget.context_tokens or DEFAULT_CONTEXT_TOKENS,
        device or budget.device,
        serve_dtype or budget.serve_dtype,
    )


def _origin(plan: HeadPlan, shape: ModelShape | None) -> list[str]:
    """How the plan came to be, as far as it says, and whether it keeps any head."""
    made_by, budget = plan.provenance, read_budget(plan)
    if budget is None:
        empty = no_fa_heads(plan, shape, None, Constraints())
        return [] if empty is None else [f"WARNING: {empty}"]
    where = "the constraints in the head plan"
    constraints = from_json(Constraints, made_by.get("constraints"), where)
    asked = constraints.words
    try:
        if made_by["policy"] == "random":
            how = f"at random, seed {made_by['seed']}"
        else:
            how = f"{made_by['solver']} choice by {', '.join(made_by['combination']['scorers'])}"
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the provenance of the head plan is malformed: {error}") from error
    empty = no_fa_heads(plan, shape, budget, constraints)
    return [
        *([] if empty is None else [f"WARNING: {empty}"]),
        f"budget: {budget.words}{asked and f', {asked}'}",
        f"chosen: {how}",
    ]


def _layers(plan: HeadPlan) -> list[str]:
    rows = [["layer", "FA", "groups stored", "FA heads"]]
    for index, layer in enumerate(plan.layers):
        stored = f"{len(plan.fa_groups(index))} of {plan.num_query_groups}"
        heads = " ".join(map(str, layer.fa_heads))
        rows.append([str(index), str(len(layer.fa_heads)), stored, heads])
    lines = align([row[:-1] for row in rows], num_left=0)
    return [f"{line}  {row[-1]}".rstrip() for line, row in zip(lines, rows, strict=True)]


def _head_lines(explanation: Explanation, combined: Sequence[str]) -> list[str]:
    rows = [
        ["rank", "layer", "head", "score", "95% interval", "chosen again", "noise floor"]
        + ["reason", "strongest mean effects"]
    ]
    for head in sorted(explanation.heads, key=lambda head: head.rank):
        interval = "-" if head.interval is None else "{:.3f} to {:.3f}".format(*head.interval)
        again = "-" if head.chosen_again is None else f"{head.chosen_again:.0%}"
        rows.append(
            [str(head.rank), str(head.layer), str(head.head), f"{head.score:.3f}", interval, again]
            + ["above" if head.above_noise_floor else "below", head.reason]
            + [_strongest(explanation, head, combined)]
        )
    lines = align([row[:-2] for row in rows], num_left=0)
    words = align([row[-2:] for row in rows], num_left=2)
    return [f"{line}  {text}" for line, text in zip(lines, words, strict=True)]


def _strongest(explanation: Explanation, head: ChosenHead, combined: Sequence[str]) -> str:
    found = explanation.strongest_effects(head, combined or tuple(head.effects))
    shown = [f"{effect:+.3f} {scorer} {probe}" for effect, scorer, probe in found if effect]
    return ", ".join(shown[:_NUM_EFFECTS]) or "none"


def _left_out(plan: HeadPlan, explanation: Explanation) -> list[str]:
    """The best heads that are not in the plan."""
    scores = np.array(explanation.scores)
    is_fa = np.array([[kind == "fa" for kind in layer.kinds] for layer in plan.layers])
    order = np.lexsort((is_fa.ravel(), -np.where(is_fa, -np.inf, scores).ravel()))
    best = [np.unravel_index(i, scores.shape) for i in order[: (~is_fa).sum()][:_NUM_LEFT_OUT]]
    listed = ", ".join(f"{layer}.{head} ({scores[layer, head]:.3f})" for layer, head in best)
    return [f"highest scores left out (layer.head): {listed or 'none'}"]
