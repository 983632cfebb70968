"""The top of the report: which teacher and software, and the range of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import PurePath
from typing import Any, NamedTuple

from megatron_hydra.evaluation.results import Accuracy, Cell
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.report.measured import Measured, MeasuredModel
from megatron_hydra.report.training_runs import recorded
from megatron_hydra.selection.cost import (
    SERVE_DTYPES,
    num_heads_keeping,
    num_stored_groups,
    other_heads,
    weight_bytes,
)
from megatron_hydra.selection.policy import read_shape
from megatron_hydra.selection.scores import HeadScores
from megatron_hydra.selection.shape import ModelShape

Versions = Mapping[str, Mapping[str, Sequence[str]]]
"""Package -> version -> names of the inputs that record it."""


class Range(NamedTuple):
    """The worst and the median cell of a model; of an even number the lower middle one."""

    model: MeasuredModel
    worst_cell: Cell
    median_cell: Cell

    @property
    def worst(self) -> Accuracy:
        """In the worst cell."""
        return self.model.accuracy[self.worst_cell]

    @property
    def median(self) -> Accuracy:
        """In the median cell."""
        return self.model.accuracy[self.median_cell]


def range_of(model: MeasuredModel) -> Range:
    """The model's range; of equally bad cells the first is named."""
    cells = sorted(model.accuracy, key=lambda cell: model.accuracy[cell].value)
    return Range(model, cells[0], cells[(len(cells) - 1) // 2])


def headline(
    scores: HeadScores,
    plan: HeadPlan,
    measured: Measured,
    versions: Versions,
    teacher_name: str,
    written: date | None,
) -> dict[str, Any]:
    """What the top of the page shows.

    Args:
        scores: Of every head of the teacher.
        plan: Made from them.
        measured: The teacher and at least one hybrid of the plan.
        versions: Of all inputs.
        teacher_name: As the user calls it; empty: by the scores' own record, if it has one.
        written: When the page is written; None leaves that out.
    """
    recorded_name = PurePath(str(recorded(scores.provenance, "config", "model", "teacher") or ""))
    name = teacher_name or recorded_name.name
    ranges = {model.name: range_of(model) for model in measured.models}
    num_heads = plan.num_layers * plan.num_heads
    title = f"{plan.num_fa_heads} of {num_heads} heads on full attention"
    best = max(
        (ranges[model.name] for model in hybrids_of(plan, measured)),
        key=lambda found: (found.median.value, found.worst.value),
    )
    kind = (read_shape(plan) or scores.shape).la_kind
    return {
        "other_heads": other_heads(plan, kind),
        "has_windows": num_heads_keeping("window", plan, kind) > 0,
        "title": f"{name}: {title}" if name else title,
        "teacher_name": name,
        "shape": scores.shape,
        "num_parameters": num_parameters(scores.shape),
        "software": [f"{package} {' and '.join(found)}" for package, found in versions.items()],
        "written": written,
        # Of groups, not bytes: the same in every number format.
        "cache_share": num_stored_groups(plan) / (plan.num_layers * plan.num_query_groups),
        "best": best,
        "teacher": ranges[measured.teacher.name],
        "ranges": list(ranges.values()),
    }


def hybrids_of(plan: HeadPlan, measured: Measured) -> list[MeasuredModel]:
    """Hybrids of this very plan: a control has as many FA heads, but others."""
    fa_heads = tuple(layer.fa_heads for layer in plan.layers)
    return [model for model in measured.models if model.plan == fa_heads]


def num_parameters(shape: ModelShape) -> int:
    """Parameters of the teacher's weight matrices; its norms' vectors are left out."""
    return round(weight_bytes(shape, "bf16").teacher) // SERVE_DTYPES["bf16"]
