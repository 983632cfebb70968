"""`torchrun -m hydra_tools.certify`: hold a model to itself at every layout that fits the ranks.

Imports stay inside functions where they are heavy: a config with a typo is answered at once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hydra_tools import launch
from megatron_hydra.api.certify import Trial, certify
from megatron_hydra.errors import UserError

_PRECISIONS = ("float32", "bf16")
_SIZES = {"tp": "tensor", "cp": "context", "pp": "pipeline"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--config", help="YAML file of the model: see examples/*/certify.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    for name, words in _SIZES.items():
        parser.add_argument(
            f"--{name}",
            type=int,
            default=1,
            help=f"largest {words}-parallel size to try (default 1: none)",
        )
    parser.add_argument("--layers", type=int, help="keep only the first so many layers")
    parser.add_argument("--length", type=int, default=96, help="tokens of a row (default 96)")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (default 3)")
    parser.add_argument("--precision", choices=_PRECISIONS, help="default: bf16 on a GPU")
    parser.add_argument("--backend", choices=("local", "transformer_engine"))
    parser.add_argument("--only", help="run only the checks whose names contain this text")
    parser.add_argument("--out", type=Path, help="the certificate, JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier certificate")
    parser.add_argument(
        "--table", nargs="+", type=Path, metavar="CERTIFICATE", help="print their layouts, markdown"
    )
    parser.add_argument("--into", type=Path, help="with --table: write between a file's markers")


def run(args: argparse.Namespace) -> int:
    """Certify, or tabulate certificates; return the exit code, 1 if a check failed."""
    if args.table:
        return _tabulate(args)
    if args.config is None or args.out is None:
        raise UserError("--config and --out are needed, or --table with certificates")
    launch.check_launcher("certify")
    trial = Trial(
        tp=args.tp,
        cp=args.cp,
        pp=args.pp,
        num_layers=args.layers,
        length=args.length,
        num_steps=args.steps,
        precision=args.precision,
        backend=args.backend,
        only=args.only,
    )
    made = certify(args.config, args.out, args.overrides, trial, overwrite=args.overwrite)
    if made.file is not None:
        from megatron_hydra.certify.tables import text_table

        print(text_table(made.file))
        verdict = "every check passed" if made.passed else "a check FAILED"
        print(f"{verdict}: {args.out}")
    return 0 if made.passed else 1


def _tabulate(args: argparse.Namespace) -> int:
    from megatron_hydra import cpu

    cpu.install_if_needed()
    from megatron_hydra.certify.tables import layouts_table, read_certificate, write_between_markers

    table = layouts_table([read_certificate(path) for path in args.table])
    if args.into is None:
        print(table)
    else:
        write_between_markers(args.into, table)
    return 0


if __name__ == "__main__":
    sys.exit(launch.main("certify"))
