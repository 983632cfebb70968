"""Which tokens a rank holds: packed documents, and Megatron's load-balanced context parallelism.

Legend: s = tokens on this context-parallel rank, t = tokens of the whole stream, cp = ranks.

Every sequence is cut into 2 cp equal chunks, of which rank r holds chunks r and 2 cp - 1 - r, so
that causal attention costs all ranks the same. What is a sequence depends: a row of an unpacked
batch (Megatron's `get_batch_on_this_cp_rank`), or each document of a packed one, padded to a
multiple of 2 cp (Transformer Engine's `thd` format).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_hydra.errors import UserError


@dataclass(frozen=True)
class SequenceLayout:
    """The tokens of one context-parallel rank.

    Attributes:
        num_tokens: s.
        cu_seqlens: Where documents begin and end in the whole stream, `[documents + 1]`, padding
            counted in; None where every row is one sequence.
        rank: In the context-parallel group.
        size: Of the context-parallel group.
        first_position: Tokens that each row has had before, in decoding.
    """

    num_tokens: int
    cu_seqlens: Tensor | None
    rank: int
    size: int
    first_position: int = 0

    @classmethod
    def of(
        cls,
        num_tokens: int,
        packed_seq_params: PackedSeqParams | None,
        group: dist.ProcessGroup,
        first_position: int = 0,
    ) -> SequenceLayout:
        """The layout of what a layer was handed.

        Args:
            num_tokens: s.
            packed_seq_params: Megatron's description of a packed row, or None.
            group: Context-parallel ranks.
            first_position: Of whole rows on one context-parallel rank.
        """
        cu_seqlens = None
        if packed_seq_params is not None:
            cu_seqlens = packed_seq_params.cu_seqlens_q_padded
            if cu_seqlens is None:
                cu_seqlens = packed_seq_params.cu_seqlens_q
            cu_seqlens = cu_seqlens.long()
        return cls(num_tokens, cu_seqlens, group.rank(), group.size(), first_position)

    @property
    def is_whole(self) -> bool:
        """Whether each row is one sequence that this rank holds all of."""
        return self.cu_seqlens is None and self.size == 1

    @property
    def device(self) -> torch.device | None:
        """Where the indices live; None is PyTorch's default."""
        return None if self.cu_seqlens is None else self.cu_seqlens.device

    def stream_index(self, rank: int | None = None) -> Tensor:
        """`[s]` int64: the place in the whole stream of each token of a rank; None is this one."""
        total = self.num_tokens * self.size
        index = torch.arange(total, device=self.device)
        if self.size == 1:
            return index
        if self.cu_seqlens is None:
            chunk = index // (total // (2 * self.size))
        else:
            lengths = self.cu_seqlens.diff()[self.document(index)]
            chunk = self.position(index) * 2 * self.size // lengths
        owner = torch.minimum(chunk, 2 * self.size - 1 - chunk)
        return (owner == (self.rank if rank is None else rank)).nonzero().squeeze(1)

    def document(self, index: Tensor) -> Tensor:
        """The document of each place in the stream."""
        if self.cu_seqlens is None:
            return torch.zeros_like(index)
        return torch.searchsorted(self.cu_seqlens, index, right=True) - 1

    def position(self, index: Tensor) -> Tensor:
        """The position within its document of each place in the stream."""
        if self.cu_seqlens is None:
            return index
        return index - self.cu_seqlens[self.document(index)]

    @cached_property
    def positions(self) -> Tensor:
        """`[s]` int64: each of this rank's tokens' position in its document."""
        return self.position(self.stream_index()) + self.first_position

    def causal_mask(self) -> Tensor:
        """`[s, t]` bool: which tokens of all ranks, rank after rank, each token here may see."""
        keys = torch.cat([self.stream_index(rank) for rank in range(self.size)])
        queries = self.stream_index()
        # Within a document, stream order is time order.
        same = self.document(queries)[:, None] == self.document(keys)
        return same & (queries[:, None] >= keys)


def packed_sequence(cu_seqlens: Tensor, padded: Tensor | None = None) -> PackedSeqParams:
    """Megatron's description of a row that packs documents.

    Args:
        cu_seqlens: `[documents + 1]` integer: 0, ascending, t.
        padded: The same with each document's padding counted in, see :func:`pad_documents`.
    """
    cu_seqlens = cu_seqlens.int()
    padded = None if padded is None else padded.int()
    # Rotary angles must reach the last padded position too.
    longest = int((cu_seqlens if padded is None else padded).diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def padded_lengths(lengths: Tensor, cp_size: int) -> Tensor:
    """Tokens of each document with what :func:`pad_documents` adds to it."""
    unit = 1 if cp_size == 1 else 2 * cp_size
    return (lengths + unit - 1) // unit * unit


def pad_documents(
    batch: Mapping[str, Tensor], cu_seqlens: Tensor, cp_size: int
) -> tuple[dict[str, Tensor], PackedSeqParams]:
    """Lengthen every document to a multiple of 2 cp by zeros behind its end.

    Zeros behind the end change nothing before it; where they stand for a loss mask, they count
    for nothing.

    Args:
        batch: Tensors `[1, t]`, one of them the loss mask.
        cu_seqlens: `[documents + 1]` integer: 0, ascending, t.
        cp_size: Context-parallel ranks; 1 pads nothing.
    """
    if cp_size == 1:
        return dict(batch), packed_sequence(cu_seqlens)
    lengths = cu_seqlens.diff()
    padded = F.pad(padded_lengths(lengths, cp_size).cumsum(0), (1, 0))
    place = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    place = place + torch.repeat_interleave(padded[:-1] - cu_seqlens[:-1], lengths)
    result = {}
    for name, tensor in batch.items():
        result[name] = tensor.new_zeros(tensor.shape[0], int(padded[-1]))
        result[name][:, place] = tensor
    return result, packed_sequence(cu_seqlens, padded)


def shard_batch(
    batch: Mapping[str, Tensor],
    group: dist.ProcessGroup,
    packed_seq_params: PackedSeqParams | None = None,
) -> dict[str, Tensor]:
    """This context-parallel rank's tokens of a batch.

    Args:
        batch: Tensors `[b, t]`; b = 1 where packed.
        group: Context-parallel ranks.
        packed_seq_params: Of :func:`pad_documents`; None for rows of one sequence.

    Raises:
        UserError: If the sequence length is not divisible by 2 cp.
    """
    size = group.size()
    if size == 1:
        return dict(batch)
    for tensor in batch.values():
        if packed_seq_params is None and tensor.shape[1] % (2 * size):
            raise UserError(
                f"the sequence length {tensor.shape[1]} is not divisible by "
                f"2 x context_parallel_size = {2 * size}"
            )
    if packed_seq_params is None:
        # By name: megatron-core 0.18 has another argument in second place.
        return get_batch_on_this_cp_rank(dict(batch), cp_group=group)
    num_tokens = next(iter(batch.values())).shape[1] // size
    index = SequenceLayout.of(num_tokens, packed_seq_params, group).stream_index()
    return {name: tensor.index_select(1, index) for name, tensor in batch.items()}
