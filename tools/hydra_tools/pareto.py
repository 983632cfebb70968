"""``megatron-hydra pareto``: what several budgets keep of the scores, and what they cost."""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path

from hydra_tools.on_plans import (
    add_choice_arguments,
    add_cost_arguments,
    read_constraints,
    read_ratio,
)
from megatron_hydra.api.pareto import pareto
from megatron_hydra.evaluation.results import align
from megatron_hydra.selection.budget import Budget, BudgetKind
from megatron_hydra.selection.cost import Costs, find_device
from megatron_hydra.selection.pareto import ParetoTable
from megatron_hydra.selection.policy import DEFAULT_CONTEXT_TOKENS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("--scores", required=True, type=Path, help="what `score` wrote")
    parser.add_argument(
        "--budgets", required=True, type=_ratios, metavar="R,R,…", help="as 1/16,1/8,1/4,1/2"
    )
    parser.add_argument(
        "--by",
        choices=("fa-ratio", "kv-cache-ratio"),
        default="fa-ratio",
        help="what the budgets are a share of (default: %(default)s)",
    )
    add_cost_arguments(parser)
    add_choice_arguments(parser)
    parser.add_argument("--out", required=True, type=Path, help="the table to write (JSON)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(args: argparse.Namespace) -> int:
    """Plan every budget; write the table; print it."""
    kind: BudgetKind = "fa_ratio" if args.by == "fa-ratio" else "kv_cache_ratio"
    table = pareto(
        args.scores,
        args.out,
        [Budget(kind, ratio) for ratio in args.budgets],
        read_constraints(args),
        context_tokens=args.context or DEFAULT_CONTEXT_TOKENS,
        device=args.device or "h100",
        serve_dtype=args.serve_dtype or "bf16",
        combine=args.combine,
        solver=args.solver,
        overwrite=args.overwrite,
    )
    print("\n".join(format_table(table)))
    print(f"\ntable: {args.out}")
    return 0


def format_table(table: ParetoTable) -> list[str]:
    """The table as text; a dominated row is marked."""
    teacher, dtype = table.teacher, table.teacher.serve_dtype
    rows = [
        ["budget", "kept of scores", "95% interval", "FA heads", f"cache+state GiB ({dtype})"]
        + ["of teacher's", "GFLOPs/token", f"decode ms ({dtype})", "step s"]
    ]
    for row in table.rows:
        interval = "-"
        if row.kept_interval is not None:
            interval = "{:.1%} to {:.1%}".format(*row.kept_interval)
        mark = " *" if row.is_dominated else ""
        kept = [row.budget + mark, f"{row.kept_share:.1%}", interval]
        rows.append([*kept, *_cost_cells(row.costs, teacher)])
    rows.append(["teacher", "100.0%", "", *_cost_cells(teacher, teacher)])
    device = find_device(teacher.device).name
    lines = [
        f"one sequence of {teacher.context_tokens:,} tokens; times predicted for {device}, weights "
        f"and KV cache served in {dtype} (the LA state is fp32)"
    ]
    lines += align(rows)
    if any(row.is_dominated for row in table.rows):
        lines.append("* another row keeps as much and costs less")
    return lines


def _cost_cells(costs: Costs, teacher: Costs) -> list[str]:
    return [
        str(costs.num_fa_heads),
        f"{costs.cache_gib:.4g}",
        f"{costs.cache_gib / teacher.cache_gib:.0%}",
        f"{costs.flops_per_token / 1e9:.4g}",
        f"{costs.decode_ms:.3g}",
        f"{costs.training_step_s:.3g}",
    ]


def _ratios(text: str) -> list[Fraction]:
    return [read_ratio(word.strip()) for word in text.split(",")]
