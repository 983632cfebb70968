"""The certificate: every check run, its worst difference held to a tolerance; JSON and tables."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_hydra.certify.checks import Check, Limits, plan_checks, row_lengths
from megatron_hydra.certify.comparison import (
    QUANTITIES,
    Difference,
    bit_differences,
    bit_differences_of_tensors,
    differences,
    logit_difference,
)
from megatron_hydra.certify.exported import exported_logits
from megatron_hydra.certify.global_tensors import assemble
from megatron_hydra.certify.layouts import Batch, Layout, random_batch
from megatron_hydra.certify.tables import CertificateFile, NotRun, Row
from megatron_hydra.certify.tolerances import tolerance_of_export, tolerances_of
from megatron_hydra.certify.training import Record, Run, Trainer, save_first_weights, train
from megatron_hydra.certify.worlds import Ranks
from megatron_hydra.errors import UserError
from megatron_hydra.files import versions
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.config import HydraConfig
from megatron_hydra.model.options import HydraFields

logger = logging.getLogger(__name__)

WELL_CONDITIONED: dict[str, Any] = {"layernorm_epsilon": 1e-2}
"""Fields of the model that a certificate changes, and says so.

At an epsilon of 1e-6 the norm of a head whose output is nearly zero, as an LA head's is at a
document's first tokens, amplifies rounding up to a thousandfold; two right layouts then differ by
as much as a right one and a slightly wrong one.
"""


@dataclass
class Certificate:
    """What was found, on rank 0; on other ranks the verdict alone."""

    passed: bool
    file: CertificateFile | None


@dataclass
class _Reference:
    record: Record
    tolerances: dict[str, float]


def certify(
    run: Run,
    limits: Limits,
    length: int,
    ranks: Ranks,
    *,
    world_size: int,
    rank: int,
    select: Callable[[Check], bool] = lambda check: True,
) -> Certificate:
    """Run every check that fits.

    Collective over all ranks that torchrun started; no process group is needed before.

    Args:
        run: Model, plan and folders.
        limits: The largest parallel sizes.
        length: Tokens of a row of the batch.
        ranks: Enters a world for every layout.
        world_size: Number of ranks.
        rank: This one.
        select: Which of the checks that fit are run.

    Raises:
        UserError: If no check is left.
    """
    checks, not_run = plan_checks(run.fields, run.resolved_plan, world_size, limits)
    checks = [check for check in checks if select(check)]
    if not checks:
        raise UserError(f"no check of that name fits {world_size} ranks and this model")
    if torch.cuda.is_available():  # a warning where a kernel has no deterministic form
        torch.use_deterministic_algorithms(True, warn_only=True)
    plain_lengths, packed_lengths = row_lengths(length, world_size)
    vocab = run.fields["vocab_size"]
    plain, packed = random_batch(plain_lengths, vocab), random_batch(packed_lengths, vocab)
    certifier = _Certifier(run, ranks, plain, packed, rank, world_size)
    if rank == 0:
        certifier.make_references(any(check.layout.packed for check in checks))
    for check in checks:
        certifier.run_check(check)
    passed = certifier.share_verdict()
    ranks.leave()
    file = certifier.certificate(limits, length, not_run) if rank == 0 else None
    return Certificate(passed, file)


class _Certifier:
    def __init__(
        self, run: Run, ranks: Ranks, plain: Batch, packed: Batch, rank: int, world_size: int
    ) -> None:
        self.run, self.ranks, self.rank, self.world_size = run, ranks, rank, world_size
        self.batches = {False: plain, True: packed}
        self.references: dict[str, _Reference] = {}
        self.kept: dict[Layout, Record] = {}
        self.rows: list[Row] = []
        self.peak_bytes: dict[str, list[int]] = {}

    def make_references(self, with_packed: bool) -> None:
        """On this rank alone, in a world of one."""
        self.ranks.enter(Layout(), alone=True)
        save_first_weights(self.run)
        logger.info("reference: one rank, the whole batch at once")
        self.references["one rank"] = self._reference(Layout(), self.batches[False])
        if with_packed:
            logger.info("reference: every document alone")
            alone = self.batches[True].alone()
            layout = Layout(num_micro_batches=len(alone.rows))
            self.references["documents alone"] = self._reference(layout, alone)

    def _reference(self, layout: Layout, batch: Batch) -> _Reference:
        record = train(self.run, layout, batch)
        nudged = train(self.run, layout, batch, nudge=True)
        rounding = differences(nudged, record, self.run.resolved_plan)
        dtype = self.run.fields["params_dtype"]
        return _Reference(record, tolerances_of(record, rounding, dtype))

    def run_check(self, check: Check) -> None:
        """Run one check; its rows are kept on rank 0."""
        logger.info("%s: %s against %s", check.name, check.layout.name, check.compared_with)
        first = len(self.rows)
        if check.against == "checkpoint":
            self._checkpoint(check)
        elif check.against == "bits":
            self._same_bits(check)
        elif check.against == "exported folder":
            self._exported(check)
        else:
            record = self._train(check.layout)
            if self.rank == 0:
                self._hold(check, record, self.references[check.against])
        found = [f"{x.quantity} {x.difference:.1e} ({x.tolerance:.1e})" for x in self.rows[first:]]
        if found:  # here, too, as a run that is cut off writes no certificate
            logger.info("found, and allowed: %s", ", ".join(found))

    def _train(self, layout: Layout) -> Record:
        self.ranks.enter(layout)
        record = train(self.run, layout, self.batches[layout.packed])
        self.peak_bytes[layout.name] = record.peak_bytes
        return record

    def _hold(self, check: Check, record: Record, reference: _Reference) -> None:
        found = differences(record, reference.record, self.run.resolved_plan)
        for quantity in QUANTITIES:
            self._add(check, quantity, found[quantity], reference.tolerances[quantity])
        self._add(check, "replica drift", Difference(record.drift, record.drift_at), 0.0)

    def _same_bits(self, check: Check) -> None:
        assert check.other is not None
        if check.other not in self.kept:
            self.kept[check.other] = self._train(check.other)
        record = self._train(check.layout)
        if self.rank == 0:
            found = bit_differences(record, self.kept[check.other])
            self._add(check, "all bits", found, 0.0)

    def _checkpoint(self, check: Check) -> None:
        """Train and save here, load and save there, load here: the same bits, and the same step."""
        assert check.other is not None
        folders = [self.run.scratch / f"checkpoint{index}" for index in range(2)]
        first = self._trainer(check.layout)
        first.load_weights(self.run.weights)
        for _ in range(2):
            first.step()
        first.save(folders[0])
        here = first.state_tensors()
        first.step()
        undisturbed = first.state_tensors()
        del first  # no two at a time
        second = self._trainer(check.other)
        second.load(folders[0])
        there = second.state_tensors()
        second.save(folders[1])
        del second
        third = self._trainer(check.layout)
        third.load(folders[1])
        back = third.state_tensors()
        third.step()
        resumed = third.state_tensors()
        if self.rank == 0:
            for name, tensors in (("loaded there", there), ("loaded back", back)):
                self._add(check, name, bit_differences_of_tensors(tensors, here), 0.0)
            found = bit_differences_of_tensors(resumed, undisturbed)
            self._add(check, "next step", found, 0.0)
            for folder in folders:
                shutil.rmtree(folder)
        dist.barrier()

    def _exported(self, check: Check) -> None:
        """Train a step and save here; rank 0 exports that, and transformers loads it."""
        folder = self.run.scratch / "exported"
        trainer = self._trainer(check.layout)
        trainer.load_weights(self.run.weights)
        trainer.step()
        logits = assemble(trainer.logits(), self.run.scratch).tensors
        trainer.save(folder / "weights", with_optimizer=False)
        del trainer
        self.ranks.leave()
        if self.rank == 0:
            self.ranks.enter(Layout(), alone=True)
            found = exported_logits(self.run, folder, self.batches[check.layout.packed])
            tolerance = tolerance_of_export(self.run.fields["params_dtype"])
            self._add(check, "logits", logit_difference(found, logits), tolerance)
            shutil.rmtree(folder)

    def _trainer(self, layout: Layout) -> Trainer:
        self.ranks.enter(layout)
        return Trainer(self.run, layout, self.batches[layout.packed])

    def _add(self, check: Check, quantity: str, found: Difference, tolerance: float) -> None:
        row = Row(
            check.name,
            check.layout.name,
            check.compared_with,
            quantity,
            found.value,
            found.at,
            tolerance,
            found.value <= tolerance,
        )
        if not row.passed:
            logger.warning("%s: %s of %s differ at %s", row.check, quantity, row.layout, row.at)
        self.rows.append(row)

    def share_verdict(self) -> bool:
        """Rank 0's verdict, on every rank."""
        if not dist.is_initialized() or dist.get_world_size() < self.world_size:
            self.ranks.enter(Layout())
        verdict = [bool(self.rows) and all(row.passed for row in self.rows)]
        dist.broadcast_object_list(verdict, src=0)
        return verdict[0]

    def certificate(
        self, limits: Limits, length: int, not_run: Sequence[NotRun]
    ) -> CertificateFile:
        """Everything that was found."""
        config = HydraConfig(**self.run.fields)
        names = [field.name for field in dataclasses.fields(HydraFields)]
        return CertificateFile(
            schema_version=1,
            kind="certificate",
            passed=bool(self.rows) and all(row.passed for row in self.rows),
            versions=versions(),
            device=device_name(),
            backend=config.backend,
            precision=str(config.params_dtype).removeprefix("torch."),
            num_ranks=self.world_size,
            limits=dataclasses.asdict(limits),
            length_tokens=length,
            num_steps=self.run.num_steps,
            config={name: getattr(config, name) for name in names}
            | {name: value for name, value in self.run.fields.items() if _is_plain(value)},
            changed_for_certification=WELL_CONDITIONED,
            plan_hash=plan_hash(self.run.plan),
            fa_heads={str(i): list(x.fa_heads) for i, x in enumerate(self.run.plan.layers)},
            rows=self.rows,
            peak_bytes=self.peak_bytes,
            not_run=list(not_run),
        )


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def plan_hash(plan: HeadPlan) -> str:
    """SHA-256 (hex) of which heads are FA, and of kinds that are named; not of its provenance."""
    fa_heads = [list(layer.fa_heads) for layer in plan.layers]
    values = [plan.num_layers, plan.layers[0].num_heads, plan.num_query_groups, fa_heads]
    if not {kind for layer in plan.layers for kind in layer.kinds} <= {"fa", "la"}:
        values.append([layer.kinds for layer in plan.layers])
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def device_name() -> str:
    """The GPU's name, or `CPU`."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
