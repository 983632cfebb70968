"""What every scorer takes (batches of counterfactual pairs) and gives (effects).

Legend: a = answer tokens, b = pairs, l = layers, n = heads of a layer, s = sequence,
v = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_hydra.errors import UserError
from megatron_hydra.tasks.probes import Probe, Readout
from megatron_hydra.tasks.readout import log_probability, logit_difference, teacher_forced

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

Effects = Mapping[str, Mapping[str, Tensor]]
"""Scorer -> sub-probe -> float64 [kept pairs, l, n]."""


@dataclass(frozen=True)
class PairBatch:
    """Some pairs of one sub-probe; both runs are teacher-forced with the clean answer, so that
    their inputs differ where the pair's prompts differ and nowhere else.

    Attributes:
        probe: Name of the sub-probe.
        clean: Tokens [b, s] whose last a positions predict the answer.
        corrupt: The same of the corrupt prompts.
        right: Tokens of the clean answer [b, a].
        wrong: Tokens of the corrupt answer [b, a].
        readout: Which m(x).
        answer_positions: For each pair, where the answer's own copy stands in the prompt; empty
            where it stands nowhere.
        gaps: m(x) - m(x') [b], float64; zeros before they are measured.
    """

    probe: str
    clean: Tensor
    corrupt: Tensor
    right: Tensor
    wrong: Tensor
    readout: Readout
    answer_positions: tuple[tuple[int, ...], ...]
    gaps: Tensor

    @property
    def num_pairs(self) -> int:
        """b."""
        return self.right.shape[0]

    @property
    def num_answer_tokens(self) -> int:
        """a."""
        return self.right.shape[1]

    def one_by_one(self) -> Iterator[PairBatch]:
        """Batches of one pair each."""
        for pair in range(self.num_pairs):
            one = slice(pair, pair + 1)
            names = ("clean", "corrupt", "right", "wrong", "answer_positions", "gaps")
            yield replace(self, **{name: getattr(self, name)[one] for name in names})

    def measure(self, logits: Tensor) -> Tensor:
        """The readout m of logits [..., b, a, v]: [..., b] in float64.

        Raises:
            UserError: If a logit is not finite.
        """
        if self.readout == "logit_difference":
            value = logit_difference(logits, self.right, self.wrong)
        else:
            value = log_probability(logits, self.right)
        if not value.isfinite().all():
            raise UserError(f"the model's logits on probe {self.probe!r} are not finite")
        return value.cpu()

    def effects(self, clean: Tensor, patched: Tensor) -> Tensor:
        """Indirect effects (m(x) - m(patched)) / (m(x) - m(x')) (Eq 10).

        Args:
            clean: m of the clean run, [b].
            patched: m of the patched runs, [..., b].
        """
        return (clean - patched) / self.gaps


def collate(probe: Probe, pairs: Sequence[int], gaps: Sequence[float] = ()) -> PairBatch:
    """Lay out some of a probe's pairs.

    Args:
        probe: The sub-probe.
        pairs: Indices of its pairs.
        gaps: The clean-corrupt gap of each of them, once measured.
    """
    chosen = [probe.pairs[index] for index in pairs]
    clean, right = teacher_forced([pair.clean for pair in chosen])
    corrupt, _ = teacher_forced([pair.corrupt for pair in chosen], right.tolist())
    return PairBatch(
        probe.name,
        clean,
        corrupt,
        right,
        torch.tensor([pair.corrupt.answer for pair in chosen]),
        probe.readout,
        tuple(pair.clean.answer_positions for pair in chosen),
        torch.tensor(gaps or [0.0] * len(chosen), dtype=torch.float64),
    )


class Scorer:
    """A way to measure heads: one file each.

    A scorer works in rounds. Before each, :meth:`start_round` sees all effects found so far, its
    own earlier rounds' included, and says whether there is anything left to do; in a round,
    :meth:`measure` is called once for each batch of each accepted probe. Only the last round's
    effects count.
    """

    name: str
    _num_rounds = 0

    def start_round(self, done: Effects) -> bool:
        """Prepare the next round; False if there is none, by itself after the first.

        Raises:
            UserError: If the scorer needs another one's effects that are not there.
        """
        self._num_rounds += 1
        return self._num_rounds == 1

    def accepts(self, probe: Probe) -> bool:
        """Whether the scorer can read this kind of probe; every one, unless it says otherwise."""
        return True

    def measure(self, model: GPTModel, batch: PairBatch) -> Tensor:
        """Measure every head on every pair: float64 [b, l, n], on the CPU.

        1 means that the head alone carries the answer, 0 that it makes no difference. Collective
        over the tensor-parallel group; ``model`` is a teacher in evaluation mode on one pipeline
        stage, without sequence parallel.
        """
        raise NotImplementedError
