"""Whether a run of the study is to stop, and how long each part of it took."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from megatron_hydra.progress import Progress

logger = logging.getLogger(__name__)


class StoppedError(Exception):
    """A run was asked to stop; what it has finished is saved."""


@dataclass
class Watch:
    """Of one run in one process.

    Attributes:
        asks_to_stop: Asked between steps.
        seconds: By the name of a part.
    """

    asks_to_stop: Callable[[], bool] = lambda: False
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part, and do not begin it after a stop."""
        self.check()
        start = time.monotonic()
        logger.info("%s", name)
        yield
        self.seconds[name] = round(time.monotonic() - start, 1)

    def check(self) -> None:
        """Raise a StoppedError if a stop was asked for."""
        if self.asks_to_stop():
            raise StoppedError

    @property
    def progress(self) -> Progress:
        """Nothing is shown; a stop ends the work between two items."""

        def shown(items: Any, description: str, unit: str) -> Iterator[Any]:
            for item in items:
                self.check()
                yield item

        return shown
