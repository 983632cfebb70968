"""What the verbs on head plans share: arguments on costs and choices, and their lines of text."""

from __future__ import annotations

import argparse
from dataclasses import fields
from fractions import Fraction

from megatron_hydra.evaluation.results import align
from megatron_hydra.selection.budget import Constraints
from megatron_hydra.selection.cost import (
    DEVICES,
    GIB,
    SERVE_DTYPES,
    TRAINING_EFFICIENCY,
    Costs,
    find_device,
    state_format,
)
from megatron_hydra.selection.explanation import SURE, Explanation
from megatron_hydra.selection.policy import DEFAULT_CONTEXT_TOKENS


def add_cost_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what costs are told for: ``--context``, ``--device`` and ``--serve-dtype``."""
    parser.add_argument(
        "--context",
        type=_positive,
        metavar="TOKENS",
        help="length of a sequence at which costs are told (default: the plan's budget's, else "
        f"{DEFAULT_CONTEXT_TOKENS})",
    )
    parser.add_argument(
        "--device",
        choices=sorted(DEVICES),
        help="predict times for it (default: the plan's budget's, else h100)",
    )
    parser.add_argument(
        "--serve-dtype",
        choices=tuple(SERVE_DTYPES),
        help="number format of weights and caches when the model serves, in which bytes and times "
        "are told (default: the plan's budget's, else bf16)",
    )


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
        "--max-fa-per-layer",
        type=int,
        metavar="N",
        help="the same at most, so that other heads are left in every layer (default: all)",
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
        metavar="section.key=value",
        help="combine the effects in another way, as combine.consistency=false, "
        "combine.weights.language=0.5, combine.scorers=path_patching; or plan for other LA heads, "
        "as model.la_kind=kda",
    )


def read_constraints(args: argparse.Namespace) -> Constraints:
    """The constraints of :func:`add_choice_arguments`."""
    return Constraints(**{each.name: getattr(args, each.name) for each in fields(Constraints)})


def read_ratio(text: str) -> Fraction:
    """A ratio on the command line, as 1/4 or 0.25."""
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no ratio: write 1/4 or 0.25") from None


def how_sure(explanation: Explanation) -> list[str]:
    """Sentences on what the plan keeps of the scores, and whether other pairs would agree."""
    kept = f"{explanation.kept_share:.0%} of the sum of scores is kept"
    if explanation.kept_interval is None:
        return [
            kept,
            "how sure: unknown, since the scores stand on one pair per sub-probe",
        ]
    low, high = explanation.kept_interval
    lines = [f"{kept} (95% of resamples: {low:.0%} to {high:.0%})"]
    num, below = len(explanation.heads), explanation.num_below_noise_floor
    if explanation.num_sure is None:
        lines.append(f"drawn at random; {below} of {num} FA heads are below the noise floor")
    else:
        lines.append(
            f"{explanation.num_sure} of {num} FA heads are chosen in {SURE:.0%} of resamples; "
            f"FA heads that only fill the budget (effect within noise): {below}"
        )
    half = explanation.split_half
    if half is None:
        return [*lines, f"rank correlation of split halves: {explanation.no_split_half}"]
    return [
        *lines,
        f"rank correlation (Spearman) of split halves: {half.median:.2f} (95% of splits: "
        f"{half.lower:.2f} to {half.upper:.2f}), {half.num_pairs_per_half} pairs per sub-probe in "
        "each half",
    ]


def cost_lines(plan: Costs, teacher: Costs) -> list[str]:
    """A table of a plan's costs beside its teacher's."""
    device, dtype = find_device(plan.device).name, plan.serve_dtype
    figures = [
        (f"KV cache, GiB ({dtype})", plan.kv_cache_bytes / GIB, teacher.kv_cache_bytes / GIB),
        (
            f"LA state, GiB ({state_format(dtype)})",
            plan.state_bytes / GIB,
            teacher.state_bytes / GIB,
        ),
        ("forward FLOPs per token, G", plan.flops_per_token / 1e9, teacher.flops_per_token / 1e9),
        (f"predicted decode, ms per token ({device}, {dtype})", plan.decode_ms, teacher.decode_ms),
        (
            f"predicted training step, s ({device} at {TRAINING_EFFICIENCY:.0%} of its bf16 peak)",
            plan.training_step_s,
            teacher.training_step_s,
        ),
    ]
    rows = [[f"one sequence of {plan.context_tokens:,} tokens", "teacher", "plan", "share"]]
    for name, of_plan, of_teacher in figures:
        share = f"{of_plan / of_teacher:.0%}" if of_teacher else ""
        rows.append([name, f"{of_teacher:.4g}", f"{of_plan:.4g}", share])
    return align(rows)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens: write 32768")
    return int(text)
