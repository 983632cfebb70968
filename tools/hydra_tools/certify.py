"""`torchrun -m hydra_tools.certify`: hold a model to itself at every layout that fits the ranks.

Imports stay inside functions where they are heavy: a config with a typo is answered at once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_tools import launch
from megatron_hydra.errors import UserError
from megatron_hydra.files import check_output, check_outputs, write_json
from megatron_hydra.model.parallel_sizes import ParallelSizes

if TYPE_CHECKING:
    from megatron_hydra.certify.certificate import Certificate
    from megatron_hydra.certify.checks import Limits
    from megatron_hydra.head_plan import HeadPlan

_PRECISIONS = ("float32", "bf16")
# Read by cuBLAS and Transformer Engine when they start: reruns are to have the same bits.
_DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}
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
    _check_sizes(args)
    check_outputs([args.out], [args.config])
    out = check_output(args.out, args.overwrite, kind="file")
    for name, value in _DETERMINISTIC.items():
        os.environ.setdefault(name, value)
    from megatron_hydra import cpu

    cpu.install_if_needed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of every optional package that is absent
        from megatron_hydra.certify.certified_model import certified_model

        fields, plan = certified_model(
            args.config,
            args.overrides,
            num_layers=args.layers,
            precision=args.precision,
            backend=args.backend,
        )
        _check_tensor_size(fields, args.tp)
        certificate = _certify(fields, plan, args, out)
    if launch.rank() == 0:
        from megatron_hydra.certify.tables import text_table

        assert certificate.file is not None
        write_json(out, asdict(certificate.file), args.overwrite)
        print(text_table(certificate.file))
        verdict = "every check passed" if certificate.passed else "a check FAILED"
        print(f"{verdict}: {out}")
    return 0 if certificate.passed else 1


def _certify(
    fields: dict[str, Any], plan: HeadPlan, args: argparse.Namespace, out: Path
) -> Certificate:
    from megatron_hydra.certify.certificate import certify
    from megatron_hydra.certify.training import Run
    from megatron_hydra.certify.worlds import Ranks

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    ranks = Ranks()
    # Beside the output, because that is where all ranks of several machines see the same folder.
    out.parent.mkdir(parents=True, exist_ok=True)
    own = None
    if launch.rank() == 0:
        own = tempfile.mkdtemp(prefix=".certify.", dir=out.parent.resolve())
    scratch = ranks.share(own)
    if not Path(scratch).is_dir():
        raise UserError(f"{out.parent} must be a folder that all ranks see: {scratch} is missing")
    try:
        model = Run(fields, plan, Path(scratch) / "weights", Path(scratch), args.steps)
        return certify(
            model,
            _limits(args),
            _row_length(args),
            ranks,
            world_size=world_size,
            rank=launch.rank(),
            select=lambda check: args.only is None or args.only in check.name,
        )
    finally:
        if launch.rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def _limits(args: argparse.Namespace) -> Limits:
    from megatron_hydra.certify.checks import Limits

    return Limits(args.tp, args.cp, args.pp)


def _row_length(args: argparse.Namespace) -> int:
    """The nearest length above that every layout can split: zig-zag, then sequence parallel."""
    unit = 2 * args.cp * args.tp
    return int(-(-args.length // unit) * unit)


def _check_sizes(args: argparse.Namespace) -> None:
    for name in (*_SIZES, "layers", "steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be a whole number from 1 on")
    if args.length < 24:
        raise UserError(f"--length is {args.length}; it must be 24 tokens or more")


def _check_tensor_size(fields: dict[str, Any], largest: int) -> None:
    """Refuse a --tp that lets none of the sizes be tried that it asks for."""
    sizes = ParallelSizes.of(fields)
    if largest > 1 and not any(1 < size <= largest for size in sizes.tensor):
        raise UserError(
            f"--tp {largest} does not fit the model: {sizes.why_not_tensor(largest)}; allowed: "
            f"{', '.join(map(str, sizes.tensor))}"
        )


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
