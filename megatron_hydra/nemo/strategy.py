"""NeMo's Megatron strategy, with checkpoints that a machine without a GPU can read and write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nemo.lightning as nl
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallelConfig
from nemo.lightning.io.pl import MegatronCheckpointIO

from megatron_hydra.conversion.distributed_weights import InProcessSave, damage_named
from megatron_hydra.nemo.config import StrategySection


def make_strategy(section: StrategySection, backend: str, dtype: torch.dtype) -> HydraStrategy:
    """The strategy of the YAML's section.

    Args:
        section: The parallel layout.
        backend: Of the process groups: `gloo` or `nccl`.
        dtype: Of the hidden states that go from one pipeline stage to the next.
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
        checkpoint_io=_InProcessCheckpointIO(),
        ckpt_async_save=False,
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

    def load_optimizer_state_dict(
        self, checkpoint: Mapping[str, Any], selective_restore: bool = False
    ) -> None:
        """Load the optimizers' states; NeMo's own makes a CUDA device mesh first, for FSDP."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer"], strict=True):
            optimizer.load_state_dict(state)


class _InProcessCheckpointIO(MegatronCheckpointIO):
    """NeMo's checkpoints, written without a helper process and read without CUDA.

    The helper that Megatron starts at every save outlives a killed run, and costs a second or two.
    """

    def load_checkpoint(
        self,
        path: str | Path,
        sharded_state_dict: Any = None,
        map_location: Any = None,
        strict: Any = None,
    ) -> dict[str, Any]:
        # Nothing may be missing, unlike in NeMo's own: a run that goes on goes on exactly.
        with damage_named(Path(path)):
            return dist_checkpointing.load(
                sharded_state_dict, str(path), strict=StrictHandling.ASSUME_OK_UNEXPECTED
            )

    def _determine_dist_ckpt_save_strategy(self) -> FullyParallelSaveStrategyWrapper:
        return FullyParallelSaveStrategyWrapper(InProcessSave("torch_dist", 1), None, False)
