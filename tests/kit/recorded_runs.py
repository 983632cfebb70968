"""Runs NeMo's loop in this process and records what it did: batches, states, scalars, warnings."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.faults import Fault
from torch import Tensor

from megatron_hydra.errors import UserError


@dataclass
class StepStart:
    """Everything that a step changes, at its start."""

    weights: dict[str, Tensor]
    optimizer: Any


@dataclass
class RecordedRun:
    """What a run did on this rank."""

    lines: list[str] = field(default_factory=list)
    """The package's warnings."""
    shown: dict[str, dict[int, float]] = field(default_factory=dict)
    """Scalars by name, then by finished steps; on rank 0."""
    batches: list[Tensor] = field(default_factory=list)
    """Each micro-batch's tokens with the last label, `[b, s + 1]`."""
    samples: list[Tensor] = field(default_factory=list)
    """Of all ranks' batches, in the run's order."""
    states: list[StepStart] = field(default_factory=list)
    findings: list[dict[str, Any]] = field(default_factory=list)
    """What stands in `findings.jsonl`, on every rank."""
    model: Any = None
    error: UserError | None = None


def recorded_run(
    config_file: Path, overrides: list[str], faults: Mapping[tuple[int, int], Fault] | None = None
) -> RecordedRun:
    """Train on a process of :func:`megatron_hydra.testing.run_distributed`.

    Args:
        config_file: The run's YAML.
        overrides: Each `section.key=value`.
        faults: By step of this call and this rank's micro-batch, both counted from 0.
    """
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from nv_one_logger.training_telemetry.api.callbacks import (
        on_train_end,
        on_training_single_iteration_end,
    )

    from megatron_hydra.nemo.training import TrainingRun
    from megatron_hydra.training.config import load_config

    seen = RecordedRun()

    def show(step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            seen.shown.setdefault(name, {})[step] = value

    config = load_config(config_file, overrides)
    run = TrainingRun(config)
    with _warnings() as seen.lines, _recorded(seen, faults or {}):
        try:
            run.run(show)
        except UserError as error:
            seen.error = error
            on_training_single_iteration_end()
            on_train_end()  # else NeMo's telemetry takes this process for one that is training
    _gather_samples(seen)
    if run.folder.findings.exists():  # of all ranks the first has written it before it was here
        lines = run.folder.findings.read_text().splitlines()
        seen.findings = [json.loads(line) for line in lines]
    unset_num_microbatches_calculator()  # NeMo keeps the first run's
    return seen


@contextmanager
def without_watch() -> Iterator[None]:
    """Runs have no hook, no look at gradients, no flag; the gradient norm is handed on."""
    from megatron_hydra.nemo.bad_numbers import NumberWatch

    def finds_bad(self: NumberWatch, grad_norm: float) -> bool:
        self.grad_norm = grad_norm
        return False

    replaced = {
        "attach": lambda self, chunks: None,
        "look_at_gradients": lambda self: None,
        "finds_bad": finds_bad,
        "spike": lambda self, loss: None,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, function in replaced.items():
            patch.setattr(NumberWatch, name, function)
        yield


@contextmanager
def _recorded(seen: RecordedRun, faults: Mapping[tuple[int, int], Fault]) -> Iterator[None]:
    """Record states and batches, and do the faults."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    from megatron_hydra.nemo.model import HydraModel
    from megatron_hydra.transfer.hidden_states import unwrapped_model

    forward_step = HydraModel.forward_step

    def spy(self: HydraModel, batch: dict[str, Tensor]) -> Any:
        seen.model = unwrapped_model(self)
        step, micro_batch = divmod(len(seen.batches), get_num_microbatches())
        if micro_batch == 0:
            weights = {name: p.detach().clone() for name, p in self.named_parameters()}
            optimizer = self.trainer.optimizers[0].mcore_optimizer.state_dict()
            seen.states.append(StepStart(weights, deepcopy(optimizer["state"])))
        seen.batches.append(torch.cat((batch["tokens"], batch["labels"][:, -1:]), dim=1))
        fault = faults.get((step, micro_batch))
        handles = fault(seen.model) if fault else []
        output = forward_step(self, batch)
        for handle in handles:
            handle.remove()
        return output

    HydraModel.forward_step = spy
    try:
        yield
    finally:
        HydraModel.forward_step = forward_step


def _gather_samples(seen: RecordedRun) -> None:
    from megatron.core import parallel_state

    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, seen.batches)
    size = parallel_state.get_data_parallel_world_size()
    replicas = everyone[:: len(everyone) // size]
    seen.samples = [batch for micro_batch in zip(*replicas, strict=True) for batch in micro_batch]


def is_bit_equal(left: Any, right: Any) -> bool:
    """Equal bit by bit."""
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(is_bit_equal(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(is_bit_equal, left, right))
    return left == right


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Warnings of the package."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("megatron_hydra")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
