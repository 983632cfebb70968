"""``megatron-hydra convert``: a teacher's folder and a head plan become a checkpoint folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from hydra_tools.progress import progress
from megatron_hydra.api.convert import (
    LONGEST_CALIBRATION,
    Calibration,
    Conversion,
    Reuse,
    convert,
)
from megatron_hydra.api.convert_hybrid import convert_hybrid
from megatron_hydra.errors import UserError
from megatron_hydra.schema import read_overrides
from megatron_hydra.tasks.text_files import add_text_options, text_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--teacher", type=Path, help="Hugging Face folder")
    source.add_argument(
        "--hybrid", type=Path, help="what `export` wrote of a hybrid; it knows its plan and options"
    )
    parser.add_argument(
        "--plan", type=Path, help="what `plan` wrote; else the teacher is converted"
    )
    parser.add_argument("--out", required=True, type=Path, help="the checkpoint folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier checkpoint")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--calibration-text",
        help="text to measure the scale of each teacher head on: a file, folder or quoted pattern "
        "(default: Python's documentation, which stands in for text like what the model is for)",
    )
    add_text_options(parser)
    parser.add_argument(
        "--calibration-tokens", type=int, default=8192, metavar="N",
        help="of that text (default: %(default)s); 0: no measurement, every scale starts at 1",
    )  # fmt: skip
    parser.add_argument(
        "--calibration-length",
        type=int,
        metavar="N",
        help="tokens per sequence (default: what the teacher is built for, "
        f"{LONGEST_CALIBRATION} at most)",
    )
    parser.add_argument(
        "--calibrate-recurrence",
        action="store_true",
        help="start decays and write strengths from how the teacher's heads look at that text",
    )
    parser.add_argument(
        "--reuse",
        choices=get_args(Reuse),
        default="all",
        help="what of a hybrid starts from the teacher's weights; the others are controls",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="model.key=value",
        help="options of the hybrid, such as model.la_kind=kda",
    )


def run(args: argparse.Namespace) -> int:
    """Convert; print what came from the teacher and what is new."""
    if args.hybrid is not None:
        return _convert_back(args)
    done = convert(
        args.teacher,
        args.out,
        args.plan,
        options=model_options(args.overrides),
        dtype=args.dtype,
        calibration=Calibration(
            args.calibration_text,
            text_options(args),
            args.calibration_tokens,
            args.calibration_length,
            "--calibration-text",
            args.calibrate_recurrence,
        ),
        reuse=args.reuse,
        overwrite=args.overwrite,
        progress=progress,
    )
    print("\n".join(_lines(done)))
    return 0


def _convert_back(args: argparse.Namespace) -> int:
    """Of an exported hybrid."""
    if args.plan is not None or args.overrides:
        raise UserError("an exported hybrid has its plan and its options: give --hybrid alone")
    plan = convert_hybrid(args.hybrid, args.out, overwrite=args.overwrite, progress=progress)
    num_heads = plan.num_layers * plan.num_heads
    print(f"heads: {plan.num_fa_heads} with full attention of {num_heads}")
    print(f"checkpoint: {args.out}")
    return 0


def _lines(done: Conversion) -> list[str]:
    lines = []
    if done.num_tokens:
        lines.append(
            f"scales of the heads: on {done.num_tokens:,} tokens, {done.length_tokens:,} per "
            "sequence"
        )
    if done.plan is not None and done.reuse is not None:
        num_heads = done.plan.num_layers * done.plan.num_heads
        lines.append(f"heads: {done.plan.num_fa_heads} with full attention of {num_heads}")
        for title, counts in (("from the teacher", done.reuse.reused), ("new", done.reuse.new)):
            lines.append(f"{title}: {counts.total():,} values")
            lines += [f"  {count:>15,}  {part}" for part, count in counts.most_common()]
    return [*lines, done.parallel_sizes.describe(), f"checkpoint: {done.folder}"]


def model_options(overrides: Sequence[str]) -> dict[str, Any]:
    """Read ``model.key=value`` arguments, as every verb's; ``model.`` may be left out.

    Raises:
        UserError: For an argument of another form, another section, and a name that stands twice.
    """
    full = [text if "." in text.partition("=")[0] else f"model.{text}" for text in overrides]
    names = [text.partition("=")[0] for text in full]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"option {name} is given twice")
    sections = read_overrides(full)
    for section in sections:
        if section != "model":
            raise UserError(f"convert has options of the section model alone, not of {section}")
    options: dict[str, Any] = sections.get("model", {})
    return options
