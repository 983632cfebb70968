"""What every benchmark shares: the device's own ceilings, medians, peaks, tables, files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

_PACKAGES = (
    "torch", "triton", "megatron-core", "nemo-toolkit", "transformer-engine", "transformers",
    "fla-core", "flash-qla", "tilelang", "liger-kernel",
)  # fmt: skip


def device_figures() -> dict[str, Any]:
    """The device, the versions, and the two ceilings of this very run.

    Returns:
        `device`, `versions`, `copy_gb_per_s` (bytes read and written) and `matmul_tflop_per_s`
        (bf16, 8192 cubed, random data).
    """
    x = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    y = torch.empty_like(x)
    copy_ms = median_ms(lambda: y.copy_(x))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul_ms = median_ms(lambda: a @ b)
    return {
        "device": torch.cuda.get_device_name(),
        "versions": _versions(),
        "copy_gb_per_s": 2 * x.numel() / copy_ms / 1e6,
        "matmul_tflop_per_s": 2 * 8192**3 / matmul_ms / 1e9,
    }


def median_ms(
    function: Callable[[], Any],
    *,
    grad_to_none: Sequence[torch.Tensor] | None = None,
    rep_ms: int = 200,
) -> float:
    """Median milliseconds of a call, the L2 cache emptied before each; three runs of a long one."""

    def run() -> None:
        for tensor in grad_to_none or ():
            tensor.grad = None
        function()

    run()
    first = _event_ms(run)
    if first > rep_ms / 3:
        return statistics.median([first, _event_ms(run), _event_ms(run)])
    return do_bench(
        function, warmup=50, rep=rep_ms, grad_to_none=grad_to_none, return_mode="median"
    )


def peak_gib(function: Callable[[], Any]) -> float:
    """Peak memory that a call takes beyond what was there before it, its results counted in."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows of equal keys under their names."""
    if not rows:
        return
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def write(path: Path | None, figures: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write a benchmark's figures and rows as JSON, each row with its device; else nothing."""
    if path is not None:
        named = [{"device": figures["device"], **row} for row in rows]
        beside = path.with_name(f".{path.name}.partial")
        beside.write_text(json.dumps({**figures, "rows": named}, indent=1) + "\n")
        os.replace(beside, path)


def _versions() -> dict[str, str]:
    """Of Python and the packages whose speed is measured."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _event_ms(function: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
