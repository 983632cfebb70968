"""NaN, Inf and jumps of the loss in a run: found, named, and the step skipped or the run ended.

Every step, each rank takes the largest absolute output of each head, gradient and local loss on
the device, and one flag of them all is summed over the ranks beside the gradient norm. Nothing
else is read, or copied, until the flag says that something is bad.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_hydra.errors import UserError
from megatron_hydra.model.hydra_attention import HydraAttention
from megatron_hydra.training.findings import (
    RankFindings,
    bad_gradients,
    bad_heads,
    bad_losses,
    describe,
    records,
    value_of,
)
from megatron_hydra.training.run_folder import RunFolder
from megatron_hydra.training.samples import Samples, micro_batch_samples

logger = logging.getLogger(__name__)

_REMEMBERED_LOSSES = 100
_LEAST_LOSSES = 10
"""Losses that must be known before one can be called a spike."""


class NumberWatch(pl.Callback):
    """Looks at the numbers of each step; the optimizer and the loop tell it when.

    Attributes:
        is_skipped: Whether the step in progress, or the last one, is skipped.
        num_skipped: Skipped steps of the run, those before a resume counted too.
        grad_norm: Of the last step's whole gradient, before clipping.
        peak_memory_gib: The most that tensors took of a GPU's memory, on the rank where it was
            most, from this start of the run to the last step's gradients; 0 on a CPU.
        is_stopping: Whether the run is to end after this step; the same on every rank.

    Args:
        folder: The run's; what is found is written there, and its configuration says what to do.
        asks_to_stop: Whether this rank is asked to end the run; looked at once per step.
    """

    def __init__(self, folder: RunFolder, asks_to_stop: Callable[[], bool] = lambda: False) -> None:
        self.folder = folder
        self.section, self.data = folder.config.bad_numbers, folder.config.data
        self.stage = folder.config.transfer.stage
        self.asks_to_stop = asks_to_stop
        self.is_skipped = self.is_stopping = False
        self.num_skipped = self._skipped_in_a_row = self._step = 0
        self.grad_norm = self.peak_memory_gib = 0.0
        self._dataset: Any = None
        self._chunks: Sequence[Any] = ()
        self._attentions: list[HydraAttention] = []
        self._largest_outputs: list[Tensor] = []
        self._largest_gradients: list[Tensor] = []
        self._micro_batches: Sequence[dict[str, Any]] = ()
        self._losses: deque[float] = deque(maxlen=_REMEMBERED_LOSSES)

    def attach(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Watch the heads' outputs as the output projection reads them, and the gradients.

        Args:
            chunks: This rank's DDP-wrapped parts of the model.
        """
        self._chunks = chunks
        modules = (module for chunk in chunks for module in chunk.modules())
        self._attentions = [module for module in modules if isinstance(module, HydraAttention)]
        for attention in self._attentions:
            num_heads = len(attention.proj_section.units)
            largest = torch.zeros(num_heads, device=attention.linear_proj.weight.device)
            self._largest_outputs.append(largest)
            # Behind it, not before: Megatron captures no module with hooks of others before it.
            attention.linear_proj.register_forward_hook(_keep_largest(largest))

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Begin a step."""
        self._step, self._dataset = trainer.global_step, trainer.train_dataloader.dataset
        self._micro_batches, self.is_skipped = (), False
        if self._largest_outputs:
            torch._foreach_zero_(self._largest_outputs)

    def on_megatron_reduce_microbatches_start(
        self, microbatch_outputs: Sequence[dict[str, Any]]
    ) -> None:
        """Keep this rank's losses, before they are summed over data-parallel ranks."""
        self._micro_batches = microbatch_outputs

    @torch.no_grad()
    def look_at_gradients(self) -> None:
        """Keep the largest gradient on this rank, while no sum over ranks is in progress."""
        self._largest_gradients = [
            torch.linalg.vector_norm(buffer.grad_data, torch.inf)
            for chunk in self._chunks
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ]

    @torch.no_grad()
    def finds_bad(self, grad_norm: float) -> bool:
        """Whether the step is to be skipped, the same on every rank; all ranks must ask.

        Args:
            grad_norm: Of the whole gradient, before clipping.

        Raises:
            UserError: If the step is bad and steps are not skipped, or too many were in a row.
        """
        self.grad_norm = grad_norm
        losses = [micro_batch["sums"] for micro_batch in self._micro_batches]
        watched = [*self._largest_outputs, *self._largest_gradients, *losses]
        is_bad = ~torch.cat([x.flatten().float() for x in watched]).isfinite().all()
        is_bad |= not math.isfinite(grad_norm)
        told = torch.tensor([self.asks_to_stop(), _peak_memory_gib()], device=is_bad.device)
        flags = torch.cat([is_bad.float()[None], told.float()])
        # Over all ranks: a loss is known on the last pipeline stage only, and a gradient norm
        # leaves out the replicated parameters of all tensor-parallel ranks but the first. A signal
        # to stop reaches ranks at different steps, or one rank alone. The memory goes with it, as
        # a message of its own would cost what these few bytes do not.
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        is_skipped, is_stopping, self.peak_memory_gib = flags.tolist()
        self.is_skipped, self.is_stopping = bool(is_skipped), bool(is_stopping)
        if not self.is_skipped:
            self._skipped_in_a_row = 0
            return False
        self._skip(*self._look_closer())
        return True

    def _skip(self, ranks: Sequence[RankFindings], samples: Samples) -> None:
        most, stops = self.section.max_skipped_in_a_row, self.section.action == "stop"
        if torch.distributed.get_rank() == 0:
            norm = self.grad_norm if math.isfinite(self.grad_norm) else value_of(self.grad_norm)
            self._write(
                "bad_numbers",
                samples,
                is_skipped=not stops and self._skipped_in_a_row < most,
                grad_norm=norm,
                findings=records(ranks),
            )
        description = (
            f"step {self._step + 1} of stage {self.stage} is bad: "
            f"{describe(ranks, self.grad_norm)}; read from {samples.words}"
        )
        ending = "the weights were left as they were before it"
        if stops:
            raise UserError(
                f"{description}; {ending}: the same command goes on from the newest checkpoint, "
                "and leaves such steps out with bad_numbers.action=skip"
            )
        if self._skipped_in_a_row == most:
            raise UserError(
                f"{description}; {ending}, and bad_numbers.max_skipped_in_a_row = {most} steps "
                "before it were skipped: the cause is not in single batches"
            )
        self._skipped_in_a_row += 1
        self.num_skipped += 1
        if torch.distributed.get_rank() == 0:
            logger.warning("%s; skipped: %s", description, ending)

    def _write(self, what: str, samples: Samples, **fields: Any) -> None:
        """A line of the run's findings, for programs."""
        where = {"stage": self.stage, "samples": samples.numbers, "documents": samples.documents}
        self.folder.append_finding(self._step + 1, {"what": what, **where, **fields})

    def _look_closer(self) -> tuple[list[RankFindings], Samples]:
        """What all ranks found, and the samples that it may come from."""
        is_finite = [bool(largest.isfinite()) for largest in self._largest_gradients]
        losses = bad_losses(self._micro_batches)
        own = RankFindings.of_this_rank(
            bad_heads(self._attentions, self._largest_outputs),
            losses,
            bad_gradients(self._chunks),
            not all(is_finite),
        )
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, own)
        return ranks, self._samples(ranks)

    def _samples(self, ranks: Sequence[RankFindings] = ()) -> Samples:
        """The step's samples; of a bad step, those of the micro-batches whose loss is bad."""
        size = parallel_state.get_data_parallel_world_size()
        per_micro_batch = size * self.data.micro_batch_size
        every = range(self.data.global_batch_size // per_micro_batch)
        read = {
            (found.coordinates["data"], finding.micro_batch)
            for found in ranks
            for finding in found.losses
        }
        read = read or {(rank, number) for rank in range(size) for number in every}
        return Samples.at(
            self._dataset,
            (
                position
                for rank, number in read
                for position in micro_batch_samples(self.data, self._step, size, rank, number)
            ),
        )

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """End the loop where the ranks have agreed to; the checkpoint callback then saves."""
        if self.is_stopping:
            trainer.should_stop = True

    def spike(self, loss: float) -> float | None:
        """Name a jump of the loss; return how many times the median it is, or None; on rank 0.

        A spike is a loss above `bad_numbers.spike_factor` times the median of the last 100 steps
        that were not skipped; ten must be known. The median takes no notice of single spikes, and
        moves to a new level of the loss once half of the steps have it. It starts anew when a run
        goes on from a checkpoint.

        Args:
            loss: Of the step in progress.
        """
        if self.is_skipped:
            return None
        usual = median(self._losses) if len(self._losses) >= _LEAST_LOSSES else math.inf
        num_losses = len(self._losses)
        self._losses.append(loss)
        if not loss > self.section.spike_factor * usual:
            return None
        ratio = loss / usual if usual > 0 else math.inf
        samples = self._samples()
        self._write("loss_spike", samples, loss=loss, times_the_median=ratio)
        logger.warning(
            "step %d of stage %s: the loss %.4g is %.3g times the median of the %d steps before; "
            "read from %s",
            self._step + 1,
            self.stage,
            loss,
            ratio,
            num_losses,
            samples.words,
        )
        return ratio

    def state_dict(self) -> dict[str, Any]:
        """The counts, the same on every rank."""
        return {"num_skipped": self.num_skipped, "skipped_in_a_row": self._skipped_in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.num_skipped = state_dict["num_skipped"]
        self._skipped_in_a_row = state_dict["skipped_in_a_row"]


def _peak_memory_gib() -> float:
    if not torch.cuda.is_initialized():
        return 0.0
    return torch.cuda.max_memory_allocated() / 2**30


def _keep_largest(largest: Tensor) -> Any:
    """A hook that keeps the largest absolute value of each head, `[n]`, of `[s, b, n d]`."""

    @torch.no_grad()
    def keep(module: torch.nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        heads = args[0].unflatten(-1, (len(largest), -1))
        found = torch.linalg.vector_norm(heads, torch.inf, dim=(0, 1, 3))
        largest.copy_(torch.maximum(largest, found))  # both carry NaN on

    return keep
