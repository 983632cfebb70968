"""``megatron-hydra plan``: head scores and a budget become a head plan, with a picture."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
from fractions import Fraction
from pathlib import Path

from megatron_hydra.errors import UserError
from megatron_hydra.files import check_output
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.policy import (
    PlanSummary,
    make_budget,
    plan_from_scores,
    random_plan,
)
from megatron_hydra.selection.scores import HeadScores

# Of the terminal's 256 colours: backgrounds from light to dark, and the mark of an FA head.
_SHADES = (255, 195, 153, 117, 75, 33, 26, 19)
_FA_COLOUR = 208


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("--scores", required=True, type=Path, help="what `score` wrote")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--fa-ratio",
        type=_ratio,
        metavar="RATIO",
        help="share of all heads that keep full attention, as 1/4 or 0.25",
    )
    budget.add_argument(
        "--fa-heads", type=int, metavar="N", help="number of heads that keep full attention"
    )
    parser.add_argument(
        "--min-fa-per-layer",
        type=int,
        default=0,
        metavar="N",
        help="heads that keep full attention in every layer at least (default: 0)",
    )
    parser.add_argument(
        "--random-seed",
        type=int,
        metavar="SEED",
        help="ignore the scores' ranking and draw the heads at random, as a control",
    )
    parser.add_argument("--out", required=True, type=Path, help="the plan to write (JSON)")
    parser.add_argument(
        "--png", type=Path, help="the picture to write (default: beside the plan, .png)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")


def run(args: argparse.Namespace) -> int:
    """Choose the heads; write plan and picture; print the head map and a summary."""
    png = args.png or args.out.with_suffix(".png")
    if png == args.out:
        raise UserError(f"plan and picture would both be written to {png}: name another")
    check_output(args.out, args.overwrite)
    check_output(png, args.overwrite)
    scores = HeadScores.load(args.scores)
    summary = _choose(args, scores)
    command = shlex.join(["megatron-hydra", *sys.argv[1:]])
    plan = dataclasses.replace(
        summary.plan, provenance={**summary.plan.provenance, "command": command}
    )
    # matplotlib takes a while to import: bad input is reported first.
    from megatron_hydra.heatmap import save_head_map

    kind = "the plan" if args.random_seed is None else "a random plan"
    title = f"Head scores by {scores.scorer.replace('_', ' ')}, with {kind}"
    save_head_map(png, scores, plan, title, args.overwrite)
    plan.save(args.out, args.overwrite)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(format_head_map(scores, plan, colour))
    print()
    print("\n".join(describe(summary, args.random_seed)))
    print(f"\nplan:    {args.out}\npicture: {png}")
    return 0


def format_head_map(scores: HeadScores, plan: HeadPlan, colour: bool) -> str:
    """The head map as text: layers down, heads across, bars between query groups.

    A head shows its score as a share of the highest, as a shade if ``colour``, else as a digit;
    FA heads carry a mark.
    """
    highest = max(0.0, *(score for row in scores.scores for score in row)) or 1.0
    groups = range(plan.num_query_groups)
    margin = len("layer ") + len(str(plan.num_layers - 1))
    mark = _paint(" ● ", _FA_COLOUR, _SHADES[0]) if colour else "[ ]"
    scale = "darker: higher score" if colour else "score from 0 to 9, · is 0 or less"
    scale += f", highest {highest:.3g}"
    lines = [
        f"{scale}; {mark} keeps full attention",
        "",
        " " * margin + " │" + "│".join(_group_title(plan, group) for group in groups) + "│",
    ]
    for index, row in enumerate(scores.scores):
        kinds = plan.layers[index].kinds
        cells = [
            _cell(max(0.0, score) / highest, kind == "fa", colour)
            for score, kind in zip(row, kinds)
        ]
        size = plan.heads_per_group
        body = "│".join("".join(cells[group * size : (group + 1) * size]) for group in groups)
        stored = f"{len(plan.fa_groups(index))} of {plan.num_query_groups} groups stored"
        count = f"{kinds.count('fa')} FA, {stored}"
        lines.append(f"{f'layer {index}':>{margin}} │{body}│ {count}")
    return "\n".join(lines)


def describe(summary: PlanSummary, random_seed: int | None) -> list[str]:
    """Sentences on a plan: counts, KV cache, and how sure the choice is."""
    plan, budget = summary.plan, summary.budget
    total = plan.num_layers * plan.num_heads
    share = summary.kv_cache_share
    counts = summary.fa_heads_per_layer
    lines = [
        f"{plan.num_fa_heads} of {total} heads keep full attention (FA), "
        f"{summary.num_la_heads} become linear (LA); {min(counts)} to {max(counts)} FA a layer",
        f"KV cache: {float(share):.0%} of the teacher's "
        f"({share * plan.num_layers * plan.num_query_groups} of "
        f"{plan.num_layers * plan.num_query_groups} query groups are stored)",
    ]
    if budget.asked_for is not None:
        lines.append(
            f"the ratio asks for {float(budget.asked_for):.4g} heads: rounded to "
            f"{budget.num_fa_heads}"
        )
    if random_seed is not None:
        lines.append(f"drawn at random with seed {random_seed}: the scores decided nothing")
        return lines
    lines.append(
        f"ties: {summary.num_tie_filled} FA heads won over a head of equal score, by the size "
        f"of the effect, then by order"
    )
    if summary.num_without_evidence:
        lines.append(
            f"no evidence: {summary.num_without_evidence} FA heads have a score of 0 or less and "
            f"only fill the budget"
        )
    if summary.num_for_layer_minimum:
        lines.append(
            f"layer minimum: {summary.num_for_layer_minimum} FA heads are there for "
            f"--min-fa-per-layer {budget.min_fa_per_layer} alone"
        )
    return lines


def _ratio(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no ratio: write 1/4 or 0.25") from None


def _choose(args: argparse.Namespace, scores: HeadScores) -> PlanSummary:
    budget = make_budget(
        scores.num_layers,
        scores.num_heads,
        fa_ratio=args.fa_ratio,
        num_fa_heads=args.fa_heads,
        min_fa_per_layer=args.min_fa_per_layer,
    )
    if args.random_seed is None:
        return plan_from_scores(
            scores,
            fa_ratio=args.fa_ratio,
            num_fa_heads=args.fa_heads,
            min_fa_per_layer=args.min_fa_per_layer,
        )[1]
    plan = random_plan(
        scores.num_layers,
        scores.num_heads,
        scores.num_query_groups,
        budget.num_fa_heads,
        budget.min_fa_per_layer,
        args.random_seed,
        scores.teacher_config_hash,
    )
    return PlanSummary(plan, budget)


def _group_title(plan: HeadPlan, group: int) -> str:
    """The head indices of a group, each as wide as a cell."""
    first = group * plan.heads_per_group
    return "".join(f"{head:^3}" for head in range(first, first + plan.heads_per_group))


def _cell(share: float, is_fa: bool, colour: bool) -> str:
    """A head three characters wide; ``share`` is its score as a share of the highest."""
    if not colour:
        digit = str(round(9 * share)) if share else "·"
        return f"[{digit}]" if is_fa else f" {digit} "
    background = _SHADES[round(share * (len(_SHADES) - 1))]
    return _paint(" ● " if is_fa else "   ", _FA_COLOUR, background)


def _paint(text: str, foreground: int, background: int) -> str:
    return f"\x1b[38;5;{foreground};48;5;{background}m{text}\x1b[0m"
