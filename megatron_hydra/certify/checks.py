"""Which checks a certificate makes: every one that fits the ranks, the limits and the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch

from megatron_hydra.certify.layouts import Layout
from megatron_hydra.certify.tables import NotRun
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.parallel_sizes import ParallelSizes
from megatron_hydra.model.placement import place_heads

Against = Literal["one rank", "documents alone", "bits", "checkpoint", "exported folder"]


@dataclass(frozen=True)
class Limits:
    """The largest sizes that are tried; each by which ranks and model are divisible is."""

    tp: int = 1
    cp: int = 1
    pp: int = 1


@dataclass(frozen=True)
class Check:
    """One comparison.

    `one rank` and `documents alone` hold a layout to a reference within a tolerance; `bits` wants
    the same bits as `other`; `checkpoint` saves at `layout`, loads at `other` and comes back;
    `exported folder` saves at `layout`, and lets transformers run what is exported of it.
    """

    name: str
    layout: Layout
    against: Against = "one rank"
    other: Layout | None = None

    @property
    def compared_with(self) -> str:
        """For people."""
        if self.other is None:
            return self.against
        if self.other == self.layout:
            return "itself again"
        return self.other.name


def plan_checks(
    fields: dict[str, Any], plan: HeadPlan, world_size: int, limits: Limits
) -> tuple[list[Check], list[NotRun]]:
    """All checks of one model on so many ranks.

    Args:
        fields: HydraConfig's fields.
        plan: Of all its layers.
        world_size: Number of ranks.
        limits: The largest sizes that are tried.
    """
    planner = _Planner(fields, plan, world_size, limits)
    planner.tensor_parallel()
    planner.context_parallel()
    planner.pipeline()
    planner.data_parallel()
    planner.packed()
    planner.same_bits()
    planner.checkpoints()
    planner.exported()
    return planner.checks, planner.not_run


def has_single_kind_ranks(fields: dict[str, Any], plan: HeadPlan, layout: Layout) -> bool:
    """Whether some rank holds heads of one kind alone in a layer that has both."""
    for layer in plan.layers:
        placed = place_heads(
            layer,
            plan.num_query_groups,
            layout.tp,
            layout.placement,
            fields["seq_length"],  # type: ignore[arg-type]
        )
        kinds = [(placed.fa_heads(rank), placed.la_heads(rank)) for rank in range(layout.tp)]
        if layer.fa_heads and layer.la_heads and not all(fa and la for fa, la in kinds):
            return True
    return False


class _Planner:
    def __init__(
        self, fields: dict[str, Any], plan: HeadPlan, world_size: int, limits: Limits
    ) -> None:
        self.fields, self.plan, self.world_size, self.limits = fields, plan, world_size, limits
        self.num_layers = plan.num_layers
        self.checks: list[Check] = []
        self.not_run: list[NotRun] = []
        self.shape = ParallelSizes.of(fields)
        self.tp_sizes = [n for n in self._sizes(limits.tp) if n in self.shape.tensor]
        self.cp_sizes = self._sizes(limits.cp)
        self.pp_sizes = [n for n in self._sizes(limits.pp) if n <= self.num_layers]
        self.tp, self.cp, self.pp = (
            max(sizes, default=1) for sizes in (self.tp_sizes, self.cp_sizes, self.pp_sizes)
        )

    def tensor_parallel(self) -> None:
        self._say_if_none("tensor parallel", self.tp_sizes, "--tp", self.limits.tp)
        for tp in self._sizes(self.limits.tp):
            if (reason := self.shape.why_not_tensor(tp)) is not None:
                self.not_run.append(NotRun(f"tensor parallel {tp}", reason))
        for tp in self.tp_sizes:
            for placement in ("balanced", "by_type"):
                layout = Layout(tp=tp, placement=placement)
                what = "tensor parallel"
                if has_single_kind_ranks(self.fields, self.plan, layout):
                    what += ", ranks of one kind"
                self._add(what, layout)
                self._add(f"sequence parallel{what[15:]}", _with(layout, sequence_parallel=True))

    def context_parallel(self) -> None:
        self._say_if_none("context parallel", self.cp_sizes, "--cp", self.limits.cp)
        for cp in self.cp_sizes:
            self._add("context parallel", Layout(cp=cp))
        for layout in self._together(self.tp_sizes, self.cp_sizes, [1]):
            self._add("tensor and context parallel", layout)

    def pipeline(self) -> None:
        self._say_if_none("pipeline", self.pp_sizes, "--pp", self.limits.pp)
        for pp in self.pp_sizes:
            layout = Layout(pp=pp, num_micro_batches=2 * pp)
            if self.num_layers % pp == 0:
                self._add("pipeline", layout)
            else:
                self.not_run.append(
                    NotRun(f"pipeline {pp}", f"{self.num_layers} layers are not divisible by {pp}")
                )
            if self.num_layers > pp and (self.num_layers - 1) % (pp - 1) == 0:
                uneven = _with(layout, first_stage_layers=1)
                self._add("pipeline, uneven stages", uneven)
            else:
                self.not_run.append(
                    NotRun(f"pipeline {pp}, uneven stages", f"{self.num_layers} layers do not fit")
                )
            if self.num_layers % (2 * pp) == 0:
                self._add("pipeline, virtual stages", _with(layout, vpp=2))
            else:
                reason = f"{self.num_layers} layers are not divisible by {2 * pp}"
                self.not_run.append(NotRun(f"pipeline {pp}, virtual stages", reason))
        stages = [pp for pp in self.pp_sizes if self.num_layers % pp == 0]
        for name, tp_sizes, cp_sizes in (
            ("tensor parallel and pipeline", self.tp_sizes, [1]),
            ("context parallel and pipeline", [1], self.cp_sizes),
            ("tensor and context parallel and pipeline", self.tp_sizes, self.cp_sizes),
        ):
            for layout in self._together(tp_sizes, cp_sizes, stages):
                self._add(name, layout)

    def data_parallel(self) -> None:
        if self.world_size > 1:
            self._add("data parallel", Layout())
        self._add("gradient accumulation", Layout(num_micro_batches=2))
        if self.world_size == 1:
            self.not_run.append(NotRun("data parallel", "there is one rank"))
        # The smallest sizes leave ranks for data parallelism, which shares out the optimizer.
        least = self.tp_sizes[:1] or [1]
        stages = [pp for pp in self.pp_sizes[:1] if self.num_layers % pp == 0]
        layouts = [self._split(tp=tp) for tp in (1, self.tp)]
        layouts += self._together(least, [1, *self.cp_sizes[:1]], [1, *stages])
        for layout in dict.fromkeys(layouts):
            self._add("distributed optimizer", _with(layout, distributed_optimizer=True))
        for layout in (Layout(num_micro_batches=2), self._split(tp=least[0])):
            for shared in (False, True):
                overlap = _with(layout, overlap_grad_reduce=True, distributed_optimizer=shared)
                self._add("overlapped gradient sums", overlap)

    def packed(self) -> None:
        layouts = [Layout(), *self._rich()]
        layouts += [self._split(tp=self.tp), Layout(cp=self.cp)]
        if self.num_layers % self.pp == 0:
            layouts.append(Layout(pp=self.pp))
        for layout in dict.fromkeys(layouts):
            self._add("packed documents", self._packed(layout), "documents alone")

    def same_bits(self) -> None:
        rich = self._rich()
        for layout in dict.fromkeys((Layout(), *rich, *(self._packed(one) for one in rich))):
            self._add("deterministic rerun", layout, "bits", layout)
            for recompute in ("full", "selective"):
                again = _with(layout, recompute=recompute)
                self._add(f"recomputation, {recompute}", again, "bits", layout)

    def checkpoints(self) -> None:
        if self.fields["params_dtype"] != torch.float32:
            reason = "Megatron's bf16 optimizer cannot save a model that has float32 parameters too"
            self.not_run.append(NotRun("checkpoint there and back", reason))
            return
        here = self._split(tp=self.tp)
        others = [Layout(), self._split(tp=self.tp, placement="balanced"), Layout(cp=self.cp)]
        pipelines = [c.layout for c in self.checks if c.layout.pp > 1 and c.layout.tp == 1]
        others += [layout for layout in pipelines if layout.vpp or layout.first_stage_layers]
        for other in dict.fromkeys(others):
            if other != here:
                self._add("checkpoint there and back", here, "checkpoint", other)
        if here == Layout():
            self._add("checkpoint there and back", here, "checkpoint", here)

    def exported(self) -> None:
        layouts = [Layout(), self._split(tp=self.tp)]
        if self.num_layers % self.pp == 0:
            layouts.append(self._split(pp=self.pp))
        for layout in dict.fromkeys(layouts):
            self._add("exported and reloaded", layout, "exported folder")

    def _rich(self) -> list[Layout]:
        """The layout that splits in most ways at once; several where none has all ways."""
        both = self._together(self.tp_sizes, self.cp_sizes, [1])
        fitting = [layout for layout in both if self.world_size % layout.model_ranks == 0]
        if fitting:
            return [max(fitting, key=lambda layout: layout.model_ranks)]
        return [self._split(tp=self.tp), Layout(cp=self.cp)]

    def _together(self, *sizes: list[int]) -> list[Layout]:
        """All combinations that fit; the smallest where none does, so that this is said."""
        layouts = [self._split(tp=tp, cp=cp, pp=pp) for tp, cp, pp in product(*sizes)]
        fitting = [layout for layout in layouts if self.world_size % layout.model_ranks == 0]
        return fitting or layouts[:1]

    def _packed(self, layout: Layout) -> Layout:
        """Each row is a micro-batch."""
        each_rank = layout.model_ranks * num_rows(self.world_size) // self.world_size
        return _with(layout, packed=True, num_micro_batches=each_rank)

    def _split(self, tp: int = 1, cp: int = 1, pp: int = 1, placement: str = "by_type") -> Layout:
        return Layout(
            tp=tp,
            cp=cp,
            pp=pp,
            sequence_parallel=tp > 1,
            placement=placement if tp > 1 else "balanced",
            num_micro_batches=2 * pp if pp > 1 else 1,
        )

    def _sizes(self, limit: int) -> list[int]:
        return [size for size in range(2, limit + 1) if self.world_size % size == 0]

    def _add(
        self, name: str, layout: Layout, against: Against = "one rank", other: Layout | None = None
    ) -> None:
        if self.world_size % layout.model_ranks:
            reason = f"{layout.name} needs a multiple of {layout.model_ranks} ranks"
            self.not_run.append(NotRun(name, reason))
            return
        check = Check(name, layout, against, other)
        if check not in self.checks:
            self.checks.append(check)

    def _say_if_none(self, name: str, sizes: list[int], option: str, limit: int) -> None:
        if not sizes:
            reason = f"{option} is {limit}"
            if limit > 1:
                reason += f", and no size from 2 on fits both {self.world_size} ranks and the model"
            self.not_run.append(NotRun(name, reason))


def num_rows(world_size: int) -> int:
    """Rows of a packed batch: a multiple of the ranks, and at least 4."""
    return world_size * -(-4 // world_size)


def row_lengths(length: int, world_size: int) -> tuple[list[list[int]], list[list[int]]]:
    """The documents' lengths, row by row, of the plain and of the packed batch.

    The packed rows: one document that fills all, some of odd lengths that cross the borders
    between ranks, many tiny ones, and one token before a long document.
    """
    tiny = [1 + index % 3 for index in range(length // 4)]
    odd = [length // 3 + 1, 1, length - length // 3 - 9, 7]
    kinds = [[length], odd, tiny, [1, length - 1]]
    packed = [kinds[index % len(kinds)] for index in range(num_rows(world_size))]
    return [[length]] * (2 * world_size), packed


def _with(layout: Layout, **changes: Any) -> Layout:
    return dataclasses.replace(layout, **changes)
