"""``megatron-hydra inspect``: what a head plan keeps, what it costs, and how sure its choice is."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hydra_tools.on_plans import add_cost_arguments, cost_lines, how_sure
from megatron_hydra.api.inspect import Inspection, draw, inspect
from megatron_hydra.errors import UserError
from megatron_hydra.evaluation.results import align
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.comparison import PlanComparison
from megatron_hydra.selection.explanation import ChosenHead, Explanation

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
    found = inspect(
        args.plan,
        args.scores,
        args.against,
        context_tokens=args.context,
        device=args.device,
        serve_dtype=args.serve_dtype,
    )
    print("\n".join(describe_plan(found)))
    if found.comparison is not None:
        names = str(args.plan), str(args.against)
        print("\n" + "\n".join(describe_comparison(found.comparison, *names)))
    if args.pictures:
        keep = (args.plan, args.scores, args.against)
        for path in draw(found, args.pictures, args.pareto, keep=keep, overwrite=args.overwrite):
            print(f"picture: {path}")
    return 0


def describe_plan(found: Inspection) -> list[str]:
    """All that a plan's file tells, line by line."""
    plan = found.plan
    total = plan.num_layers * plan.num_heads
    lines = [f"{plan.num_fa_heads} of {total} heads keep full attention (FA)"]
    others = Counter(kind for layer in plan.layers for kind in layer.kinds)
    named = [f"{n} {kind}" for kind, n in others.items() if kind not in ("fa", "la")]
    if named:
        lines.append(f"of kinds that the plan names: {', '.join(named)}")
    lines += [*_origin(found), "", *_layers(plan), ""]
    if found.costs is None:
        lines.append("costs: the plan does not say the teacher's sizes; pass --scores")
    else:
        lines += cost_lines(*found.costs)
    explanation = found.explanation
    if explanation is None:
        return [*lines, "", "the plan does not say why its heads were chosen: written by hand?"]
    combined = plan.provenance.get("combination", {}).get("scorers", ())
    lines += ["", *how_sure(explanation)]
    if explanation.heads:
        lines += ["", *_head_lines(explanation, combined)]
    best = found.left_out[:_NUM_LEFT_OUT]
    listed = ", ".join(f"{layer}.{head} ({score:.3f})" for layer, head, score in best)
    return [*lines, "", f"highest scores left out (layer.head): {listed or 'none'}"]


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
        f"{ours.serve_dtype}: cache and state {gib:+.4g} GiB, FLOPs per token {share:+.1%}, "
        f"predicted decode {ms:+.3g} ms",
    ]


def _origin(found: Inspection) -> list[str]:
    """How the plan came to be, as far as it says, and whether it keeps any head."""
    warnings = [] if found.warning is None else [f"WARNING: {found.warning}"]
    if found.budget is None or found.constraints is None:
        return warnings
    made_by, asked = found.plan.provenance, found.constraints.words
    try:
        if made_by["policy"] == "random":
            how = f"at random, seed {made_by['seed']}"
        else:
            how = f"{made_by['solver']} choice by {', '.join(made_by['combination']['scorers'])}"
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the provenance of the head plan is malformed: {error}") from error
    return [
        *warnings,
        f"budget: {found.budget.words}{asked and f', {asked}'}",
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
