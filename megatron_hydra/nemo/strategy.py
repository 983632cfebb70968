"""NeMo's Megatron strategy and its precision, on machines with and without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import nemo.lightning as nl
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from megatron.core.distributed import DistributedDataParallelConfig
from torch.distributed import distributed_c10d
from torch.utils.data import DataLoader

from megatron_hydra.errors import UserError
from megatron_hydra.nemo.checkpoint_io import make_checkpoint_io
from megatron_hydra.training.config import StrategySection, TrainerSection


def make_strategy(
    section: StrategySection,
    backend: str,
    dtype: torch.dtype,
    async_save: bool,
    when_joined: Callable[[], None],
) -> HydraStrategy:
    """The strategy of the YAML's section.

    Args:
        section: The parallel layout.
        backend: Of the process groups: `gloo` or `nccl`.
        dtype: Of the hidden states that go from one pipeline stage to the next.
        async_save: Write checkpoints while the training goes on.
        when_joined: Called once the ranks can talk, before anything is built.
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
            overlap_grad_reduce=section.overlap_grad_reduce,
        ),
        process_group_backend=backend,
        checkpoint_io=make_checkpoint_io(async_save),
        ckpt_async_save=async_save,
        ckpt_optim_fully_reshardable=True,
    )
    strategy.when_joined = when_joined
    strategy.limit = timedelta(minutes=section.timeout_minutes)
    strategy.log_train_loss = False  # it is the last pipeline stage's part alone
    return strategy


def limit_groups(limit: timedelta) -> None:
    """Have every group of this process wait so long for its ranks, then raise or, on GPUs, abort.

    NeMo and Megatron make them with limits of their own, 10 and 30 minutes.
    """
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(limit, group)


def use_gpu(section: TrainerSection) -> bool:
    """Whether a run is on GPUs.

    Raises:
        UserError: If that is not what the section asks for.
    """
    available = torch.cuda.is_available()
    if section.accelerator == "gpu" and not available:
        raise UserError("trainer.accelerator is 'gpu', but PyTorch finds no GPU here")
    if section.accelerator == "cpu" and available:
        raise UserError(
            "trainer.accelerator is 'cpu' on a machine with a GPU: Megatron would use the GPU; "
            "hide it (CUDA_VISIBLE_DEVICES=) or choose 'auto'"
        )
    return available


def make_plugins(section: TrainerSection) -> list[Any]:
    """Lightning's plugins: the precision, and who has started the ranks.

    That is torchrun, or nobody. Left to itself Lightning takes Slurm's variables, which every shell
    of an allocation has, for ranks that srun has started, and asks for as many devices.
    """
    precision = make_precision(section)
    plugins: list[Any] = [] if precision is None else [precision]
    if not torch.distributed.is_torchelastic_launched():
        plugins.append(LightningEnvironment())
    return plugins


def make_precision(section: TrainerSection) -> nl.MegatronMixedPrecision | None:
    """NeMo's plugin for a bf16 or FP8 run.

    Left to itself it builds the student in float32, and casts it once it is wrapped: no weight of
    it would equal the teacher's, which is built in bfloat16.
    """
    if section.precision == "fp32":
        return None
    return nl.MegatronMixedPrecision(
        precision="bf16-mixed", params_dtype=torch.bfloat16, **fp8_fields(section)
    )


def fp8_fields(section: TrainerSection) -> dict[str, str]:
    """Megatron's fields; its recipe `tensorwise` keeps no state from step to step."""
    if section.precision != "fp8":
        return {}
    return {"fp8": "hybrid", "fp8_recipe": "tensorwise"}


class HydraStrategy(nl.MegatronStrategy):
    """`nl.MegatronStrategy` for a HydraModel, whose optimizer state loads without CUDA."""

    when_joined: Callable[[], None]
    limit: timedelta

    def setup_environment(self) -> None:
        """Make the process groups, and look at what the ranks have in common."""
        super().setup_environment()
        limit_groups(self.limit)
        self.when_joined()

    def init_model_parallel(self) -> None:
        """Wrap the model, in order with what comes before and after it.

        NeMo 2.7.3 does so on a CUDA stream of its own that waits for no other and none for it:
        where the GPU is busy, Megatron's DDP copies weights into its buffers after their memory was
        given away, and the optimizer copies buffers that are not filled yet (Megatron-LM's issue
        2044, mended there in pull requests 2652 and 2852, in Megatron-Bridge in 1706).
        """
        parallel, init_ddp = self.megatron_parallel, self.megatron_parallel.init_ddp

        def in_order() -> None:
            torch.cuda.synchronize()
            init_ddp()
            torch.cuda.synchronize()

        parallel.init_ddp = in_order
        super().init_model_parallel()

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
