"""How the library tells how far a long loop is, without printing: whoever calls it shows that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")


class Progress(Protocol):
    """Shows how far a loop is, as tqdm does; ``unit`` names one item."""

    def __call__(self, items: Sequence[Item], description: str, unit: str) -> Any:
        """Yield the items."""


def no_progress(items: Sequence[Item], description: str, unit: str) -> Sequence[Item]:
    """Yield the items and show nothing."""
    return items
