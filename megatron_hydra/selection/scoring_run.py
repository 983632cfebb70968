"""A scoring run: every scorer on every pair, over tensor- and data-parallel ranks, resumable.

The work is cut into units: a few pairs of one sub-probe, for one scorer in one round. Data-parallel
replicas take units in turn; a finished unit is written at once, so that a run that was cut off goes
on with those that are missing. Which rank measured a unit does not change its value.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_hydra.errors import UserError
from megatron_hydra.files import lock, parse_json, write_beside, write_json
from megatron_hydra.progress import Progress, no_progress
from megatron_hydra.selection.combination import Array
from megatron_hydra.selection.scorers.base import Scorer, collate
from megatron_hydra.selection.scores import ProbeRecord
from megatron_hydra.tasks.probes import Probe
from megatron_hydra.tasks.readout import answer_logits

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

_RECORD, _LOCK = "run.json", ".lock"
# How a message calls what makes two runs the same, where its key would not be understood.
_WORDS = {
    "teacher_config_hash": "shape of the teacher",
    "weights": "content of the teacher's weight files",
}


@dataclass(frozen=True)
class _Unit:
    probe: Probe
    pairs: tuple[int, ...]

    @property
    def key(self) -> str:
        return f"{self.probe.name}.{self.pairs[0]}-{self.pairs[-1]}"


class PartialFolder:
    """What a run has finished so far, beside its output.

    Args:
        out: The output; the folder is ``OUT.partial``.
        fingerprint: JSON values that make two runs the same; a folder of another run is refused.
        start_anew: Whether units of an earlier run are to go.
    """

    def __init__(self, out: Path, fingerprint: Mapping[str, Any], start_anew: bool = False) -> None:
        self.path = out.with_name(f"{out.name}.partial")
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.start_anew = start_anew
        self._lock = ExitStack()

    def open(self) -> None:
        """Make the folder, or check that it is of the same run; for one rank.

        It is locked until :meth:`remove` or the end of the process.

        Raises:
            UserError: If it is in use, of another run, or holds what no run has written.
        """
        if foreign := sorted(path.name for path in self._entries() if not _is_unit(path.name)):
            raise UserError(
                f"{self.path} holds {foreign[0]}, which no scoring run wrote, and unfinished "
                "scores would go there: move it, or name another output"
            )
        self._lock.enter_context(lock(self.path / _LOCK, f"the unfinished run {self.path}"))
        if self.start_anew:
            self._remove_units()
        record = self.path / _RECORD
        if not record.is_file():
            self._remove_units()  # of a run that was killed as it began, if there are any
            write_json(record, self.fingerprint)
            return
        try:
            found = _flat(parse_json(record.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {record}, of an unfinished run: {error}") from error
        own = _flat(self.fingerprint)
        for key in {**found, **own}:
            if found.get(key) != own.get(key):
                raise UserError(
                    f"{self.path} holds an unfinished run with another {_WORDS.get(key, key)}: "
                    "run that to its end, name another output, or pass --overwrite to leave what "
                    "it measured"
                )

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

    def remove(self) -> None:
        """Delete the folder; for the rank that opened it."""
        self._remove_units()
        (self.path / _LOCK).unlink(missing_ok=True)
        self._lock.close()
        with suppress(OSError):  # something else has come to lie there
            self.path.rmdir()

    def _entries(self) -> list[Path]:
        return list(self.path.iterdir()) if self.path.is_dir() else []

    def _remove_units(self) -> None:
        for path in self._entries():
            if _is_unit(path.name) and path.name != _LOCK:
                path.unlink()


class ScoringRun:
    """Runs scorers on probes; every rank of the default process group makes and runs one.

    Args:
        model: The teacher's part on this rank, in evaluation mode.
        probes: Sub-probes, with names of their own.
        scorers: In order; a scorer sees the effects of those before it.
        partial: Where finished units are kept; None keeps none.
        min_gap: Readout -> the least clean-corrupt gap that counts, in logits or nats.
        batch_tokens: Tokens of one forward, unless a single sample is longer.
        progress: Shown on the first rank.
    """

    def __init__(
        self,
        model: GPTModel,
        probes: Sequence[Probe],
        scorers: Sequence[Scorer],
        partial: PartialFolder | None,
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
        self._open()
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

    def _open(self) -> None:
        found: list[Any] = [None, None]
        if self.partial is not None and dist.get_rank() == 0:
            try:
                self.partial.open()
                found[0] = self.partial.load()
            except UserError as error:  # every rank must end, not the first alone
                found[1] = error
        dist.broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        self.finished = found[0] or {}

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
            if self.partial is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
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


def _is_unit(name: str) -> bool:
    """Whether a run writes files of this name; half-written ones end in `.partial`."""
    return (
        name in (_RECORD, _LOCK)
        or name.endswith(".npy")
        or re.fullmatch(r"\..*\.\d+\.partial", name) is not None
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as `section.key` -> value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _gather(found: dict[str, Array]) -> list[dict[str, Array]]:
    group = parallel_state.get_data_parallel_group()
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, found, group=group)
    return parts
