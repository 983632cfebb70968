"""What a run records of each step: scalars, for people and programs, and the progress line."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger

from megatron_hydra.model.build import load_kernels
from megatron_hydra.nemo.bad_numbers import NumberWatch
from megatron_hydra.nemo.wandb_run import open_wandb
from megatron_hydra.training.run_folder import RunFolder
from megatron_hydra.transfer.hidden_states import unwrapped_model

ShowStep = Callable[[int, dict[str, float]], None]


class Measurement(Protocol):
    """What is measured after some steps, beside the training."""

    def prepare(self) -> None:
        """Before the first step; collective."""

    def is_due(self, step: int, max_steps: int) -> bool:
        """Whether to measure after so many finished steps; the same on every rank."""

    def measure(self, model: pl.LightningModule) -> dict[str, float]:
        """Scalars by name, the same on every rank; collective."""


class KernelsCallback(pl.Callback):
    """Loads the heads' kernels before the first step, which is then as long as the others.

    Args:
        micro_batch_size: Its sequences.
    """

    def __init__(self, micro_batch_size: int) -> None:
        self.micro_batch_size = micro_batch_size

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load, when the weights are on the device."""
        load_kernels(unwrapped_model(pl_module.module), self.micro_batch_size)


class ScalarsCallback(pl.Callback):
    """Writes each step's scalars to TensorBoard as `train/<name>`, on rank 0.

    And as a line of JSON, with `step` and `time`, to a file that programs read. A number that is
    none, of a bad step, is null there.

    Weights & Biases gets what TensorBoard gets, where the YAML asks for it.

    Scalars: `loss`, the stage's parts (`alignment/layer_00`, `alignment`, `kl`, `ce`),
    `grad_norm`, `lr`, `step_s` (seconds) and `tokens_per_s`, each the value of the step that it
    stands at; `tokens`, of all steps so far; on a GPU `peak_memory_gib`, as
    :class:`~megatron_hydra.nemo.bad_numbers.NumberWatch` says, and where its peak is known `mfu`,
    0 to 1.
    At a step that is due for it also what a measurement finds, in TensorBoard without `train/`. At
    a step that is skipped also `skipped_steps`, their number so far, and at one whose loss jumps
    `loss_spike`, how many times the usual loss it is.

    Args:
        folder: The run's. Lines of steps that are run again stand behind the earlier ones.
        show: Called after each step with the number of finished steps and the scalars.
        watch: Has looked at the step's numbers.
        measurements: Such as the loss on held-out samples, in order.
        seconds_at_peak: Of a step, see `megatron_hydra.training.utilization`; None: not known.
    """

    def __init__(
        self,
        folder: RunFolder,
        show: ShowStep,
        watch: NumberWatch,
        measurements: Sequence[Measurement],
        seconds_at_peak: float | None = None,
    ) -> None:
        data = folder.config.data
        self.folder, self.show, self.watch = folder, show, watch
        self.tokens_per_step = data.global_batch_size * data.seq_length
        self.every_n_steps = folder.config.log.every_n_steps
        self.measurements, self.seconds_at_peak = measurements, seconds_at_peak
        self._writer: Any = None
        self._wandb: WandbLogger | None = None
        self._step_start = self._lr = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the event file; points of steps that are run again are dropped."""
        for measurement in self.measurements:
            measurement.prepare()
        if trainer.is_global_zero:
            from torch.utils.tensorboard import SummaryWriter

            folder = str(self.folder.tensorboard)
            self._writer = SummaryWriter(folder, purge_step=trainer.global_step + 1)
            self._wandb = open_wandb(self.folder)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Start the step's clock."""
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]
        self._step_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any
    ) -> None:
        """Write and show the finished step."""
        # The checkpoint callback, which runs after this one, names its folders by it.
        pl_module.log("finished_steps", float(trainer.global_step), batch_size=1)
        seconds, step = time.perf_counter() - self._step_start, trainer.global_step
        measured: dict[str, float] = {}
        for measurement in self.measurements:
            # Not where the run is asked to stop: the time until it is killed is for its checkpoint.
            if measurement.is_due(step, trainer.max_steps) and not self.watch.is_stopping:
                measured |= measurement.measure(pl_module)
        if self._writer is None:
            return
        scalars = {name: float(value) for name, value in outputs.items() if name != "num_tokens"}
        scalars |= {"grad_norm": self.watch.grad_norm, "lr": self._lr}
        scalars |= self._resources(step, seconds)
        points = dict(measured)
        if step % self.every_n_steps == 0 or step == trainer.max_steps or measured:
            self.folder.append_metrics(step, {**scalars, **measured})
            points |= {f"train/{name}": value for name, value in scalars.items()}
        if self.watch.is_skipped:
            points["train/skipped_steps"] = self.watch.num_skipped
        spike = self.watch.spike(scalars["loss"])
        if spike is not None:
            points["train/loss_spike"] = spike
        self._write_points(step, points)
        self.show(step, {**scalars, **measured})

    def _resources(self, step: int, seconds: float) -> dict[str, float]:
        """What the step took, as far as it is known."""
        found = {
            "tokens": float(step * self.tokens_per_step),
            "step_s": seconds,
            "tokens_per_s": self.tokens_per_step / seconds,
        }
        if self.watch.peak_memory_gib:
            found["peak_memory_gib"] = self.watch.peak_memory_gib
        if self.seconds_at_peak is not None:
            found["mfu"] = self.seconds_at_peak / seconds
        return found

    def _write_points(self, step: int, points: dict[str, float]) -> None:
        for name, value in points.items():
            self._writer.add_scalar(name, value, step)
        if self._wandb is not None and points:
            self._wandb.log_metrics(points, step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the event file, and W&B's run."""
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.experiment.finish()
