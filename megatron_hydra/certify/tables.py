"""What certificates hold, and say to people: a table on the screen, the README's layouts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from megatron_hydra.errors import UserError
from megatron_hydra.files import read_json
from megatron_hydra.schema import from_json

BEGIN, END = "<!-- certificates: begin -->", "<!-- certificates: end -->"
_MIB = 2**20
_SPLITS = re.compile(r"^(dp|sp|(tp|cp|pp|vpp)\d+)$")


@dataclass(frozen=True)
class Row:
    """One quantity of one check."""

    check: str
    layout: str
    compared_with: str
    quantity: str
    difference: float
    at: str
    tolerance: float
    passed: bool


@dataclass(frozen=True)
class NotRun:
    """A check that does not fit, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class CertificateFile:
    """The keys of a certificate's file, in their order."""

    schema_version: Literal[1]
    kind: Literal["certificate"]
    passed: bool
    versions: Mapping[str, str]
    device: str
    backend: str
    precision: str
    num_ranks: int
    limits: Mapping[str, int]
    length_tokens: int
    num_steps: int
    config: Mapping[str, Any]
    changed_for_certification: Mapping[str, Any]
    plan_hash: str
    fa_heads: Mapping[str, list[int]]
    rows: list[Row]
    peak_bytes: Mapping[str, list[int]]
    not_run: list[NotRun]


def read_certificate(path: str | os.PathLike[str]) -> CertificateFile:
    """Read a certificate's file.

    Raises:
        UserError: If it cannot be read, or a key or value is not allowed; names the file.
    """
    return from_json(CertificateFile, read_json(path, "certificate", 1), os.fspath(path))


def text_table(certificate: CertificateFile) -> str:
    """One line per check: layout, what it was compared with, and its worst quantity.

    The worst is the one nearest to its tolerance, or furthest beyond it. Every other quantity
    that failed follows on a line of its own.
    """
    lines = [_HEADINGS]
    for (check, layout, other), rows in groupby(certificate.rows, _check_of):
        worst, *others = sorted(rows, key=_strain, reverse=True)
        peaks = certificate.peak_bytes.get(layout)
        peak = f"{max(peaks) / _MIB:,.0f}" if peaks else "-"
        lines.append((check, layout, other, *_cells(worst), peak))
        lines += [("", "", "", *_cells(row), "") for row in others if not row.passed]
    lines += [
        (item.name, f"not run: {item.reason}", "", "", "", "", "", "")
        for item in certificate.not_run
    ]
    widths = [
        max(len(line[column]) for line in lines if not line[1].startswith("not run"))
        for column in range(len(_HEADINGS))
    ]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )


def layouts_table(certificates: Sequence[CertificateFile]) -> str:
    """Markdown: which layouts were certified on what, and the worst of each kind of check.

    Raises:
        UserError: If a certificate has failed: only what holds is supported.
    """
    lines = [
        "| Check | Layouts | Ranks, device | Largest relative difference (tolerance) |",
        "|---|---|---|---|",
    ]
    for certificate in certificates:
        if not certificate.passed:
            raise UserError("a certificate has failed: it cannot say which layouts are supported")
        where = (
            f"{certificate.num_ranks}, {certificate.device}, {certificate.precision}, "
            f"{certificate.backend}"
        )
        grouped: dict[str, list[Row]] = {}
        for row in certificate.rows:
            if not row.quantity.startswith("loaded"):  # of a checkpoint, the last quantity
                grouped.setdefault(row.check.partition(",")[0], []).append(row)
        for check, rows in grouped.items():
            layouts = dict.fromkeys(_layouts(row) for row in rows)
            found = "the same bits"
            if held := [row for row in rows if row.tolerance]:
                worst = max(held, key=_strain)
                found = f"{worst.quantity} {worst.difference:.0e} ({worst.tolerance:.0e})"
            lines.append(f"| {check} | {', '.join(layouts)} | {where} | {found} |")
    return "\n".join(lines)


def write_between_markers(path: Path, table: str) -> None:
    """Put a table between the markers of a text file.

    Raises:
        UserError: If the file cannot be read or has not both markers.
    """
    path.write_text(with_table(path, table), encoding="utf-8")


def with_table(path: Path, table: str) -> str:
    """The file's text with `table` between its markers.

    Raises:
        UserError: As :func:`write_between_markers`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{path} has no place for the table: it needs {BEGIN} and {END}")
    return f"{before}{begin}\n{table}\n{end}{after}"


_HEADINGS = (
    "check", "layout", "compared with", "worst", "difference", "tolerance", "verdict", "peak MiB",
)  # fmt: skip


def _cells(row: Row) -> tuple[str, str, str, str]:
    what = row.quantity
    verdict = "pass" if row.passed else "FAIL"
    if row.at and not row.passed:
        verdict += f" at {row.at}"
    return what, f"{row.difference:.1e}", f"{row.tolerance:.1e}", verdict


def _check_of(row: Row) -> tuple[str, str, str]:
    return row.check, row.layout, row.compared_with


def _strain(row: Row) -> float:
    """How much of its tolerance a quantity uses; what must be zero and is comes last."""
    if row.tolerance:
        return float(row.difference / row.tolerance)
    return float("inf") if row.difference else -1.0


def _layouts(row: Row) -> str:
    """What splits the model; of a checkpoint both ends, with the placement that it forgets."""
    if row.quantity == "next step":
        ends = (row.layout, row.compared_with)
        return " ↔ ".join(" ".join(w for w in end.split() if w[:5] != "micro") for end in ends)
    return " ".join(word for word in row.layout.split() if _SPLITS.match(word))
