"""What a head plan costs: cache, state, weights, FLOPs, and predicted decode and training times.

Every cost here depends on a plan through its FA heads, its stored query groups and its heads of
kinds that it names, and is linear in their numbers. So a cost is a :class:`PlanCost`: it can be
read off for a plan, and an optimiser, whose plans name no kinds, can keep a budget of it. Free of
PyTorch, so that planning starts quickly.

Bytes and times are of one number format, that which serves, whatever format the weights have in a
file or in memory: else a float32 teacher and its bf16 hybrid could not be compared.

Legend: T = tokens of context, h = hidden size, d = head dimension.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadKind, HeadPlan
from megatron_hydra.model.mixers.costs import COSTS, LA_KINDS, KindCosts, LAKind, Memory
from megatron_hydra.selection.shape import ModelShape

GIB = 2**30
TRAINING_EFFICIENCY = 0.4
"""Share of a device's peak FLOP/s that training is taken to reach; Megatron-LM's README reports
0.41 to 0.48 of an H100's for dense models of 2 to 462 billion parameters."""
ServeDtype = Literal["bf16", "fp16", "fp32"]
"""Number format of weights and caches when the model serves."""
SERVE_DTYPES: dict[ServeDtype, int] = {"bf16": 2, "fp16": 2, "fp32": 4}  # bytes of one value


@dataclass(frozen=True)
class Device:
    """An accelerator's published figures.

    Attributes:
        name: Its name in words.
        memory_bytes_per_s: Memory bandwidth.
        flops_per_s: Dense bfloat16 peak.
        memory_bytes: Memory.
    """

    name: str
    memory_bytes_per_s: float
    flops_per_s: float
    memory_bytes: float


DEVICES = {
    # NVIDIA's Tensor Core GPU datasheets, SXM; their 1,979 TFLOP/s are with sparsity.
    "h100": Device("H100 SXM", 3.35e12, 989e12, 80e9),
    "h200": Device("H200 SXM", 4.8e12, 989e12, 141e9),
}


@dataclass(frozen=True)
class PlanCost:
    """A cost ``fixed + per_fa_head * FA heads + per_group * stored groups`` of a hybrid.

    Attributes:
        fixed: With LA heads only.
        per_fa_head: Change when an LA head becomes FA; below 0 where an LA head is dearer.
        per_group: Added for each query group that some FA head uses.
        teacher: The same cost of the teacher, which has neither LA heads nor gates.
        per_kind: Change when an LA head becomes one of another kind, by the kind's name.
    """

    fixed: float
    per_fa_head: float
    per_group: float
    teacher: float
    per_kind: Mapping[HeadKind, float] = field(default_factory=dict)

    def __add__(self, other: PlanCost) -> PlanCost:
        kinds = {*self.per_kind, *other.per_kind}
        return PlanCost(
            self.fixed + other.fixed,
            self.per_fa_head + other.per_fa_head,
            self.per_group + other.per_group,
            self.teacher + other.teacher,
            {kind: self.per_kind.get(kind, 0) + other.per_kind.get(kind, 0) for kind in kinds},
        )

    def __mul__(self, factor: float) -> PlanCost:
        return PlanCost(
            factor * self.fixed,
            factor * self.per_fa_head,
            factor * self.per_group,
            factor * self.teacher,
            {kind: factor * value for kind, value in self.per_kind.items()},
        )

    def at(self, num_fa_heads: int, num_groups: int) -> float:
        """The cost of hybrids with so many FA heads and stored groups in the whole model."""
        return self.fixed + self.per_fa_head * num_fa_heads + self.per_group * num_groups

    def of(self, plan: HeadPlan | None) -> float:
        """The cost of a plan's hybrid; None for the teacher."""
        if plan is None:
            return self.teacher
        cost = self.at(plan.num_fa_heads, num_stored_groups(plan))
        return cost + self.of_named_kinds(kind for layer in plan.layers for kind in layer.kinds)

    def of_named_kinds(self, kinds: Iterable[HeadKind]) -> float:
        """What heads add by being of kinds that the plan names."""
        return sum(self.per_kind.get(kind, 0) for kind in kinds)


def cost_of_heads(
    shape: ModelShape,
    of_head: Callable[[KindCosts], float],
    *,
    shared: float = 0,
    per_group: float = 0,
    teacher: float = 0,
) -> PlanCost:
    """A cost that is a sum over heads.

    Args:
        shape: Whose.
        of_head: A head's, by its kind's costs.
        shared: Of the hybrid beside its heads.
        per_group: Of a query group that some FA head uses.
        teacher: Of the teacher, all in all.
    """
    la = of_head(COSTS[shape.la_kind])
    return PlanCost(
        shared + shape.total_heads * la,
        of_head(COSTS["fa"]) - la,
        per_group,
        teacher,
        {kind: of_head(COSTS[kind]) - la for kind in LA_KINDS if kind != shape.la_kind},
    )


def other_heads(plan: HeadPlan, la_kind: LAKind) -> str:
    """The heads without full attention by kind: `76 Gated DeltaNet, 8 sliding window`."""
    kinds = Counter(kind for layer in plan.resolved(la_kind).layers for kind in layer.kinds)
    return ", ".join(
        f"{n:,} {COSTS[kind].title}" for kind, n in kinds.most_common() if kind != "fa"
    )


def num_heads_keeping(memory: Memory, plan: HeadPlan, la_kind: LAKind) -> int:
    """Heads of the kinds that keep this of earlier tokens, in the whole model."""
    kinds = (kind for layer in plan.resolved(la_kind).layers for kind in layer.kinds)
    return sum(COSTS[kind].memory == memory for kind in kinds)


def num_stored_groups(plan: HeadPlan) -> int:
    """Query groups whose keys and values are stored, because some FA head uses them."""
    return sum(len(plan.fa_groups(layer)) for layer in range(plan.num_layers))


def cache_bytes_per_token(shape: ModelShape, dtype: ServeDtype = "bf16") -> PlanCost:
    """Bytes of key and value that one more token adds to the cache, all layers together."""
    group = 2 * shape.head_dim * SERVE_DTYPES[dtype]
    return PlanCost(0, 0, group, shape.total_groups * group)


def state_bytes(shape: ModelShape, dtype: ServeDtype = "bf16") -> PlanCost:
    """Bytes of the LA heads' state of one sequence, whatever its length.

    A recurrence has a matrix of head dimension squared, in float32 whatever the format, and, with
    the short convolution, the last inputs of query, key and value in the format that serves; a
    sliding window has its tokens' keys and values.
    """
    return cost_of_heads(
        shape, lambda kind: kind.state_bytes(shape.cost_model, SERVE_DTYPES[dtype])
    )


def state_format(dtype: ServeDtype) -> str:
    """The number formats of :func:`state_bytes`, for headings: recurrences are fp32 in any."""
    return "fp32" if dtype == "fp32" else f"fp32, else {dtype}"


def total_cache_bytes(
    shape: ModelShape, context_tokens: int, dtype: ServeDtype = "bf16"
) -> PlanCost:
    """Bytes that one sequence of T tokens keeps: KV cache and state."""
    _check_context(context_tokens)
    return cache_bytes_per_token(shape, dtype) * context_tokens + state_bytes(shape, dtype)


def attention_weight_bytes(shape: ModelShape, dtype: ServeDtype = "bf16") -> PlanCost:
    """Bytes of the attentions' weight matrices; left out are vectors (norms, scales)."""
    matrix = shape.cost_model.matrix
    group = 2 * matrix  # key, value
    weights = cost_of_heads(
        shape,
        lambda kind: kind.weights(shape.cost_model),
        per_group=group,
        teacher=shape.total_heads * 2 * matrix + shape.total_groups * group,
    )
    return weights * SERVE_DTYPES[dtype]


def weight_bytes_read(shape: ModelShape, dtype: ServeDtype = "bf16") -> PlanCost:
    """Bytes of weight matrices that one decode step reads, whatever the batch.

    Left out are vectors and, of an input embedding of its own, the rows that are not looked up.
    """
    h = shape.hidden_size
    shared = shape.num_layers * 3 * h * shape.ffn_hidden_size + h * shape.vocab_size
    shared *= SERVE_DTYPES[dtype]
    return attention_weight_bytes(shape, dtype) + PlanCost(shared, 0, 0, shared)


def weight_bytes(shape: ModelShape, dtype: ServeDtype = "bf16") -> PlanCost:
    """Bytes of all weight matrices."""
    embedding = 0 if shape.tied_embeddings else shape.vocab_size * shape.hidden_size
    embedding *= SERVE_DTYPES[dtype]
    return weight_bytes_read(shape, dtype) + PlanCost(embedding, 0, 0, embedding)


def flops_of_sequence(shape: ModelShape, num_tokens: int) -> PlanCost:
    """FLOPs of the forward pass of one sequence: attention, linears, gated MLP, output layer.

    Attention by :class:`~megatron_hydra.model.mixers.costs.CostModel`, which names its sources and
    what is left out; a matrix of n values costs 2 n per token (Kaplan et al., arXiv 2001.08361,
    table 1).
    """
    _check_context(num_tokens)
    model = shape.cost_model
    group = model.fa_group(num_tokens)
    # No gate; a group costs two projections of that size.
    teacher_head = model.head("fa", num_tokens) - group / 2
    mlp = 2.0 * 3 * shape.hidden_size * shape.ffn_hidden_size * shape.num_layers
    shared = num_tokens * (mlp + 2.0 * shape.hidden_size * shape.vocab_size)
    attention = cost_of_heads(
        shape,
        lambda kind: kind.flops(model, num_tokens),
        per_group=group,
        teacher=shape.total_heads * teacher_head + shape.total_groups * group,
    )
    return attention + PlanCost(shared, 0, 0, shared)


def flops_per_token(shape: ModelShape, context_tokens: int) -> PlanCost:
    """Forward FLOPs per token, the mean over a sequence of T tokens, as in training or prefill."""
    return flops_of_sequence(shape, context_tokens) * (1 / context_tokens)


def decode_bounds(
    shape: ModelShape,
    context_tokens: int,
    device: Device,
    dtype: ServeDtype = "bf16",
) -> tuple[PlanCost, PlanCost]:
    """Seconds that a decoded token takes at least, by memory traffic and by arithmetic.

    The roofline model (Williams et al., CACM 52(4), 2009), of one sequence. Memory: the weights;
    the sequence's KV cache read; its state read and written. Arithmetic: the FLOPs of the last
    token of T, at the bfloat16 peak whatever the format. Predicted, not measured: launches,
    communication and whatever keeps kernels from the peak come on top. UserError if the context is
    below 1.
    """
    traffic = weight_bytes_read(shape, dtype)
    traffic += total_cache_bytes(shape, context_tokens, dtype) + state_bytes(shape, dtype)
    flops = flops_of_sequence(shape, context_tokens + 1)
    flops += flops_of_sequence(shape, context_tokens) * -1
    return traffic * (1 / device.memory_bytes_per_s), flops * (1 / device.flops_per_s)


def decode_seconds(
    shape: ModelShape,
    plan: HeadPlan | None,
    context_tokens: int,
    device: Device,
    dtype: ServeDtype = "bf16",
) -> float:
    """Predicted seconds per decoded token: the larger of :func:`decode_bounds`."""
    bounds = decode_bounds(shape, context_tokens, device, dtype)
    return max(bound.of(plan) for bound in bounds)


def training_step_seconds(shape: ModelShape, context_tokens: int, device: Device) -> PlanCost:
    """Predicted seconds of a training step of one sequence on one device: three forward passes.

    A backward pass takes twice the forward's FLOPs (Kaplan et al., arXiv 2001.08361, section
    2.1); the optimizer and a distillation's teacher are left out. It reaches
    :data:`TRAINING_EFFICIENCY` of the device's peak.
    """
    flops = flops_of_sequence(shape, context_tokens) * 3
    return flops * (1 / (device.flops_per_s * TRAINING_EFFICIENCY))


@dataclass(frozen=True)
class Costs:
    """All costs of a plan at one context length; times are predicted.

    Attributes:
        context_tokens: T.
        device: Key of :data:`DEVICES`.
        num_fa_heads: In the whole model.
        num_groups: Query groups whose keys and values are stored, in the whole model.
        kv_cache_bytes: Of one sequence of T tokens.
        state_bytes: Of one sequence.
        flops_per_token: Forward, mean over a sequence of T tokens.
        decode_ms: Per token of one sequence, T tokens in the cache.
        training_step_s: One sequence of T tokens, forward and backward, on one device.
        serve_dtype: Of weights and caches; the state's matrices are float32.
    """

    context_tokens: int
    device: str
    num_fa_heads: int
    num_groups: int
    kv_cache_bytes: float
    state_bytes: float
    flops_per_token: float
    decode_ms: float
    training_step_s: float
    serve_dtype: ServeDtype = "bf16"

    @property
    def cache_gib(self) -> float:
        """What a sequence keeps, KV cache and state, in GiB."""
        return (self.kv_cache_bytes + self.state_bytes) / GIB


def costs_of(
    shape: ModelShape,
    plan: HeadPlan | None,
    context_tokens: int,
    device: str,
    serve_dtype: ServeDtype = "bf16",
) -> Costs:
    """All costs of a plan, None for the teacher; UserError as its parts."""
    figures = find_device(device)
    return Costs(
        context_tokens,
        device,
        shape.total_heads if plan is None else plan.num_fa_heads,
        shape.total_groups if plan is None else num_stored_groups(plan),
        (cache_bytes_per_token(shape, serve_dtype) * context_tokens).of(plan),
        state_bytes(shape, serve_dtype).of(plan),
        flops_per_token(shape, context_tokens).of(plan),
        1e3 * decode_seconds(shape, plan, context_tokens, figures, dtype=serve_dtype),
        training_step_seconds(shape, context_tokens, figures).of(plan),
        serve_dtype,
    )


def find_device(name: str) -> Device:
    """A device of :data:`DEVICES` by its key; UserError if there is none."""
    if name not in DEVICES:
        raise UserError(f"unknown device {name!r}: use one of {', '.join(DEVICES)}")
    return DEVICES[name]


def _check_context(num_tokens: int) -> None:
    if num_tokens < 1:
        raise UserError(f"context is {num_tokens}; it must be 1 or more")
