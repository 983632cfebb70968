"""LA heads over context-parallel ranks: contiguous pieces of the stream, and what passes between.

The gated delta rule is affine in the state: over a piece of the stream, S' = A S + B, and each
output is o + P S with o, P, A, B known without S. So every rank runs its pieces at once, and each
twice: its values from a state of zeros give o and B, zeros from the identity P and A. The pairs
B, A are gathered, composed in order, and o + P S follows. A rank sends one such pair per head and
piece, and the convolution's last tokens: nothing that grows with the sequence. No rank waits for
another's recurrence, and no number of heads or ranks needs to be divisible by another.

Legend: as `sequence.py`; m = pieces on a rank, b = batch, n = LA heads on the rank.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    all_to_all,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_hydra.model.sequence import SequenceLayout


class Pieces:
    """The contiguous pieces of the stream that one rank's LA heads run over.

    Of an unpacked batch they are the rank's two load-balanced chunks as they lie. The documents of
    a packed one are cut each on its own, so its tokens change places first, once to and once fro:
    rank r then has the r-th of cp equal parts of the stream, wherever documents begin and end.

    Args:
        layout: The rank's tokens.
        group: Context-parallel ranks.
    """

    def __init__(self, layout: SequenceLayout, group: dist.ProcessGroup) -> None:
        self.layout, self.group = layout, group
        self.is_split = layout.size > 1
        self.moves_tokens = self.is_split and layout.cu_seqlens is not None
        if self.moves_tokens or not self.is_split:
            self._order = [[rank] for rank in range(layout.size)]
        else:
            self._order = [[rank, 2 * layout.size - 1 - rank] for rank in range(layout.size)]
        self.own = self._order[layout.rank]

    @classmethod
    def of(
        cls,
        num_tokens: int,
        packed_seq_params: PackedSeqParams | None,
        group: dist.ProcessGroup,
        first_position: int = 0,
    ) -> Pieces:
        """The pieces of what a layer was handed; arguments as :meth:`SequenceLayout.of`.

        All layers of a step share those of a packed row: looking for documents waits for the GPU,
        and the kernels keep what they look up for the very tensor `cu_seqlens`.
        """
        if packed_seq_params is None:
            return cls(SequenceLayout.of(num_tokens, None, group, first_position), group)
        kept: dict[Any, Pieces] = vars(packed_seq_params).setdefault("hydra_pieces", {})
        key = (num_tokens, group)
        if key not in kept:
            kept[key] = cls(SequenceLayout.of(num_tokens, packed_seq_params, group), group)
        return kept[key]

    @cached_property
    def positions(self) -> Tensor:
        """`[s]` int64: each token's position in its document, once tokens are where they run."""
        if not self.moves_tokens:
            return self.layout.positions
        s = self.layout.num_tokens
        start = self.layout.rank * s
        return self.layout.position(torch.arange(start, start + s, device=self.layout.device))

    @cached_property
    def cu_seqlens(self) -> Tensor | None:
        """Where documents begin in this rank's one piece, 0 and s at the ends; None if unpacked."""
        boundaries = self.layout.cu_seqlens
        if boundaries is None or not self.is_split:
            return boundaries
        s = self.layout.num_tokens
        return (boundaries - self.layout.rank * s).clamp(0, s).unique()

    def to_contiguous(self, x: Tensor) -> Tensor:
        """Bring tokens `[s, ...]` where they run: one all-to-all, only if packed."""
        if not self.moves_tokens:
            return x
        sent, received, place = self._exchange
        return all_to_all(self.group, x, received, sent)[place.argsort()]

    def from_contiguous(self, x: Tensor) -> Tensor:
        """Bring tokens back; undoes :meth:`to_contiguous`."""
        if not self.moves_tokens:
            return x
        sent, received, place = self._exchange
        return all_to_all(self.group, x[place], sent, received)

    @cached_property
    def _exchange(self) -> tuple[list[int], list[int], Tensor]:
        """Tokens sent to and received from each rank; the received ones' places in the piece."""
        layout, s = self.layout, self.layout.num_tokens
        indices = [layout.stream_index(rank) for rank in range(layout.size)]
        arriving = [index[index // s == layout.rank] for index in indices]
        sent = torch.bincount(indices[layout.rank] // s, minlength=layout.size).tolist()
        return sent, [len(index) for index in arriving], torch.cat(arriving) - layout.rank * s

    def batch_first(self, x: Tensor) -> Tensor:
        """`[s, b, ...]` to `[m b, s / m, ...]`, each piece a row."""
        return x.unflatten(0, (len(self.own), -1)).transpose(1, 2).flatten(0, 1)

    def sequence_first(self, x: Tensor) -> Tensor:
        """`[m b, s / m, ...]` to `[s, b, ...]`."""
        return x.unflatten(0, (len(self.own), -1)).transpose(1, 2).flatten(0, 1)

    def tokens_before(self, x: Tensor, count: int) -> Tensor | None:
        """The tokens that come before each piece in the stream, for a convolution.

        Args:
            x: `[m b, s / m, c]`.
            count: How many.

        Returns:
            `[m b, count, c]`, zeros where the document does not reach so far back; None without
            context parallelism.
        """
        if not self.is_split or count == 0:
            return None
        tails = self._gather(x[:, -count:])  # [pieces, b, tokens, c]
        rows = []
        for piece in self.own:
            before = tails[:piece].transpose(0, 1).flatten(1, 2)[:, -count:]
            rows.append(F.pad(before, (0, 0, count - before.shape[1], 0)))
        result = torch.cat(rows)
        if self.moves_tokens:
            reach = torch.arange(count, 0, -1, device=x.device) <= self.positions[0]
            result = result * reach[:, None]
        return result

    def start_of_recurrence(self, like: Tensor) -> Tensor:
        """The identity for each head, `[m b, n, d, d]` float32; zeros where a document begins.

        Args:
            like: Values `[m b, s / m, n, d]`.
        """
        rows, _, n, d = like.shape
        state = torch.eye(d, dtype=torch.float32, device=like.device)
        if self.moves_tokens:
            state = state * (self.positions[0] > 0)
        return state.expand(rows, n, d, d)

    def states_before(self, ends: Tensor) -> Tensor:
        """The state before each piece, composed of what all pieces do to it.

        Args:
            ends: B and A of this rank's pieces, `[m b, n, 2, d, d]`.

        Returns:
            `[m b, n, d, d]`.
        """
        additions, transitions = self._gather(ends).unbind(-3)
        # Zeros as a sum of nothing: the gather stays in the graph of a rank that has the first
        # piece alone, so that its backward collective runs on every rank.
        states = [additions[:0].sum(0)]
        for piece in range(max(self.own)):
            states.append(transitions[piece] @ states[-1] + additions[piece])
        return torch.cat([states[piece] for piece in self.own])

    def _gather(self, x: Tensor) -> Tensor:
        """`[m b, ...]` of every rank to `[pieces, b, ...]` in the stream's order."""
        parts = x.unflatten(0, (len(self.own), -1)).contiguous()
        gathered = gather_from_sequence_parallel_region(parts, group=self.group)
        order = [piece for rank in self._order for piece in rank]
        return gathered[torch.tensor(order, device=x.device).argsort()]
