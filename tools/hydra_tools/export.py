"""``megatron-hydra export``: a checkpoint becomes a Hugging Face folder."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from hydra_tools.progress import progress
from megatron_hydra.api.export import Exported, export
from megatron_hydra.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "--model", required=True, type=Path, help="checkpoint folder of a hybrid or a teacher"
    )
    parser.add_argument("--out", required=True, type=Path, help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier folder")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the weights (default: as stored)"
    )
    parser.add_argument(
        "--max-shard-gb",
        type=float,
        default=5.0,
        metavar="GB",
        help="size of a file of weights (default: 5)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="what `evaluate --hf` wrote of an earlier export, for a hybrid's model card",
    )
    parser.add_argument(
        "--push",
        metavar="REPO",
        help="then upload the folder to this repository of the Hugging Face Hub, NAME or "
        "OWNER/NAME, with the login of `hf auth login` (default: nothing is uploaded)",
    )
    parser.add_argument(
        "--public",
        action="store_true",
        help="a repository that --push makes can be seen by all (default: private)",
    )


def run(args: argparse.Namespace) -> int:
    """Export; print what was written."""
    if not math.isfinite(args.max_shard_gb):
        raise UserError(f"--max-shard-gb is {args.max_shard_gb}; it must be a finite number")
    done = export(
        args.model,
        args.out,
        dtype=args.dtype,
        max_shard_bytes=int(args.max_shard_gb * 1e9),
        results=args.results,
        push=args.push,
        public=args.public,
        overwrite=args.overwrite,
        progress=progress,
    )
    print("\n".join(_lines(done)))
    return 0


def _lines(done: Exported) -> list[str]:
    lines = [f"weights: {done.weight_bytes:,} bytes, {done.dtype}"]
    if done.plan is not None:
        hybrid, teacher = done.cache_bytes_per_token
        lines += [
            f"cache: {hybrid:,} bytes per token (teacher: {teacher:,}), and {done.state_bytes:,} "
            "bytes of state per sequence",
            "load it by AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
        ]
    lines.append(f"Hugging Face folder: {done.folder}")
    return lines if done.address is None else [*lines, f"on the Hub: {done.address}"]
