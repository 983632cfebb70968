"""What each GPU needs to train a plan: weights, optimizer, activations and the loss, in bytes.

Counted is what Transformer Engine's modules, FlashQLA and our Triton kernels keep for the backward
pass in bfloat16, each tensor of it listed once by `torch.autograd.graph.saved_tensors_hooks` on an
H100 (kernels/benchmarks/RESULTS.md holds prediction beside measurement). All layers lie on the GPU,
each head and row of weights on one tensor-parallel rank; data- and context-parallel ranks share the
optimizer's state.

Legend: T = tokens of a micro-batch, h = hidden size, f = the MLP's width, d = head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.cost import (
    ModelShape,
    PlanCost,
    attention_weight_bytes,
    weight_bytes,
)

_WEIGHT, _GRADIENT, _OPTIMIZER = 2, 4, 12  # bytes a parameter; float32 but for the weights
_CHUNK = 64  # tokens of the LA kernel's triangular systems
_MULTIPROCESSORS = 132  # of an H100 or H200: FlashQLA cuts sequences into as many parts times heads
_TEACHER_SHARE = 3 / 8  # of a chunk of the loss, see `hydra_kernels.linear_kl`


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one GPU.

    Attributes:
        state: Weights, the teacher's too, gradients and optimizer.
        kept: Activations that wait for the backward pass.
        passing: The most that lives for a moment beside both.
    """

    state: float
    kept: float
    passing: float

    @property
    def peak(self) -> float:
        """All three."""
        return self.state + self.kept + self.passing


def training_memory(
    shape: ModelShape,
    plan: HeadPlan | None,
    stage: Literal["align", "distill", "long_context"],
    num_tokens: int,
    recompute: Literal["none", "full"] = "none",
    chunk_tokens: int = 1024,
    dp_size: int = 1,
    recompute_layers: int | None = None,
    *,
    tp_size: int = 1,
    cp_size: int = 1,
) -> TrainingMemory:
    """Predict the peak of a training step on a rank.

    Args:
        shape: The teacher's.
        plan: The hybrid's; None trains the teacher's own architecture.
        stage: As `transfer.stage`.
        num_tokens: T.
        recompute: As `model.recompute`.
        chunk_tokens: As `transfer.chunk_tokens`.
        dp_size: Data-parallel ranks, under the distributed optimizer.
        recompute_layers: As `model.recompute_layers`.
        tp_size: Tensor-parallel ranks, with sequence parallelism, heads placed `balanced`.
        cp_size: Context-parallel ranks.
    """
    teacher = 0.0 if stage == "long_context" else weight_bytes(shape, "bf16").of(None)
    # Stage 1 takes all else from the teacher.
    trained_part = attention_weight_bytes if stage == "align" else weight_bytes
    trained = trained_part(shape, "bf16").of(plan)
    trained *= 1 + (_GRADIENT + _OPTIMIZER / (dp_size * cp_size)) / _WEIGHT
    state = (teacher + trained) / tp_size

    h, f, vocab = shape.hidden_size, shape.ffn_hidden_size, shape.vocab_size / tp_size
    # A tensor-parallel rank keeps its part of the tokens, or of the heads, of everything.
    tokens = num_tokens / (tp_size * cp_size)
    value_heads = 1 if cp_size == 1 else 2
    attention = attention_bytes(shape, value_heads).of(plan) / shape.num_layers
    mlp = 4 * h + 4 + 6 * f
    if stage == "align":
        layer = attention + 4 * h  # and the float32 difference from the teacher
        layer_inputs = 4 * h  # the student's, and the teacher's output
    else:
        layer, layer_inputs = attention + mlp, 2 * h
    one_layer = tokens * layer
    if plan is not None:
        one_layer += _MULTIPROCESSORS * shape.head_dim**2 * (4 + 2)
    num_recomputed = 0 if recompute == "none" else recompute_layers or shape.num_layers
    num_whole = shape.num_layers - num_recomputed
    kept = num_recomputed * tokens * layer_inputs + num_whole * one_layer
    # Layers that are kept whole are free by then: the first layers are recomputed, and last.
    recomputes = num_whole == 0
    again = one_layer if recomputes else 0.0
    if tp_size > 1:  # a linear's input for its weights' gradient, gathered from all ranks
        again += tokens * tp_size * 2 * h

    if stage == "align":
        if recomputes:  # the layer's output, and both in float32 beside their difference; or later
            gradients = attention_gradient_bytes(shape, value_heads).of(plan) / shape.num_layers
            again += tokens * max(10 * h, gradients)
        return TrainingMemory(state, kept, max(tokens * mlp, again))  # the teacher's MLP
    kept += tokens * 4 * h  # the final norm's input and output
    logits = 2 * chunk_tokens * vocab
    loss = tokens * 2 * h + logits
    if teacher:
        loss += tokens * 2 * h + _TEACHER_SHARE * logits
    backward = again + tokens * 2 * (h + f)
    if recomputes:
        backward += tokens * 2 * h  # the layer's output
    output_gradient = 4 * vocab * h  # of the output weights; ends with the backward pass
    return TrainingMemory(state, kept, output_gradient + max(loss, backward))


def attention_bytes(shape: ModelShape, value_heads: int = 1) -> PlanCost:
    """Bytes a token that the attentions of all layers keep, their inputs and norms counted in.

    Args:
        shape: The teacher's.
        value_heads: Of each LA head: two where context-parallel ranks share the tokens, and its
            output is composed of theirs.
    """
    h, d, heads = shape.hidden_size, shape.head_dim, shape.num_heads
    # Input, normed input, its rate; what the output projection reads.
    common = 4 * h + 4 + 2 * heads * d
    # Query and gate as projected; query and key before and after their norms, value, output; the
    # norms' rates, the softmax's sum.
    fa_head = 4 * d + 12 * d + 12
    group = 4 * d  # key and value as projected
    # Query, key, value and gate as projected, two gates; query and key as prepared; of each value
    # head value, output, the chunks' triangular systems, decay and step size.
    la_head = 8 * d + 4 + 4 * d + value_heads * (4 * d + 2 * _CHUNK + 8)
    if value_heads > 1:
        la_head += 2 * d  # the output composed of theirs
    hybrid = common + 4 * heads + 4 * d  # rates of the fusion's norm; cosines and sines
    teacher_head, teacher_group = 4 * d + 8, 6 * d + 4  # the output is the projection's input
    return PlanCost(
        shape.num_layers * hybrid + shape.total_heads * la_head,
        fa_head - la_head,
        group,
        shape.num_layers * common
        + shape.total_heads * teacher_head
        + shape.total_groups * teacher_group,
    )


def attention_gradient_bytes(shape: ModelShape, value_heads: int = 1) -> PlanCost:
    """Bytes a token that the hybrid attentions' backward passes hold at their widest, beside those.

    That is the gated delta rule's: the joined gradient of the projected sections, those of the
    prepared query, key and value, and the states of all chunks, which it computes again.
    Arguments as :func:`attention_bytes`.
    """
    d = shape.head_dim
    la_head = 8 * d + 4 + 4 * d + value_heads * (2 * d + 2 * d**2 // _CHUNK)
    return PlanCost(shape.total_heads * la_head, 4 * d - la_head, 4 * d, 0)
