"""Progress of a long loop: a bar on a terminal, a plain line every so many seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

SHOWN_SCALARS = ("loss", "kl", "ce", "grad_norm", "lr", "tokens_per_s")
"""Of a training step, for people, in this order."""
_SECONDS_BETWEEN_LINES = 30.0


def progress(items: Iterable[Item], description: str, unit: str) -> Iterator[Item]:
    """Yield ``items`` and tell on stderr how far the loop is; nothing for an empty list.

    Args:
        items: What is gone through.
        description: What is done with them.
        unit: One of them, in the singular.
    """
    total = len(items) if isinstance(items, Sized) else None
    with meter(description, unit, total) as shown:
        for item in items:
            yield item
            shown.update(1)


def meter(description: str, unit: str, total: int | None, initial: int = 0, **options: Any) -> tqdm:
    """What :func:`progress` shows, for a loop that is another's: a tqdm bar or its like.

    Args:
        description: What is done.
        unit: What is counted, in the singular.
        total: How many there are; None where that is unknown, 0 shows nothing.
        initial: How many are done already.
        **options: More of tqdm's, such as ``unit_scale``.
    """
    kind = tqdm if sys.stderr.isatty() else _Lines
    return kind(
        desc=description,
        unit=unit,
        total=total,
        initial=initial,
        disable=total == 0,
        dynamic_ncols=True,
        **options,
    )


class _Lines(tqdm):
    """tqdm whose state is printed as whole lines: a bar moved by carriage returns is one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._said_at, self._said = -float("inf"), ""
        super().__init__(*args, **{**kwargs, "dynamic_ncols": False, "ncols": 0, "mininterval": 1})

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Print a line if the last one was long ago."""
        if time.monotonic() - self._said_at >= _SECONDS_BETWEEN_LINES:
            self._say()
        return True

    def close(self) -> None:
        """Print the last state."""
        if not self.disable:
            self._say()
            self.disable = True  # tqdm's own would move the cursor
            type(self)._instances.discard(self)

    def _say(self) -> None:
        line = self.__str__().strip()
        if line != self._said:
            print(line, file=sys.stderr, flush=True)
            self._said, self._said_at = line, time.monotonic()
