"""Ranks that compute more slowly than the others, which all then wait for.

The callback of nvidia-resiliency-ext scores GPUs by their kernels alone: this one counts reading
and the processor's work in, runs on CPUs too, and says which host it is.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median, median_low
from typing import Any

import lightning.pytorch as pl
import torch

from megatron_hydra.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlowHost:
    """A host with slow ranks.

    Attributes:
        host: Its name.
        ranks: The slow ones, ascending.
        seconds: That the slowest takes to compute a step.
        times_the_median: The same over the median of all ranks.
    """

    host: str
    ranks: list[int]
    seconds: float
    times_the_median: float

    @property
    def words(self) -> str:
        """A sentence."""
        who = f"rank{'s' * (len(self.ranks) > 1)} {', '.join(map(str, self.ranks))} on {self.host}"
        return (
            f"{who} took {self.seconds:.3g} s to compute a step, {self.times_the_median:.3g} times "
            "the ranks' median: all others wait"
        )


class StragglerWatch(pl.Callback):
    """Times what each rank computes until its gradients are to be summed with the others'.

    That is the first place where replicas wait for one another. Ranks that share a replica, by
    tensor, pipeline or context parallelism, wait within it and show alike: it is the replica that
    is found. Reading the step's data counts in.

    Args:
        folder: The run's; its configuration says when to look, and when a rank is slow.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder, section = folder, folder.config.log
        self.every_n_steps, self.factor = section.stragglers_every_n_steps, section.straggler_factor
        self._begin: Any = None
        self._spans: list[tuple[Any, Any]] = []
        self._mark: Callable[[], Any] = time.perf_counter

    def prepare(self) -> None:
        """Choose the clock: a GPU's own, which runs behind the processor."""
        if torch.cuda.is_available() and torch.distributed.get_backend() == "nccl":
            self._mark = _cuda_mark

    def on_train_batch_start(self, *args: Any) -> None:
        """Begin a step."""
        if self.every_n_steps:
            self._begin = self._mark()

    def when_computed(self) -> None:
        """End this rank's part of the step: its gradients are there."""
        if self._begin is not None:
            self._spans.append((self._begin, self._mark()))
            self._begin = None

    def is_due(self, step: int, max_steps: int) -> bool:
        """Whether to look after so many finished steps; by then each rank has finished them."""
        return bool(self.every_n_steps) and step % self.every_n_steps == 0

    def measure(self, model: pl.LightningModule) -> dict[str, float]:
        """Compare the ranks' medians of the steps since the last look; collective.

        Returns:
            `straggling`: the slowest rank's time over the ranks' median (the lower one of two),
            1 or more.
        """
        own = median([_seconds(*span) for span in self._spans]) if self._spans else 0.0
        self._spans.clear()
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, (socket.gethostname(), own))
        usual = median_low([seconds for _, seconds in ranks])
        if not usual:
            return {}
        if torch.distributed.get_rank() == 0:
            for found in slow_hosts(ranks, self.factor):
                logger.warning("%s", found.words)
                step = model.trainer.global_step
                self.folder.append_finding(step, {"what": "straggler", **asdict(found)})
        return {"straggling": max(seconds for _, seconds in ranks) / usual}


def slow_hosts(ranks: Sequence[tuple[str, float]], factor: float) -> list[SlowHost]:
    """The hosts with slow ranks.

    Args:
        ranks: Host and seconds of each rank, in order.
        factor: Times the median from which a rank is slow.
    """
    usual = median_low([seconds for _, seconds in ranks])
    slow: dict[str, list[int]] = {}
    for rank, (host, seconds) in enumerate(ranks):
        if seconds > factor * usual:
            slow.setdefault(host, []).append(rank)
    longest = {host: max(ranks[rank][1] for rank in found) for host, found in slow.items()}
    return [
        SlowHost(host, found, longest[host], longest[host] / usual) for host, found in slow.items()
    ]


def _cuda_mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
