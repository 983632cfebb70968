"""A scoring run: every scorer on every pair, over tensor- and data-parallel ranks, resumable.

The work is cut into units: a few pairs of one sub-probe, for one scorer in one round. Data-parallel
replicas take units in turn; a finished unit is written at once, so that a run that was cut off goes
on with those that are missing. Which rank measured a unit does not change its value.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_hydra.errors import UserError
from megatron_hydra.files import write_beside
from megatron_hydra.parallel import from_first_rank
from megatron_hydra.progress import Progress, no_progress
from megatron_hydra.selection.combination import Array
from megatron_hydra.selection.scorers.base import Scorer, collate
from megatron_hydra.selection.scores import ProbeRecord
from megatron_hydra.tasks.probes import Probe
from megatron_hydra.tasks.readout import answer_logits
from megatron_hydra.unfinished import UnfinishedWork

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


@dataclass(frozen=True)
class _Unit:
    probe: Probe
    pairs: tuple[int, ...]

    @property
    def key(self) -> str:
        return f"{self.probe.name}.{self.pairs[0]}-{self.pairs[-1]}"


class PartialFolder(UnfinishedWork):
    """What a scoring run has finished so far: a file for each of its units."""

    what, writer, units = "run", "scoring run", r".*\.npy"
    words: ClassVar[Mapping[str, str]] = {
        "teacher_config_hash": "shape of the teacher",
        "weights": "content of the teacher's weight files",
    }

    def load(self) -> dict[str, Array]:
        """Every finished unit, by name."""
        return {file.stem: np.load(file) for file in sorted(self.path.glob("*.npy"))}

    def save(self, name: str, values: Array) -> None:
        """Write one unit; a reader sees it whole or not at all."""
        with (
            write_beside(self.path / f"{name}.npy", overwrite=True) as temporary,
            temporary.open("wb") as stream,
        ):
            np.save(stream, values)


class ScoringRun:
    """Runs scorers on probes; every rank of the default process group makes and runs one.

    Args:
        model: The teacher's part on this rank, in evaluation mode.
        probes: Sub-probes, with names of their own.
        scorers: In order; a scorer sees the effects of those before it.
        partial: Where finished units are kept.
        min_gap: Readout -> the least clean-corrupt gap that counts, in logits or nats.
        batch_tokens: Tokens of one forward, unless a single sample is longer.
        progress: Shown on the first rank.
    """

    def __init__(
        self,
        model: GPTModel,
        probes: Sequence[Probe],
        scorers: Sequence[Scorer],
        partial: PartialFolder,
        min_gap: Mapping[str, float],
        batch_tokens: int = 8192,
        progress: Progress = no_progress,
    ) -> None:
        self.model, self.probes, self.scorers = model, probes, scorers
        self.partial, self.min_gap, self.batch_tokens = partial, min_gap, batch_tokens
        self.progress = progress if dist.get_rank() == 0 else no_progress
        self.finished: dict[str, Array] = {}
        self.seconds: dict[str, float] = {}
        """Phase -> how long it took: gaps, and each scorer's rounds."""

    def run(self) -> tuple[tuple[ProbeRecord, ...], dict[str, dict[str, Array]]]:
        """Measure everything that is not yet finished.

        Returns:
            The sub-probes' records and scorer -> sub-probe -> effects [kept pairs, layers, heads],
            the same on every rank.

        Raises:
            UserError: If a scorer can read no probe, a forward gives NaN or infinity, the model
                answers no pair of a probe, or the unfinished folder is of another run.
        """
        for scorer in self.scorers:
            if not any(scorer.accepts(probe) for probe in self.probes):
                raise UserError(f"no probe of probes.names can be read by scorer {scorer.name}")
        self.finished = from_first_rank(self._unfinished)
        records = self._measure_gaps()
        effects: dict[str, dict[str, Tensor]] = {}
        for scorer in self.scorers:
            round_number = 0
            while scorer.start_round(effects):
                round_number += 1
                effects[scorer.name] = self._measure(scorer, round_number, records)
        as_arrays = {
            scorer: {probe: values.numpy() for probe, values in by_probe.items()}
            for scorer, by_probe in effects.items()
        }
        return tuple(records.values()), as_arrays

    def _unfinished(self) -> dict[str, Array]:
        self.partial.open()
        return self.partial.load()

    def _measure_gaps(self) -> dict[str, ProbeRecord]:
        def gap(unit: _Unit) -> Tensor:
            batch = collate(unit.probe, unit.pairs)
            runs = (batch.clean, batch.corrupt)
            clean, corrupt = (
                batch.measure(answer_logits(self.model, tokens, batch.num_answer_tokens))
                for tokens in runs
            )
            return clean - corrupt

        units = {p.name: self._units(p, range(len(p.pairs))) for p in self.probes}
        found = self._run_units("gaps", units, gap)
        records = {}
        for probe in self.probes:
            gaps = found[probe.name].tolist()
            least = self.min_gap[probe.readout]
            kept = tuple(index for index, value in enumerate(gaps) if value >= least)
            records[probe.name] = ProbeRecord(
                probe.name, probe.capability, probe.readout, len(gaps), kept, tuple(gaps),
                probe.length_tokens, probe.seed,
            )  # fmt: skip
        mute = [record for record in records.values() if not record.kept]
        if mute:
            said = "; ".join(
                f"{r.name!r} (largest gap of {r.num_pairs} pairs {max(r.gaps):.3g}, "
                f"{self.min_gap[r.readout]:g} counts)"
                for r in mute
            )
            raise UserError(
                f"the model tells no pair apart of sub-probe {said}: leave it out of probes.names, "
                "or use a teacher that can do it"
            )
        return records

    def _measure(
        self, scorer: Scorer, round_number: int, records: Mapping[str, ProbeRecord]
    ) -> dict[str, Tensor]:
        def effects(unit: _Unit) -> Tensor:
            gaps = [records[unit.probe.name].gaps[index] for index in unit.pairs]
            values = scorer.measure(self.model, collate(unit.probe, unit.pairs, gaps))
            if not values.isfinite().all():
                raise UserError(
                    f"{scorer.name} found an effect that is not finite on {unit.probe.name!r}"
                )
            return values

        probes = [probe for probe in self.probes if scorer.accepts(probe)]
        units = {probe.name: self._units(probe, records[probe.name].kept) for probe in probes}
        return self._run_units(f"{scorer.name}.{round_number}", units, effects)

    def _units(self, probe: Probe, pairs: Sequence[int]) -> list[_Unit]:
        size = max(1, self.batch_tokens // probe.length_tokens)
        return [
            _Unit(probe, tuple(pairs[start : start + size])) for start in range(0, len(pairs), size)
        ]

    def _run_units(
        self, phase: str, units: Mapping[str, Sequence[_Unit]], compute: Callable[[_Unit], Tensor]
    ) -> dict[str, Tensor]:
        """Compute the units of a phase that are not finished; sub-probe -> values of its pairs."""
        every = [unit for of_probe in units.values() for unit in of_probe]
        waiting = [unit for unit in every if f"{phase}.{unit.key}" not in self.finished]
        rank = parallel_state.get_data_parallel_rank()
        mine = waiting[rank :: parallel_state.get_data_parallel_world_size()]
        found, start = {}, time.perf_counter()
        for unit in self.progress(mine, phase, "batch"):
            name = f"{phase}.{unit.key}"
            found[name] = compute(unit).numpy()
            if parallel_state.get_tensor_model_parallel_rank() == 0:
                self.partial.save(name, found[name])
        for part in _gather(found):
            self.finished.update(part)
        self.seconds[phase] = time.perf_counter() - start
        return {
            name: torch.cat(
                [torch.from_numpy(self.finished[f"{phase}.{unit.key}"]) for unit in of_probe]
            )
            for name, of_probe in units.items()
        }


def probes_digest(probes: Sequence[Probe]) -> str:
    """A hash of every token of the probes: the same words mean the same work."""
    pairs = [
        [probe.name, [[s.tokens, s.answer] for p in probe.pairs for s in p]] for probe in probes
    ]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


def _gather(found: dict[str, Array]) -> list[dict[str, Array]]:
    group = parallel_state.get_data_parallel_group()
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, found, group=group)
    return parts
