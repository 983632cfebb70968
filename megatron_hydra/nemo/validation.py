"""A run's validation loss: its stage's own, on the same held-out samples each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.utils.data import default_collate

from megatron_hydra.nemo.data import make_data_module
from megatron_hydra.training.config import RunConfig
from megatron_hydra.training.random_states import random_states, set_random_states
from megatron_hydra.training.run_files import VALIDATION
from megatron_hydra.training.samples import micro_batch_samples

_SHOWN = ("loss", "kl", "ce")


class Validation:
    """Measures the loss on held-out samples, and leaves the training as if it had not.

    An own forward pass of Megatron's schedule and not NeMo's validation loop, which counts samples
    and sets Lightning's state beside the training's. No data loader, which draws from the random
    numbers; whatever else does gets them back. The model stays in training mode, so that training
    and validation loss are one function (in evaluation mode `fa_query_scale` adds a scale).

    Args:
        config: The run's configuration.
        end_of_document: Token that ends a document; read only to mask its loss.
        index_folder: Where Megatron keeps its sample indices.
    """

    def __init__(self, config: RunConfig, end_of_document: int, index_folder: Path) -> None:
        self.section = config.data.validation
        self.every_n_steps = config.trainer.validate_every_n_steps
        self.num_steps = config.trainer.validation_steps
        self.end_of_document, self.index_folder = end_of_document, index_folder
        self._dataset: Any = None

    def prepare(self) -> None:
        """Lay out the samples; collective, before the first step."""
        if not self.every_n_steps:
            return
        module = make_data_module(self.section, self.end_of_document, self.index_folder)
        num_samples = self.num_steps * self.section.global_batch_size
        with _kept_random_states():
            self._dataset, _, _ = BlendedMegatronDatasetBuilder(
                module.dataset_cls,
                [num_samples, 0, 0],
                is_built_on_rank=lambda: True,
                config=module.gpt_dataset_config,
            ).build()

    def is_due(self, step: int, max_steps: int) -> bool:
        """Whether to measure after so many finished steps of a run."""
        return bool(self.every_n_steps) and (step % self.every_n_steps == 0 or step == max_steps)

    @torch.no_grad()
    def measure(self, model: pl.LightningModule) -> dict[str, float]:
        """The means over the samples' tokens, the same on every rank; collective.

        Args:
            model: The run's HydraModel, whose strategy holds what Megatron's schedule runs.

        Returns:
            `validation/loss` and, in stages 2 and 3, `validation/ce` and `validation/kl`.
        """
        reduction = model.training_loss_reduction

        def forward_step(batches: Iterator[Any], chunk: Any) -> tuple[Any, Any]:
            batch = model.data_step(batches)
            return model.forward_step(batch), lambda output: reduction.forward(batch, output)

        section = self.section
        num_replicas = parallel_state.get_data_parallel_world_size()
        per_step = section.global_batch_size // (section.micro_batch_size * num_replicas)
        chunks = model.trainer.strategy.megatron_parallel.pipeline
        with _kept_random_states():
            outputs = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=self._micro_batches(per_step),
                model=chunks,
                num_microbatches=self.num_steps * per_step,
                seq_length=section.seq_length,
                micro_batch_size=section.micro_batch_size,
                forward_only=True,
            )
            # Nothing on a pipeline stage before the last.
            reduced = model.over_pipeline(reduction.reduce(outputs) if outputs else {})
        return {f"{VALIDATION}{name}": float(reduced[name]) for name in _SHOWN if name in reduced}

    def _micro_batches(self, per_step: int) -> Iterator[dict[str, Tensor]]:
        """This replica's, dealt as the training's are."""
        size = parallel_state.get_data_parallel_world_size()
        rank = parallel_state.get_data_parallel_rank()
        for step in range(self.num_steps):
            for number in range(per_step):
                places = micro_batch_samples(self.section, step, size, rank, number)
                yield default_collate([self._dataset[place] for place in places])


@contextmanager
def _kept_random_states() -> Iterator[None]:
    kept = random_states()
    try:
        yield
    finally:
        set_random_states(kept)
