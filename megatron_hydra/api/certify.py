"""`certify`: hold a model to itself at every layout that fits the ranks."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_hydra.errors import UserError
from megatron_hydra.files import check_output, check_outputs, write_json
from megatron_hydra.model.parallel_sizes import ParallelSizes
from megatron_hydra.processes import is_first_rank

if TYPE_CHECKING:
    from megatron_hydra.certify.certificate import Certificate
    from megatron_hydra.head_plan import HeadPlan

# Read by cuBLAS and Transformer Engine when they start: reruns are to have the same bits.
_DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}


@dataclass(frozen=True)
class Trial:
    """How far a certificate goes.

    Attributes:
        tp: Largest tensor-parallel size that is tried.
        cp: Largest context-parallel size.
        pp: Largest pipeline-parallel size.
        num_layers: Only the model's first so many; None for all.
        length: Tokens of a row, 24 or more.
        num_steps: Optimizer steps.
        precision: None takes bf16 on a GPU, else float32.
        backend: None takes the file's, and for a checkpoint the one that the machine is for.
        only: Checks whose names contain this text; None for all.

    Raises:
        UserError: If a number is out of range.
    """

    tp: int = 1
    cp: int = 1
    pp: int = 1
    num_layers: int | None = None
    length: int = 96
    num_steps: int = 3
    precision: Literal["float32", "bf16"] | None = None
    backend: Literal["local", "transformer_engine"] | None = None
    only: str | None = None

    def __post_init__(self) -> None:
        counts = {"tp": self.tp, "cp": self.cp, "pp": self.pp, "layers": self.num_layers}
        for name, value in {**counts, "steps": self.num_steps}.items():
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value}; it must be a whole number from 1 on")
        if self.length < 24:
            raise UserError(f"--length is {self.length}; it must be 24 tokens or more")

    @property
    def row_length(self) -> int:
        """The nearest length above that every layout can split: zig-zag, then sequence parallel."""
        unit = 2 * self.cp * self.tp
        return -(-self.length // unit) * unit


def certify(
    config: str | Path,
    out: Path,
    overrides: Sequence[str] = (),
    trial: Trial = Trial(),
    *,
    overwrite: bool = False,
) -> Certificate:
    """Train the model a few steps at every layout, compare, and write the certificate.

    Collective over all ranks that torchrun started, or on one process alone.

    Args:
        config: YAML file, see :class:`~megatron_hydra.certify.certified_model.CertifyConfig`.
        out: The certificate's JSON file, in a folder that all ranks see.
        overrides: Each `section.key=value` of the file.
        trial: How far it goes.
        overwrite: Replace an existing output.

    Returns:
        Whether every check passed, and on the first rank what was written.

    Raises:
        UserError: If a value is not allowed, the model does not fit, or the output cannot be
            written.
    """
    check_outputs([out], [config])
    out = check_output(out, overwrite, kind="file")
    for name, value in _DETERMINISTIC.items():
        os.environ.setdefault(name, value)
    from megatron_hydra import cpu

    cpu.install_if_needed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of every optional package that is absent
        from megatron_hydra.certify.certified_model import certified_model

        fields, plan = certified_model(
            config,
            overrides,
            num_layers=trial.num_layers,
            precision=trial.precision,
            backend=trial.backend,
        )
        _check_tensor_size(fields, trial.tp)
        certificate = _certify(fields, plan, trial, out)
    if certificate.file is not None:
        write_json(out, asdict(certificate.file), overwrite)
    return certificate


def _certify(fields: dict[str, Any], plan: HeadPlan, trial: Trial, out: Path) -> Certificate:
    from megatron_hydra.certify.certificate import certify
    from megatron_hydra.certify.checks import Limits
    from megatron_hydra.certify.training import Run
    from megatron_hydra.certify.worlds import Ranks

    ranks = Ranks()
    # Beside the output, because that is where all ranks of several machines see the same folder.
    out.parent.mkdir(parents=True, exist_ok=True)
    own = None
    if is_first_rank():
        own = tempfile.mkdtemp(prefix=".certify.", dir=out.parent.resolve())
    scratch = ranks.share(own)
    if not Path(scratch).is_dir():
        raise UserError(f"{out.parent} must be a folder that all ranks see: {scratch} is missing")
    try:
        return certify(
            Run(fields, plan, Path(scratch) / "weights", Path(scratch), trial.num_steps),
            Limits(trial.tp, trial.cp, trial.pp),
            trial.row_length,
            ranks,
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            rank=int(os.environ.get("RANK", "0")),
            select=lambda check: trial.only is None or trial.only in check.name,
        )
    finally:
        if is_first_rank():
            shutil.rmtree(scratch, ignore_errors=True)


def _check_tensor_size(fields: dict[str, Any], largest: int) -> None:
    """Refuse a size that lets none of the sizes be tried that it asks for."""
    sizes = ParallelSizes.of(fields)
    if largest > 1 and not any(1 < size <= largest for size in sizes.tensor):
        raise UserError(
            f"--tp {largest} does not fit the model: {sizes.why_not_tensor(largest)}; allowed: "
            f"{', '.join(map(str, sizes.tensor))}"
        )
