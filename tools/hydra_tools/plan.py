"""``megatron-hydra plan``: head scores and a budget become a head plan, with a picture."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from hydra_tools.inspect import add_cost_arguments, cost_lines, how_sure
from megatron_hydra.files import check_output, check_outputs
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.parallel_sizes import ParallelSizes
from megatron_hydra.schema import read_config
from megatron_hydra.selection.budget import Budget, BudgetKind, Constraints
from megatron_hydra.selection.combination import Combination
from megatron_hydra.selection.cost import ModelShape, ServeDtype, costs_of, num_stored_groups
from megatron_hydra.selection.policy import (
    DEFAULT_CONTEXT_TOKENS,
    PlanSummary,
    no_fa_heads,
    plan_from_scores,
    random_plan,
)
from megatron_hydra.selection.scores import HeadScores
from megatron_hydra.selection.scoring_config import CombineSection

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
        help="predicted time a decoded token at --context tokens on --device at most",
    )
    add_cost_arguments(parser)
    add_choice_arguments(parser)
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


def add_choice_arguments(parser: argparse.ArgumentParser) -> None:
    """Add constraints, solver and recombination."""
    parser.add_argument(
        "--min-fa-per-layer",
        type=int,
        default=0,
        metavar="N",
        help="heads that keep full attention in every layer at least (default: 0)",
    )
    parser.add_argument(
        "--per-layer", type=int, metavar="K", help="exactly K such heads in every layer"
    )
    parser.add_argument(
        "--whole-groups",
        action="store_true",
        help="a query group's heads are all of one kind, so that the cache really shrinks",
    )
    parser.add_argument(
        "--multiple-of",
        type=int,
        default=1,
        metavar="N",
        help="a layer's number of such heads is a multiple of N, such as the TP size",
    )
    parser.add_argument(
        "--solver",
        choices=("exact", "greedy"),
        default="exact",
        help="greedy takes the best head that fits, to compare (default: exact)",
    )
    parser.add_argument(
        "combine",
        nargs="*",
        metavar="combine.KEY=VALUE",
        help="combine the effects in another way, as combine.consistency=false, "
        "combine.weights.language=0.5, combine.scorers=path_patching",
    )


def run(args: argparse.Namespace) -> int:
    """Choose the heads; write plan and picture; print the head map and a summary."""
    png = args.png or args.out.with_suffix(".png")
    check_outputs([args.out, png], [args.scores])
    check_output(args.out, args.overwrite, "file")
    # Written before the plan: beside none it is left over from a command that was cut off.
    overwrite_png = args.overwrite or (args.png is None and not args.out.exists())
    check_output(png, overwrite_png, "file")
    scores = recombine(HeadScores.load(args.scores), args.combine)
    summary = _choose(args, scores)
    command = shlex.join(["megatron-hydra", *sys.argv[1:]])
    plan = dataclasses.replace(
        summary.plan, provenance={**summary.plan.provenance, "command": command}
    )
    # matplotlib takes a while to import: bad input is reported first.
    from megatron_hydra.report.heatmap import save_head_map

    kind = "the plan" if args.random_seed is None else "a random plan"
    scorers = ", ".join(scores.combination.scorers).replace("_", " ")
    save_head_map(png, scores, plan, f"Head scores by {scorers}, with {kind}", overwrite_png)
    plan.save(args.out, args.overwrite)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(format_head_map(scores, plan, colour))
    print()
    print("\n".join(describe(summary, args.random_seed)))
    context, budget = args.context or DEFAULT_CONTEXT_TOKENS, summary.budget
    where = context, budget.device, budget.serve_dtype
    print(
        "\n" + "\n".join(cost_lines(*(costs_of(scores.shape, of, *where) for of in (plan, None))))
    )
    if args.context is None:
        counted = "budget and costs are" if budget.context_tokens else "costs are"
        print(f"{counted} told at {context:,} tokens, the default: --context names another length")
    print(_parallel_sizes(scores.shape).describe())
    print(f"\nplan:    {args.out}\npicture: {png}")
    return 0


def _parallel_sizes(shape: ModelShape) -> ParallelSizes:
    return ParallelSizes(
        num_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_hidden_size,
        vocab_size=shape.vocab_size,
    )


@dataclass
class _Overrides:
    """What ``combine.KEY=VALUE`` may change."""

    combine: CombineSection = field(default_factory=CombineSection)


def recombine(scores: HeadScores, overrides: Sequence[str]) -> HeadScores:
    """The same effects under another combination, without a new run.

    Args:
        scores: Their own combination holds where nothing else is said.
        overrides: ``combine.KEY=VALUE``; scorers may be separated by commas.

    Raises:
        UserError: For an unknown key, scorer or capability, or a value of the wrong kind.
    """
    if not overrides:
        return scores
    old = dataclasses.asdict(scores.combination)
    values = {f"combine.{name}": value for name, value in old.items()}
    values["combine.scorers"] = list(old["scorers"])
    words = [_as_list(word) for word in overrides]
    new = dataclasses.asdict(read_config(_Overrides, None, words, values).combine)
    return scores.with_combination(Combination(**{**new, "scorers": tuple(new["scorers"])}))


def read_constraints(args: argparse.Namespace) -> Constraints:
    """The constraints of :func:`add_choice_arguments`."""
    return Constraints(args.min_fa_per_layer, args.per_layer, args.whole_groups, args.multiple_of)


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
    plan, shape, explanation = summary.plan, summary.shape, summary.explanation
    stored, counts = num_stored_groups(plan), summary.fa_heads_per_layer
    empty = no_fa_heads(plan, shape, summary.budget, summary.constraints)
    lines = [] if empty is None else [f"WARNING: {empty}"]
    lines += [
        f"budget: {summary.budget.words}",
        f"{plan.num_fa_heads} of {shape.total_heads} heads keep full attention (FA), "
        f"{summary.num_la_heads} become linear (LA); {min(counts)} to {max(counts)} FA a layer",
        f"KV cache: {stored / shape.total_groups:.0%} of the teacher's "
        f"({stored} of {shape.total_groups} query groups are stored)",
    ]
    if summary.asked_for is not None:
        lines.append(
            f"the ratio asks for {float(summary.asked_for):.4g} heads: rounded to "
            f"{plan.num_fa_heads}"
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
    asked, explanation = summary.constraints, summary.explanation
    minimum = f"--min-fa-per-layer {asked.min_fa_per_layer}"
    if asked.per_layer is not None:
        minimum = f"--per-layer {asked.per_layer}"
    num_for_minimum = explanation.num_for("layer minimum")
    num_for_group, num_for_multiple = (
        explanation.num_for("group"),
        explanation.num_for("multiple"),
    )
    lines = []
    if num_for_minimum:
        lines.append(f"layer minimum: {num_for_minimum} FA heads are there for {minimum} alone")
    if num_for_group:
        lines.append(
            f"groups: {num_for_group} FA heads are there because others of their query group are"
        )
    if num_for_multiple:
        lines.append(
            f"multiples: {num_for_multiple} FA heads are there for --multiple-of "
            f"{asked.multiple_of} alone"
        )
    num_positive = sum(score > 0 for row in explanation.scores for score in row)
    num_kept = len(explanation.heads) - explanation.num_without_evidence
    if summary.budget.kind not in ("fa_heads", "fa_ratio") and num_kept == num_positive:
        lines.append("every head with a score above 0 is kept: a larger budget would add nothing")
    return lines


def read_ratio(text: str) -> Fraction:
    """A ratio on the command line, as 1/4 or 0.25."""
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no ratio: write 1/4 or 0.25") from None


def _as_list(override: str) -> str:
    """``combine.scorers=a,b`` as YAML's ``combine.scorers=[a,b]``."""
    key, equals, value = override.partition("=")
    if key == "combine.scorers" and not value.startswith("["):
        value = f"[{value}]"
    return key + equals + value


def _choose(args: argparse.Namespace, scores: HeadScores) -> PlanSummary:
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
    budget = Budget(kind, getattr(args, kind), context, args.device or "h100", dtype)
    constraints = read_constraints(args)
    if args.random_seed is None:
        return plan_from_scores(scores, budget, constraints, solver=args.solver)
    return random_plan(scores, budget, constraints, seed=args.random_seed)


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
