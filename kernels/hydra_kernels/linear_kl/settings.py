"""What every implementation of linear_kl is told: the loss's options, the vocabulary's shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist

from hydra_kernels.loss_options import LossOptions

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup, ReduceOp


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
class Settings(LossOptions):
    """The options, and how the vocabulary is spread."""

    shards: VocabShards
