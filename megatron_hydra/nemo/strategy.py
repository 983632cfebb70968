"""NeMo's Megatron strategy, on machines with and without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import nemo.lightning as nl
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from torch.utils.data import DataLoader

from megatron_hydra.nemo.checkpoint_io import make_checkpoint_io
from megatron_hydra.nemo.config import StrategySection


def make_strategy(
    section: StrategySection, backend: str, dtype: torch.dtype, async_save: bool
) -> HydraStrategy:
    """The strategy of the YAML's section.

    Args:
        section: The parallel layout.
        backend: Of the process groups: `gloo` or `nccl`.
        dtype: Of the hidden states that go from one pipeline stage to the next.
        async_save: Write checkpoints while the training goes on.
    """
    strategy = HydraStrategy(
        tensor_model_parallel_size=section.tensor_model_parallel_size,
        pipeline_model_parallel_size=section.pipeline_model_parallel_size,
        context_parallel_size=section.context_parallel_size,
        sequence_parallel=section.sequence_parallel,
        pipeline_dtype=dtype,
        ddp=DistributedDataParallelConfig(
            check_for_nan_in_grad=False,  # a traceback on one rank: see bad_numbers.py
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=section.use_distributed_optimizer,
        ),
        process_group_backend=backend,
        checkpoint_io=make_checkpoint_io(async_save),
        ckpt_async_save=async_save,
        ckpt_optim_fully_reshardable=True,
    )
    strategy.log_train_loss = False  # it is the last pipeline stage's part alone
    return strategy


class HydraStrategy(nl.MegatronStrategy):
    """`nl.MegatronStrategy` for a HydraModel, whose optimizer state loads without CUDA."""

    def training_step(
        self, dataloader_iter: Any, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Run forward and backward of a step; every pipeline stage gets the step's scalars."""
        reduced = super().training_step(dataloader_iter, *args, **kwargs)
        return self.lightning_module.over_pipeline(reduced)

    def process_dataloader(self, dataloader: DataLoader) -> DataLoader:
        """Deal the samples that are left out to the ranks; after the last step none may be left.

        A run that was killed between its last checkpoint and its hybrid comes here, and must not
        fail for want of a sample that it would not read.
        """
        if self.trainer.global_step >= self.trainer.max_steps:
            return dataloader
        return super().process_dataloader(dataloader)

    def load_optimizer_state_dict(
        self, checkpoint: Mapping[str, Any], selective_restore: bool = False
    ) -> None:
        """Load the optimizers' states; NeMo's own makes a CUDA device mesh first, for FSDP."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer"], strict=True):
            optimizer.load_state_dict(state)
