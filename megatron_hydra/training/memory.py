"""What each GPU needs to train a plan: weights, optimizer, activations and the loss, in bytes.

Counted is what Transformer Engine's modules, FlashQLA and our Triton kernels keep for the backward
pass in bfloat16, each tensor of it listed once by `torch.autograd.graph.saved_tensors_hooks` on an
H100 (kernels/benchmarks/RESULTS.md holds prediction beside measurement). Each head and row of
weights lies on one tensor-parallel rank; data- and context-parallel ranks share the optimizer's
state. Pipeline stages are counted by the same lists; none has been measured. Layers may have any
numbers of FA heads, and ranks any of a layer's: each counts what it has, and the rank that needs
most is told of.

Legend: T = tokens of a micro-batch, h = hidden size, f = the MLP's width, d = head dimension.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from hydra_kernels.loss_options import TEACHER_SHARE

from megatron_hydra.head_plan import HeadKind, HeadPlan, LayerHeadPlan
from megatron_hydra.model.mixers.costs import CostModel
from megatron_hydra.model.placement import place_heads
from megatron_hydra.selection.cost import (
    PlanCost,
    ServeDtype,
    attention_weight_bytes,
    cache_bytes_per_token,
    cost_of_heads,
    state_bytes,
    weight_bytes,
)
from megatron_hydra.selection.shape import ModelShape
from megatron_hydra.training.needle_rounds import NeedleRounds

if TYPE_CHECKING:
    from megatron_hydra.training.config import RunConfig, Stage

_WEIGHT, _GRADIENT, _OPTIMIZER = 2, 4, 12  # bytes per parameter; float32 but for the weights
_MULTIPROCESSORS = 132  # of an H100 or H200: FlashQLA cuts sequences into as many parts times heads


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one GPU.

    Attributes:
        state: Weights, the teacher's too, gradients and optimizer.
        kept: Activations that wait for the backward pass.
        passing: The most that lives for a moment beside both.
        decoding: In place of the last two while the model answers about needles between two steps:
            caches, and what a forward pass adds. Counted, never measured.
    """

    state: float
    kept: float
    passing: float
    decoding: float = 0.0

    @property
    def peak(self) -> float:
        """The state, and what comes on top of it at one time."""
        return self.state + max(self.kept + self.passing, self.decoding)


def memory_of_run(
    config: RunConfig, shape: ModelShape, plan: HeadPlan, num_ranks: int
) -> tuple[TrainingMemory | None, str]:
    """Predict what the GPU that needs most needs in a run, or say why that is not known.

    Args:
        config: Of the run, whose layout fits the ranks.
        shape: The teacher's.
        plan: The hybrid's.
        num_ranks: GPUs in all.
    """
    strategy, model, data = config.strategy, config.model, config.data
    for is_so, why in (
        (config.trainer.precision == "fp32", "trainer.precision is fp32"),
        (model.recompute == "selective", "model.recompute selective is not counted"),
        (model.backend == "local", "model.backend is local"),
    ):
        if is_so:
            return None, why
    data_parallel = num_ranks // strategy.model_parallel_size
    memory = training_memory(
        shape,
        plan,
        counted_stage(config),
        data.micro_batch_size * data.seq_length,
        recompute="full" if model.recompute == "full" else "none",
        chunk_tokens=config.transfer.chunk_tokens,
        dp_size=data_parallel,
        recompute_layers=model.recompute_layers,
        tp_size=strategy.tensor_model_parallel_size,
        cp_size=strategy.context_parallel_size,
        seq_length=data.seq_length,
        pp_size=strategy.pipeline_model_parallel_size,
        num_micro_batches=data.global_batch_size // (data.micro_batch_size * data_parallel),
    )
    rounds = NeedleRounds.of(config, num_ranks)
    if rounds is not None:
        tp_size = strategy.tensor_model_parallel_size
        tokens = rounds.num_rows * rounds.num_tokens
        decoding = max(
            _forward_bytes(shape, asked, tokens, tp_size, data.seq_length)
            + decoding_cache_bytes(shape, asked, rounds, tp_size, data.seq_length)
            for asked in rounds.plans(plan)
        )
        memory = replace(memory, decoding=decoding)
    return memory, ""


def decoding_cache_bytes(
    shape: ModelShape,
    plan: HeadPlan,
    rounds: NeedleRounds,
    tp_size: int,
    seq_length: int,
    dtype: ServeDtype = "bf16",
) -> float:
    """Keys, values and states of a batch of questions, on the rank that has most.

    Args:
        shape: The teacher's.
        plan: Of the model that answers.
        rounds: What is asked.
        tp_size: Tensor-parallel ranks, heads placed `balanced`.
        seq_length: Tokens of a training sample, for which heads are placed.
        dtype: Number format of keys, values and convolutions' inputs.
    """
    kept = cache_bytes_per_token(shape, dtype) * rounds.num_tokens + state_bytes(shape, dtype)
    return rounds.num_rows * max(rank.of(kept) for rank in _ranks(shape, plan, tp_size, seq_length))


def _forward_bytes(
    shape: ModelShape, plan: HeadPlan, tokens: int, tp_size: int, seq_length: int
) -> float:
    """The widest layer of a forward pass alone; every rank has all tokens while it decodes."""
    h, f = shape.hidden_size, shape.ffn_hidden_size
    attentions = (
        attention
        for rank in _ranks(shape, plan, tp_size, seq_length)
        for attention in rank.of_layers(attention_bytes(shape))
    )
    return tokens * (4 * h + max(6 * f / tp_size, *attentions))


def counted_stage(config: RunConfig) -> Stage:
    """The stage as costs know it: with a divergence, the long context's has a teacher too."""
    if config.transfer.stage == "align":
        return "align"
    return "distill" if config.transfer.kl_weight else "long_context"


def training_memory(
    shape: ModelShape,
    plan: HeadPlan | None,
    stage: Stage,
    num_tokens: int,
    recompute: Literal["none", "full"] = "none",
    chunk_tokens: int = 1024,
    dp_size: int = 1,
    recompute_layers: int | None = None,
    *,
    tp_size: int = 1,
    cp_size: int = 1,
    seq_length: int | None = None,
    pp_size: int = 1,
    num_micro_batches: int = 1,
) -> TrainingMemory:
    """Predict the peak of a training step on the rank that needs most.

    Args:
        shape: The teacher's.
        plan: The hybrid's; None trains the teacher's own architecture.
        stage: As `transfer.stage`.
        num_tokens: T.
        recompute: As `model.recompute`.
        chunk_tokens: As `transfer.chunk_tokens`.
        dp_size: Data-parallel ranks, under the distributed optimizer.
        recompute_layers: As `model.recompute_layers`: of each pipeline stage.
        tp_size: Tensor-parallel ranks, with sequence parallelism, heads placed `balanced`.
        cp_size: Context-parallel ranks.
        seq_length: Tokens of a sequence, for which heads are placed; None for T.
        pp_size: Pipeline stages of equally many layers. Embedding, output and loss are counted on
            each, so that with untied embeddings, or more than two stages, it is an upper bound.
        num_micro_batches: Of a step. The first stages hold several of a pipeline at a time.

    Raises:
        UserError: If the number of heads is not divisible by `tp_size`.
    """
    num_layers = shape.num_layers // pp_size
    step = _Step(
        replace(shape, num_layers=num_layers), stage, num_tokens, recompute, chunk_tokens, dp_size,
        recompute_layers, tp_size, cp_size,
    )  # fmt: skip
    predicted = [
        replace(step, num_held=min(pp_size - index, num_micro_batches)).on(
            rank.stage(index, num_layers)
        )
        for rank in _ranks(shape, plan, tp_size, seq_length or num_tokens)
        for index in range(pp_size)
    ]
    return max(predicted, key=lambda memory: memory.peak)


@dataclass(frozen=True)
class _Rank:
    """What a tensor-parallel rank has of the attentions.

    Attributes:
        num_layers: Of the model.
        tp_size: Number of ranks.
        heads: FA heads, owned query groups and the kinds of all heads of each layer; None for the
            teacher's attention, which all ranks share equally.
    """

    num_layers: int
    tp_size: int
    heads: tuple[tuple[int, int, tuple[HeadKind, ...]], ...] | None

    def stage(self, index: int, num_layers: int) -> _Rank:
        """The same of one pipeline stage of so many layers."""
        first = index * num_layers
        heads = None if self.heads is None else self.heads[first : first + num_layers]
        return _Rank(num_layers, self.tp_size, heads)

    def of_layers(self, cost: PlanCost) -> list[float]:
        """Its share of each layer's cost."""
        if self.heads is None:
            return [cost.teacher / self.num_layers / self.tp_size] * self.num_layers
        fixed = cost.fixed / self.num_layers / self.tp_size
        return [
            fixed + cost.per_fa_head * fa + cost.per_group * groups + cost.of_named_kinds(kinds)
            for fa, groups, kinds in self.heads
        ]

    def of(self, cost: PlanCost) -> float:
        """Its share of a cost."""
        return sum(self.of_layers(cost))


def _ranks(shape: ModelShape, plan: HeadPlan | None, tp_size: int, length: int) -> list[_Rank]:
    """The tensor-parallel ranks, heads placed `balanced`."""
    if plan is None:
        return [_Rank(shape.num_layers, tp_size, None)]
    layers = [
        _heads_of_ranks(layer, plan.num_query_groups, tp_size, length, shape.cost_model)
        for layer in plan.resolved(shape.la_kind).layers
    ]
    return [_Rank(shape.num_layers, tp_size, heads) for heads in zip(*layers, strict=True)]


@functools.lru_cache(maxsize=4096)  # a search for a layout asks again and again
def _heads_of_ranks(
    layer: LayerHeadPlan, num_groups: int, tp_size: int, length: int, model: CostModel
) -> tuple[tuple[int, int, tuple[HeadKind, ...]], ...]:
    """What each tensor-parallel rank has of a layer: FA heads, owned query groups, kinds."""
    placed = place_heads(layer, num_groups, tp_size, "balanced", length, model)
    return tuple(
        (
            len(placed.fa_heads(rank)),
            len(placed.owned_groups(rank)),
            tuple(layer.kinds[head] for head in heads),
        )
        for rank, heads in enumerate(placed.heads_per_rank)
    )


@dataclass(frozen=True)
class _Step:
    """The arguments of :func:`training_memory` that all ranks share; ``shape`` of one stage."""

    shape: ModelShape
    stage: str
    num_tokens: int
    recompute: str
    chunk_tokens: int
    dp_size: int
    recompute_layers: int | None
    tp_size: int
    cp_size: int
    num_held: int = 1  # micro-batches whose activations wait at a time

    def on(self, rank: _Rank) -> TrainingMemory:
        """The peak on a rank."""
        h, f = self.shape.hidden_size, self.shape.ffn_hidden_size
        vocab = self.shape.vocab_size / self.tp_size
        # A rank keeps its part of the tokens, or of the heads, of everything.
        tokens = self.num_tokens / (self.tp_size * self.cp_size)
        mlp = 4 * h + 4 + 6 * f
        # Of a recomputed layer: the student's input, in stage 1 the teacher's output too.
        layer_input = 4 * h if self.stage == "align" else 2 * h
        layers = self._layers(rank, mlp)
        num_recomputed = 0
        if self.recompute != "none":
            num_recomputed = min(self.recompute_layers or len(layers), len(layers))
        kept = num_recomputed * tokens * layer_input + sum(layers[num_recomputed:])
        kept *= self.num_held
        # Backward reaches the recomputed (first) layers last: the others' activations are freed by
        # then.
        again = 0.0
        if num_recomputed == len(layers):
            again = self._recomputed(rank, layers, tokens * layer_input)
        if self.tp_size > 1:  # a linear's input for its weights' gradient, gathered from all ranks
            again += tokens * self.tp_size * 2 * h
        state = self._state(rank)
        if self.stage == "align":
            return TrainingMemory(state, kept, max(tokens * mlp, again))  # the teacher's MLP
        kept += tokens * 4 * h  # the final norm's input and output
        logits = 2 * self.chunk_tokens * vocab
        loss = tokens * 2 * h + logits
        if self.stage == "distill":
            loss += tokens * 2 * h + TEACHER_SHARE * logits
        backward = again + tokens * 2 * (h + f)
        output_gradient = 4 * vocab * h  # of the output weights; ends with the backward pass
        return TrainingMemory(state, kept, output_gradient + max(loss, backward))

    def _state(self, rank: _Rank) -> float:
        teacher = 0.0
        if self.stage != "long_context":
            teacher = weight_bytes(self.shape, "bf16").of(None) / self.tp_size
        # Stage 1 takes all else from the teacher.
        trained_part = attention_weight_bytes if self.stage == "align" else weight_bytes
        optimizer = _OPTIMIZER / (self.dp_size * self.cp_size)
        trained = rank.of(trained_part(self.shape, "bf16"))
        return teacher + trained * (1 + (_GRADIENT + optimizer) / _WEIGHT)

    @property
    def _num_runs(self) -> int:
        return 1 if self.cp_size == 1 else 2

    def _layers(self, rank: _Rank, mlp: int) -> list[float]:
        """What each layer keeps that is not recomputed."""
        tokens = self.num_tokens / self.cp_size
        beside = 4 * self.shape.hidden_size if self.stage == "align" else mlp
        beside /= self.tp_size  # in stage 1 the float32 difference from the teacher
        attentions = rank.of_layers(attention_bytes(self.shape, self._num_runs))
        parts = 0 if rank.heads is None else _MULTIPROCESSORS * self.shape.head_dim**2 * (4 + 2)
        return [tokens * (attention + beside) + parts for attention in attentions]

    def _recomputed(self, rank: _Rank, layers: list[float], layer_input: float) -> float:
        """The most that a recomputed layer's backward pass adds to the inputs of all layers.

        The inputs of the layers after it are free by then.
        """
        h, tokens = self.shape.hidden_size, self.num_tokens / (self.tp_size * self.cp_size)
        again = layers
        if self.stage == "align":
            # The layer's output, and both in float32 beside their difference; or later.
            gradients = rank.of_layers(attention_gradient_bytes(self.shape, self._num_runs))
            per_token = [max(10 * h / self.tp_size, gradient) for gradient in gradients]
            again = [x + self.num_tokens / self.cp_size * y for x, y in zip(again, per_token)]
        else:
            again = [x + tokens * 2 * h for x in again]  # the layer's output
        num_after = range(len(again) - 1, -1, -1)
        return max(x - n * layer_input for x, n in zip(again, num_after, strict=True))


def attention_bytes(shape: ModelShape, num_runs: int = 1) -> PlanCost:
    """Bytes per token that the attentions of all layers keep, their inputs and norms counted in.

    Args:
        shape: The teacher's.
        num_runs: Of each LA head: two where context-parallel ranks share the tokens, and its
            output is composed of theirs.
    """
    h, d, heads = shape.hidden_size, shape.head_dim, shape.num_heads
    # Input, normed input, its rate; what the output projection reads.
    common = 4 * h + 4 + 2 * heads * d
    group = 4 * d  # key and value as projected
    hybrid = common + 4 * heads + 4 * d  # rates of the fusion's norm; cosines and sines
    teacher_head, teacher_group = 4 * d + 8, 6 * d + 4  # the output is the projection's input
    return cost_of_heads(
        shape,
        lambda kind: kind.kept_bytes(shape.cost_model, num_runs),
        shared=shape.num_layers * hybrid,
        per_group=group,
        teacher=shape.num_layers * common
        + shape.total_heads * teacher_head
        + shape.total_groups * teacher_group,
    )


def attention_gradient_bytes(shape: ModelShape, num_runs: int = 1) -> PlanCost:
    """Bytes per token that the attentions' backward passes hold at their widest, beside those.

    Arguments as :func:`attention_bytes`.
    """
    return cost_of_heads(
        shape,
        lambda kind: kind.gradient_bytes(shape.cost_model, num_runs),
        per_group=4 * shape.head_dim,
    )
