"""``megatron-hydra plan``: head scores and a budget become a head plan, with a picture."""

from __future__ import annotations

import argparse
import os
import sys
from fractions import Fraction
from pathlib import Path

from hydra_tools.on_plans import (
    add_choice_arguments,
    add_cost_arguments,
    cost_lines,
    how_sure,
    read_constraints,
    read_ratio,
)
from megatron_hydra.api.plan import plan
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.budget import Budget, BudgetKind
from megatron_hydra.selection.cost import ServeDtype, costs_of, num_stored_groups, other_heads
from megatron_hydra.selection.policy import DEFAULT_CONTEXT_TOKENS, PlanSummary, weakness
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
        type=read_ratio,
        metavar="RATIO",
        help="share of all heads that keep full attention, as 1/4 or 0.25",
    )
    budget.add_argument(
        "--fa-heads", type=int, metavar="N", help="number of heads that keep full attention"
    )
    budget.add_argument(
        "--kv-cache-ratio",
        type=read_ratio,
        metavar="RATIO",
        help="share of the teacher's KV cache that is stored at most",
    )
    budget.add_argument(
        "--cache-gib",
        type=float,
        metavar="GIB",
        help="KV cache and state of a sequence of --context tokens at most",
    )
    budget.add_argument(
        "--decode-ms",
        type=float,
        metavar="MS",
        help="predicted time per decoded token at --context tokens on --device at most",
    )
    add_cost_arguments(parser)
    add_choice_arguments(parser)
    parser.add_argument(
        "--window-ratio",
        type=read_ratio,
        default=Fraction(0),
        metavar="RATIO",
        help="share of all heads that become sliding windows: of those without FA, where most of "
        "what a head does is local (the scores need mean_ablation and window_ablation)",
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
    done = plan(
        args.scores,
        args.out,
        _budget(args),
        read_constraints(args),
        combine=args.combine,
        solver=args.solver,
        window_ratio=args.window_ratio,
        random_seed=args.random_seed,
        picture=args.png,
        overwrite=args.overwrite,
    )
    summary, shape = done.summary, done.scores.shape
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(format_head_map(done.scores, summary.plan, colour))
    print()
    print("\n".join(describe(summary, args.random_seed)))
    context, budget = args.context or DEFAULT_CONTEXT_TOKENS, summary.budget
    where = context, budget.device, budget.serve_dtype
    print("\n" + "\n".join(cost_lines(*(costs_of(shape, x, *where) for x in (summary.plan, None)))))
    if args.context is None:
        counted = "budget and costs are" if budget.context_tokens else "costs are"
        print(f"{counted} told at {context:,} tokens, the default: --context names another length")
    print(shape.parallel_sizes.describe())
    print(f"\nplan:    {args.out}\npicture: {done.picture}")
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
    """Sentences on a plan: counts, KV cache, why heads are there, how sure the choice is."""
    chosen, shape, explanation = summary.plan, summary.shape, summary.explanation
    stored, counts = num_stored_groups(chosen), summary.fa_heads_per_layer
    empty = weakness(chosen, shape, summary.budget, summary.constraints)
    lines = [] if empty is None else [f"WARNING: {empty}"]
    lines += [
        f"budget: {summary.budget.words}",
        f"{chosen.num_fa_heads} of {shape.total_heads} heads keep full attention (FA), "
        f"the others become LA heads ({other_heads(chosen, shape.la_kind) or 'none'}); "
        f"{min(counts)} to {max(counts)} FA per layer",
        f"KV cache: {stored / shape.total_groups:.0%} of the teacher's "
        f"({stored} of {shape.total_groups} query groups are stored)",
    ]
    if summary.asked_for is not None:
        lines.append(
            f"the ratio asks for {float(summary.asked_for):.4g} heads: rounded to "
            f"{chosen.num_fa_heads}"
        )
    if random_seed is not None:
        lines.append(f"drawn at random with seed {random_seed}: the scores decided nothing")
        return [*lines, *how_sure(explanation)]
    lines.append(
        f"ties: {explanation.num_tie_filled} FA heads won over a head of equal score, by the size "
        f"of the effect, then by order"
    )
    if explanation.num_without_evidence:
        lines.append(
            f"no evidence: {explanation.num_without_evidence} FA heads have a score of 0 or less "
            f"and only fill the budget"
        )
    return [*lines, *_other_reasons(summary), *how_sure(explanation)]


def _other_reasons(summary: PlanSummary) -> list[str]:
    """Sentences on FA heads that their scores alone would not have kept."""
    explanation, lines = summary.explanation, []
    if number := explanation.num_for("constraint"):
        cause = summary.constraints.words or "others of their query group, which is stored anyway"
        lines.append(f"constraints: {number} FA heads are there for {cause}, not by score alone")
    num_positive = sum(score > 0 for row in explanation.scores for score in row)
    num_kept = len(explanation.heads) - explanation.num_without_evidence
    if summary.budget.kind not in ("fa_heads", "fa_ratio") and num_kept == num_positive:
        lines.append("every head with a score above 0 is kept: a larger budget would add nothing")
    return lines


def _budget(args: argparse.Namespace) -> Budget:
    kinds: tuple[BudgetKind, ...] = (
        "fa_heads",
        "fa_ratio",
        "kv_cache_ratio",
        "cache_gib",
        "decode_ms",
    )
    (kind,) = (kind for kind in kinds if getattr(args, kind) is not None)
    context = args.context
    if kind in ("cache_gib", "decode_ms"):  # what these allow depends on the length
        context = context or DEFAULT_CONTEXT_TOKENS
    dtype: ServeDtype = args.serve_dtype or "bf16"
    return Budget(kind, getattr(args, kind), context, args.device or "h100", dtype)


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
