"""What every implementation of linear_kl is told: the loss's settings, the vocabulary's shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch.distributed as dist

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup, ReduceOp

Kind = Literal["forward", "reverse", "jsd"]


@dataclass(frozen=True)
class VocabShards:
    """How the vocabulary is spread over ranks: parts of one size, in order, padding at the end.

    Attributes:
        part: Entries of each rank, padding counted in.
        vocab_size: Entries of all ranks, padding left out.
        group: The ranks; None for this one alone.
    """

    part: int
    vocab_size: int
    group: ProcessGroup | None

    @property
    def size(self) -> int:
        """Entries of this rank that are no padding."""
        return min(self.part, self.vocab_size - self.first)

    @property
    def num_shards(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def first(self) -> int:
        return 0 if self.group is None else self.group.rank() * self.part

    def all_reduce(self, x: Tensor, op: ReduceOp.RedOpType) -> Tensor:
        """Reduce x over the ranks in place; x is contiguous and the caller's own."""
        if self.num_shards > 1:
            dist.all_reduce(x, op=op, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Each rank's x [m, ...], contiguous, one after the other: [num_shards * m, ...]."""
        if self.num_shards == 1:
            return x
        gathered = x.new_empty(self.num_shards * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x, group=self.group)
        return gathered


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What the loss is, from a run's YAML to the kernels; `api.linear_kl` has the formulas.

    Attributes:
        kl_weight: Factor on the divergence.
        ce_weight: Factor on the cross entropy.
        kind: The divergence.
        jsd_beta: Share of the teacher in the mixture, between 0 and 1; read for "jsd" alone.
        temperature: T above 0, which softens both distributions of the divergence.
        chunk_tokens: Rows whose student's logits exist at once, 1 or more.
        float32_logits: Keep the sums of the logits' products in float32; otherwise the logits are
            rounded to the weights' dtype, as Megatron's output layer does. Costs memory and time.

    Raises:
        ValueError: If a value is out of range.
    """

    kl_weight: float
    ce_weight: float
    kind: Kind = "forward"
    jsd_beta: float = 0.5
    temperature: float = 1.0
    chunk_tokens: int = 1024
    float32_logits: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {get_args(Kind)}, got {self.kind!r}")
        if self.kind == "jsd" and not 0 < self.jsd_beta < 1:
            raise ValueError(f"jsd_beta must be between 0 and 1, got {self.jsd_beta}")
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be 1 or more, got {self.chunk_tokens}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")


@dataclass(frozen=True, kw_only=True)
class Settings(LossOptions):
    """The options, and how the vocabulary is spread."""

    shards: VocabShards
