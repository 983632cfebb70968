"""How long a training step takes: operations at measured rates, launches, and messages.

Calibrated by some rows of kernels/benchmarks/RESULTS.md, all of Qwen3-1.7B's shape on one and two
GPUs; `tests/training/test_step_time.py` holds the prediction to the other rows, and
:data:`ERRORS_PERCENT` says how far it was off. What passes between nodes has never been measured:
it is taken to move at :data:`NETWORK_BYTES_PER_S`, and no message to overlap with computation.

A micro-batch takes what its operations take, or what Python takes to launch its kernels, if that is
more. A step is its micro-batches, through a pipeline with its bubble, one exchange of gradients and
weights among data- and context-parallel ranks, and the optimizer. Loading data, checkpoints and the
compilation of kernels come on top.

Legend: T = tokens of a micro-batch, h = hidden size, d = head dimension.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.cost import (
    DEVICES,
    Device,
    attention_weight_bytes,
    flops_of_sequence,
    num_heads_keeping,
    num_stored_groups,
    weight_bytes,
)
from megatron_hydra.selection.shape import ModelShape, even_plan
from megatron_hydra.training.needle_rounds import NeedleRounds

if TYPE_CHECKING:
    from megatron_hydra.training.config import Stage

CALIBRATION: tuple[tuple[Stage, int, int, float], ...] = (
    ("align", 4096, 0, 327),
    ("distill", 4096, 0, 343),
    ("long_context", 4096, 0, 236),
    ("align", 16384, 28, 515),
    ("distill", 16384, 28, 745),
    ("long_context", 16384, 28, 579),
    ("align", 65536, 28, 2990),
    ("distill", 65536, 28, 4131),
    ("long_context", 65536, 28, 2874),
)
"""Stage, tokens of the one sequence, layers recomputed, ms of the step: RESULTS.md, "Training
step", one H100. At 4,096 tokens the processor decides, above the GPU does."""
TENSOR_PARALLEL_CALIBRATION: dict[Stage, float] = {
    "align": 440,
    "distill": 402,
    "long_context": 446,
}
"""Ms of a step of 4,096 tokens on two tensor-parallel H100s, which the processor decides."""
NVLINK_BYTES_PER_S = 228e9
"""What tensor parallelism's exchanges reached: two H200s, distil at 65,536 tokens, 2,361 ms."""
NETWORK_BYTES_PER_S = 40e9
"""Of each GPU to other nodes: assumed, 80% of a port of 400 Gb/s."""
CP_SECONDS = 1.21e-7
"""What context parallelism adds per token of a rank, layer and pass over it, 12 LA heads of 128:
two H100s at 65,536 tokens, align 1,938, distil 2,509 and long context 1,889 ms."""
ERRORS_PERCENT = {
    "one GPU, stages 2 and 3": 8,
    "one GPU, stage 1 at 16,384 tokens": 22,
    "one GPU, 4,096 tokens without CUDA graphs": 20,
    "two context-parallel GPUs": 5,
    "two tensor-parallel GPUs, 65,536 tokens": 2,
    "two tensor-parallel GPUs, 4,096 and 16,384 tokens": 44,
}
"""By how much the prediction was off at most, over measured steps that are not used above; tokens
are a micro-batch's. No rate comes from these steps, but they were in sight when the formula was
given its form. Where the processor decides, machines alone differ by a quarter."""

_LAYERS = 28  # of the calibrating model
_SHAPE = ModelShape(_LAYERS, 16, 8, 128, 2048, 6144, 151936, tied_embeddings=True)
_OPTIMIZER_SECONDS = 0.05  # its optimizer and gradient norm, RESULTS.md
_STUDENT_PASSES = 3  # forward, and backward twice as much


@dataclass(frozen=True)
class Layout:
    """How a step is laid out; ranks in Megatron's order: tensor, context, data, pipeline.

    Attributes:
        tensor: Tensor-parallel ranks.
        pipeline: Pipeline stages.
        context: Context-parallel ranks.
        data: Replicas.
        micro_batch: Sequences of a micro-batch.
        recomputed_layers: Of the whole model.
        cuda_graphs: As `model.cuda_graphs`.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    micro_batch: int = 1
    recomputed_layers: int = 0
    cuda_graphs: bool = False

    @property
    def num_gpus(self) -> int:
        """In all."""
        return self.tensor * self.pipeline * self.context * self.data


@dataclass(frozen=True)
class StepTime:
    """A predicted step.

    Attributes:
        seconds: All in all.
        waits_for_processor: Whether launching takes longer than what is launched.
        exchange_seconds: Of it, gradients and weights between replicas.
        forward_seconds: Of a micro-batch's forward passes, the teacher's too where there is one.
    """

    seconds: float
    waits_for_processor: bool
    exchange_seconds: float
    forward_seconds: float


@dataclass(frozen=True)
class Work:
    """What a sequence asks of a step, whatever the layout; forward FLOPs of all layers.

    Attributes:
        shape: The teacher's.
        stage: With a teacher's divergence `distill`, see `memory.counted_stage`.
        seq_length: Tokens of the sequence.
        teacher_flops: Without the output layer.
        student_flops: Of what is trained, without the output layer: in stage 1 the attentions.
        logits_flops: Of an output layer; 0 in stage 1.
        num_trained: Parameters.
        recurrent_heads: Per layer, whose state context-parallel ranks hand on.
        stored_groups: Query groups that FA heads use, per layer.
    """

    shape: ModelShape
    stage: Stage
    seq_length: int
    teacher_flops: float
    student_flops: float
    logits_flops: float
    num_trained: float
    recurrent_heads: float
    stored_groups: float

    @classmethod
    def of(cls, shape: ModelShape, plan: HeadPlan, stage: Stage, seq_length: int) -> Work:
        """The work of a plan's hybrid."""
        logits = 2.0 * seq_length * shape.hidden_size * shape.vocab_size
        mlp = 6.0 * seq_length * shape.hidden_size * shape.ffn_hidden_size * shape.num_layers
        is_align = stage == "align"
        flops = flops_of_sequence(shape, seq_length)
        trained = attention_weight_bytes if is_align else weight_bytes
        return cls(
            shape=shape,
            stage=stage,
            seq_length=seq_length,
            teacher_flops=flops.of(None) - logits,
            student_flops=flops.of(plan) - logits - (mlp if is_align else 0),
            logits_flops=0 if is_align else logits,
            num_trained=trained(shape, "bf16").of(plan) / 2,
            recurrent_heads=num_heads_keeping("state", plan, shape.la_kind) / shape.num_layers,
            stored_groups=num_stored_groups(plan) / shape.num_layers,
        )

    @property
    def teacher_passes(self) -> int:
        """Over the teacher's layers: forward alone."""
        return 0 if self.stage == "long_context" else 1

    def flops(self, recomputed_share: float, pipeline: int) -> tuple[float, float]:
        """The teacher's and the student's in the dearest pipeline stage, the last."""
        passes = _STUDENT_PASSES + recomputed_share
        student = passes * self.student_flops / pipeline + _STUDENT_PASSES * self.logits_flops
        return self.teacher_passes * (self.teacher_flops / pipeline + self.logits_flops), student


def step_time(
    work: Work, global_batch: int, layout: Layout, device: Device, gpus_per_node: int = 8
) -> StepTime:
    """Predict an optimizer step.

    Args:
        work: Of a sequence.
        global_batch: Sequences of a step, divisible by the layout's micro-batches.
        layout: See there.
        device: Its bfloat16 peak is what efficiencies are a share of.
        gpus_per_node: Between which NVLink passes messages.
    """
    step = _Step(work, layout, device, gpus_per_node)
    num_micro_batches = global_batch // (layout.micro_batch * layout.data)
    micro_batch, waits = step.micro_batch()
    exchange = step.exchange_seconds()
    seconds = micro_batch * (num_micro_batches + layout.pipeline - 1) + exchange
    forward = micro_batch * step.forward_share()
    return StepTime(seconds + step.optimizer_seconds(), waits, exchange, forward)


def needle_seconds(
    shape: ModelShape, plan: HeadPlan, rounds: NeedleRounds, layout: Layout, device: Device
) -> float:
    """Predict a round of questions about needles: forward passes of prompts, then single tokens.

    A token's pass takes what its launches take. What tensor-parallel ranks send one another is left
    out. None of it has been measured.

    Args:
        shape: The teacher's.
        plan: Of the model that answers.
        rounds: What is asked.
        layout: Without pipeline and context parallelism, under which models do not decode.
        device: As :func:`step_time`'s.
    """
    stage: Stage = "long_context"  # that has no teacher
    flops = Work.of(shape, plan, stage, rounds.num_tokens).student_flops * rounds.num_rows
    tokens = rounds.num_rows * rounds.num_tokens / layout.tensor
    rate = _efficiency(stage, tokens) * device.flops_per_s * layout.tensor
    launches = _launch_seconds(stage, layout.tensor > 1) / _STUDENT_PASSES
    launches *= shape.num_layers / _LAYERS
    batch = max(flops / rate, launches) + (rounds.num_passes - 1) * launches
    return rounds.num_batches * batch


@dataclass(frozen=True)
class _Step:
    work: Work
    layout: Layout
    device: Device
    gpus_per_node: int

    @property
    def _tokens(self) -> float:
        """Of a micro-batch, on a context-parallel rank."""
        return self.layout.micro_batch * self.work.seq_length / self.layout.context

    @property
    def _recomputed_share(self) -> float:
        return self.layout.recomputed_layers / self.work.shape.num_layers

    @property
    def _layers(self) -> float:
        """Of a pipeline stage."""
        return self.work.shape.num_layers / self.layout.pipeline

    def micro_batch(self) -> tuple[float, bool]:
        """Seconds of the slowest pipeline stage, and whether it waits for the processor."""
        layout = self.layout
        teacher, student = self.work.flops(self._recomputed_share, layout.pipeline)
        efficiency = _efficiency(self.work.stage, self._tokens / layout.tensor)
        rate = efficiency * self.device.flops_per_s * layout.tensor * layout.context
        of_teacher = teacher * layout.micro_batch / rate
        of_student = student * layout.micro_batch / rate + self._messages()
        launches = self._launches()
        if layout.cuda_graphs:  # the teacher is still launched, and the student waits for it
            launched = launches * self.work.teacher_passes / self._passes()
            return max(of_teacher, launched) + of_student, launched > of_teacher
        return max(of_teacher + of_student, launches), launches > of_teacher + of_student

    def forward_share(self) -> float:
        """Of a micro-batch's FLOPs."""
        teacher, student = self.work.flops(0.0, self.layout.pipeline)
        in_all = sum(self.work.flops(self._recomputed_share, self.layout.pipeline))
        return (teacher + student / _STUDENT_PASSES) / in_all

    def _passes(self) -> float:
        return self.work.teacher_passes + _STUDENT_PASSES + self._recomputed_share

    def _launches(self) -> float:
        """Seconds of the processor: they grow with layers and passes, not with what these do."""
        seconds = _launch_seconds(self.work.stage, self.layout.tensor * self.layout.context > 1)
        passes = self.work.teacher_passes + _STUDENT_PASSES
        return seconds * self._layers / _LAYERS * self._passes() / passes

    def _messages(self) -> float:
        """Seconds of what ranks that share a micro-batch send one another."""
        layout, row = self.layout, 2.0 * self.work.shape.hidden_size
        seconds = 0.0
        if layout.tensor > 1:
            # Gathered before and scattered after attention and MLP; backward the reverse, and what
            # was gathered once more. Stage 1's student has the attention alone.
            halves = 1 if self.work.stage == "align" else 2
            number = halves * (5 + 2 * self._recomputed_share) + 4 * self.work.teacher_passes
            part = self._tokens * row * (layout.tensor - 1) / layout.tensor
            seconds += self._layers * number * part / self._bandwidth(layout.tensor, 1)
        if layout.context > 1:
            seconds += self._context_parallel()
        if layout.pipeline > 1:
            stride = layout.num_gpus // layout.pipeline
            sent = 2 * self._tokens * row / layout.tensor
            seconds += sent / self._bandwidth(layout.pipeline, stride)
        return seconds

    def _context_parallel(self) -> float:
        layout, shape = self.layout, self.work.shape
        passes = _STUDENT_PASSES + self._recomputed_share
        share = self.work.recurrent_heads * shape.head_dim / (12 * 128) / layout.tensor
        seconds = CP_SECONDS * self._tokens * self._layers * passes * share
        # Within a node the keys' and values' way is in what was measured.
        if not self._is_within_node(layout.context, layout.tensor):
            groups = self.work.stored_groups * passes
            groups += shape.num_query_groups * self.work.teacher_passes
            sent = self._tokens * (layout.context - 1) * groups * 4 * shape.head_dim
            bandwidth = self._bandwidth(layout.context, layout.tensor)
            seconds += self._layers * sent / layout.tensor / bandwidth
        return seconds

    def exchange_seconds(self) -> float:
        """Float32 gradients scattered and bfloat16 weights gathered, once per step."""
        layout = self.layout
        ranks = layout.data * layout.context
        sent = 6.0 * self._trained() * (ranks - 1) / ranks
        return sent / self._bandwidth(ranks, layout.tensor)

    def optimizer_seconds(self) -> float:
        """Of what a rank updates."""
        ranks = self.layout.data * self.layout.context
        return _optimizer_seconds(self._trained()) / ranks

    def _trained(self) -> float:
        """Parameters that are trained, of a tensor-parallel rank of a stage."""
        return self.work.num_trained / (self.layout.tensor * self.layout.pipeline)

    def _is_within_node(self, ranks: int, stride: int) -> bool:
        return ranks * stride <= self.gpus_per_node

    def _bandwidth(self, ranks: int, stride: int) -> float:
        """Bytes per second of a ring of so many ranks, each so many GPUs after the last.

        Between nodes each of a node's ranks has its own port.
        """
        if self._is_within_node(ranks, stride):
            return NVLINK_BYTES_PER_S
        ports = max(1, self.gpus_per_node // stride)
        return min(NVLINK_BYTES_PER_S, ports * NETWORK_BYTES_PER_S)


def _optimizer_seconds(num_trained: float) -> float:
    return _OPTIMIZER_SECONDS * num_trained / _calibrating_work("distill", 4096).num_trained


@functools.cache
def _calibrating_work(stage: Stage, seq_length: int) -> Work:
    return Work.of(_SHAPE, even_plan(_SHAPE, 0.25), stage, seq_length)


@functools.cache
def _efficiencies(stage: Stage) -> list[tuple[float, float]]:
    """Logarithm of the tokens, share of the peak: operations that are executed, recomputed too."""
    found = []
    for name, num_tokens, layers, ms in CALIBRATION:
        if name == stage and layers:
            work = _calibrating_work(stage, num_tokens)
            seconds = ms / 1e3 - _optimizer_seconds(work.num_trained)
            share = sum(work.flops(layers / _LAYERS, 1)) / seconds / DEVICES["h100"].flops_per_s
            found.append((math.log(num_tokens), share))
    return sorted(found)


@functools.lru_cache(maxsize=1024)
def _efficiency(stage: Stage, num_tokens: float) -> float:
    """Between the measured lengths by the logarithm, beyond them as at the nearest."""
    (low, at_low), (high, at_high) = _efficiencies(stage)
    place = min(1.0, max(0.0, (math.log(num_tokens) - low) / (high - low)))
    return at_low + place * (at_high - at_low)


@functools.cache
def _launch_seconds(stage: Stage, is_shared: bool) -> float:
    """Of a micro-batch of the calibrating model, nothing recomputed.

    Ranks that share micro-batches launch more; of context parallelism it is not measured.
    """
    if is_shared:
        ms, ranks = TENSOR_PARALLEL_CALIBRATION[stage], 2
    else:
        (ms,) = (ms for name, _, layers, ms in CALIBRATION if name == stage and not layers)
        ranks = 1
    return ms / 1e3 - _optimizer_seconds(_calibrating_work(stage, 4096).num_trained) / ranks
