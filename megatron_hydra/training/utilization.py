"""How much of the GPUs' arithmetic a training step uses (MFU), where their peak is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.cost import DEVICES
from megatron_hydra.selection.shape import ModelShape
from megatron_hydra.training.memory import counted_stage
from megatron_hydra.training.step_time import Work

if TYPE_CHECKING:
    from megatron_hydra.training.config import RunConfig

# As the driver names them. Whole names: PCIe and NVL cards, and parts of a card, have other peaks.
_BY_DRIVER_NAME = {
    "NVIDIA H100 80GB HBM3": DEVICES["h100"],
    "NVIDIA H200": DEVICES["h200"],
}


def flops_of_step(config: RunConfig, shape: ModelShape, plan: HeadPlan) -> float | None:
    """FLOPs that a step's models ask for, of all samples: three passes of what is trained.

    A backward pass counts as two forward ones (Kaplan et al., arXiv 2001.08361, section 2.1). A
    teacher adds one pass; what is recomputed adds nothing, nor do losses, norms and the optimizer.

    Returns:
        None where documents of a sample do not see one another: their lengths are the data's.
    """
    data = config.data
    if data.reset_at_document_end:
        return None
    work = Work.of(shape, plan, counted_stage(config), data.seq_length)
    return data.global_batch_size * sum(work.flops(recomputed_share=0.0, pipeline=1))


def seconds_at_peak(
    config: RunConfig, shape: ModelShape, plan: HeadPlan, driver_name: str, num_gpus: int
) -> float | None:
    """Seconds of a step whose GPUs do nothing but :func:`flops_of_step`, at their bfloat16 peak.

    Divided by a step's time it is the MFU (Chowdhery et al., arXiv 2204.02311, appendix B).

    Args:
        config: Of the run.
        shape: Of the model.
        plan: Of the hybrid.
        driver_name: Of the GPUs, as CUDA tells it.
        num_gpus: In all.

    Returns:
        None where it is not known: other GPUs, other formats than bf16, packed documents.
    """
    device, flops = _BY_DRIVER_NAME.get(driver_name), flops_of_step(config, shape, plan)
    if device is None or flops is None or config.trainer.precision != "bf16":
        return None
    return flops / (num_gpus * device.flops_per_s)
