"""What a step of `training_step.py` should cost: operations, memory, and what each rank's share is.

Counted from the plan: layers, and tensor-parallel ranks, may have any numbers of FA heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qwen3_1p7b import SHAPE

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.cost import flops_of_sequence
from megatron_hydra.training.memory import training_memory
from megatron_hydra.training.step_time import Work

MODELOPT = "distill, modelopt"
PEAK_TFLOP_PER_S = 989.0  # dense bf16, NVIDIA's data sheets of H100 SXM and H200 SXM
# The transfer's stage with the same losses.
_OF_TRANSFER = {MODELOPT: "distill", "full": "long_context", "full distill": "distill"}


def predicted_gib(
    stage: str,
    length: int,
    recompute_layers: int,
    plan: HeadPlan | None,
    layers: int,
    chunk_tokens: int,
    tp_size: int,
    cp_size: int,
) -> float | None:
    """The peak by formula, workspaces left out; None for ModelOpt, which it does not know."""
    if stage == MODELOPT:
        return None
    memory = training_memory(
        replace(SHAPE, num_layers=layers), plan, _OF_TRANSFER.get(stage, stage), length,
        "full" if recompute_layers else "none", chunk_tokens,
        recompute_layers=recompute_layers or None, tp_size=tp_size, cp_size=cp_size,
    )  # fmt: skip
    return memory.peak / 2**30


def model_tflop(stage: str, length: int, layers: int, plan: HeadPlan | None) -> float:
    """Operations of a step, as a training counts them for its own MFU.

    Without a plan for the stages of full attention.
    """
    shape, of_transfer = replace(SHAPE, num_layers=layers), _OF_TRANSFER.get(stage, stage)
    if plan is not None:
        return sum(Work.of(shape, plan, of_transfer, length).flops(0.0, 1)) / 1e12
    passes = 3 + (of_transfer == "distill")
    return passes * flops_of_sequence(shape, length).of(None) / 1e12


def rank_tflop(student: Any) -> tuple[list[float], float]:
    """What the placement predicts: forward TFLOP of each rank; of each layer's dearest, summed."""
    costs = [layer.self_attention.placement.predicted_costs for layer in student.decoder.layers]
    return [sum(of_rank) / 1e12 for of_rank in zip(*costs)], sum(map(max, costs)) / 1e12
