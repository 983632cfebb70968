"""What a step of `training_step.py` should cost: operations, memory, and what each rank's share is.

Counted from the plan: layers, and tensor-parallel ranks, may have any numbers of FA heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.cost import ModelShape, num_stored_groups
from megatron_hydra.training.memory import training_memory

LAYERS, HEADS, GROUPS, DIM, HIDDEN, FFN, VOCAB = 28, 16, 8, 128, 2048, 6144, 151936
SHAPE = ModelShape(LAYERS, HEADS, GROUPS, DIM, HIDDEN, FFN, VOCAB, tied_embeddings=True)
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
    """Operations of a step: two per weight and token forward, twice that backward.

    Attention counts its causal half; the gated delta rule of a head counts 6 d^2 per token (a read,
    a correction and a write of its state). Without a plan for the stages of full attention.
    """
    matrix = HIDDEN * DIM
    num_heads = layers * HEADS
    common = layers * 3 * HIDDEN * FFN + num_heads * matrix  # MLP, output projection
    logits = 2 * length * HIDDEN * VOCAB

    def attention(fa_heads: int) -> float:
        return fa_heads * 2 * DIM * length**2 + (num_heads - fa_heads) * 6 * DIM**2 * length

    qkv = matrix * (num_heads + 2 * layers * GROUPS)
    teacher = 2 * length * (qkv + common) + attention(num_heads)
    if plan is None:
        student = teacher
    else:
        fa_heads, groups = plan.num_fa_heads, num_stored_groups(plan)
        # Query and gate, key and value of a group; query, key, value and gate of an LA head.
        hybrid = matrix * (2 * fa_heads + 2 * groups + 4 * (num_heads - fa_heads))
        student = 2 * length * (hybrid + common) + attention(fa_heads)
    mlp = 2 * length * layers * 3 * HIDDEN * FFN
    total = {
        "align": teacher + 3 * (student - mlp),
        "distill": 3 * student + teacher + 4 * logits,
        "long_context": 3 * (student + logits),
    }[_OF_TRANSFER.get(stage, stage)]
    return total / 1e12


def rank_tflop(student: Any) -> tuple[list[float], float]:
    """What the placement predicts: forward TFLOP of each rank; of each layer's dearest, summed."""
    costs = [layer.self_attention.placement.predicted_costs for layer in student.decoder.layers]
    return [sum(of_rank) / 1e12 for of_rank in zip(*costs)], sum(map(max, costs)) / 1e12
