"""Figures with units as a reader wants them: three digits, and the unit that keeps them short."""

from __future__ import annotations

from collections.abc import Sequence

_BYTES = [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B")]
_TIMES = [(3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")]
_FLOPS = [(1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP")]
_LARGE = [(1e12, "trillion"), (1e9, "billion"), (1e6, "million")]


def byte_unit(value: float) -> tuple[str, int]:
    """The largest binary unit that ``value`` bytes fill, and its bytes."""
    size, unit = next((item for item in _BYTES if value >= item[0]), _BYTES[-1])
    return unit, size


def format_bytes(value: float) -> str:
    """Bytes with a binary unit, as ``1.5 KiB``."""
    return _in_units(value, _BYTES)


def format_flops(value: float) -> str:
    """Floating-point operations, as ``3.44 GFLOP``."""
    return _in_units(value, [*_FLOPS, (1, "FLOP")])


def format_time(seconds: float) -> str:
    """A time, as ``27.9 ns``, ``1.2 ms`` or ``2.03 h``."""
    return _in_units(seconds, _TIMES)


def format_large(value: float) -> str:
    """A whole number: in full below a million, then as ``1.72 billion``."""
    return f"{value:,.0f}" if value < 1e6 else _in_units(value, _LARGE)


def format_length(value: float) -> str:
    """A length in tokens, as ``512``, ``4K`` or ``1M`` where that is exact."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if value >= size and value % size == 0:
            return f"{value / size:,.0f}{unit}"
    return f"{value:,.0f}"


def format_plain(value: float) -> str:
    """A tick of an axis in plain digits, as ``0.5`` or ``7,000``."""
    return f"{value:,.8f}".rstrip("0").rstrip(".")


def _in_units(value: float, units: Sequence[tuple[float, str]]) -> str:
    """``value`` in the first unit that it fills, else in the last one."""
    size, unit = next((item for item in units if value >= item[0]), units[-1])
    number = value / size
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
