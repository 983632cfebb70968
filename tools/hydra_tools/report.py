"""``megatron-hydra report``: one HTML page from the files that the other verbs wrote."""

from __future__ import annotations

import argparse
from pathlib import Path

from hydra_tools.named_folders import named_folders
from megatron_hydra.api.report import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("--scores", required=True, type=Path, help="what `score` wrote")
    parser.add_argument("--plan", required=True, type=Path, help="what `plan` wrote")
    parser.add_argument(
        "--evaluation", type=Path, metavar="FILE", help="what `evaluate --model` wrote"
    )
    parser.add_argument(
        "--generation",
        type=Path,
        metavar="FILE",
        help="what `evaluate --generate` or `--hf` wrote, in place of --evaluation or beside it; "
        "then the first figures of the page are of generated text",
    )
    parser.add_argument(
        "--run",
        required=True,
        action="append",
        metavar="NAME=FOLDER",
        help="a training run and its name on the page; give one per stage, in order",
    )
    parser.add_argument(
        "--pareto", type=Path, metavar="FILE", help="what `pareto` wrote, to show it on the page"
    )
    parser.add_argument(
        "--teacher", type=Path, help="check that plan and scores are of this folder, and name it"
    )
    parser.add_argument("--out", required=True, type=Path, help="the HTML page to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing page")


def run(args: argparse.Namespace) -> int:
    """Write the page and print its path."""
    page = report(
        args.out,
        scores=args.scores,
        plan=args.plan,
        evaluation=args.evaluation,
        runs=named_folders("--run", args.run, "run", "stage1=runs/stage1"),
        pareto=args.pareto,
        generation=args.generation,
        teacher=args.teacher,
        overwrite=args.overwrite,
    )
    print(f"report: {page}")
    return 0
