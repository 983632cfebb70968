"""`plan` and `recombine`: head scores and a budget become a head plan, with a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from megatron_hydra.errors import UserError
from megatron_hydra.files import check_output, check_outputs
from megatron_hydra.provenance import origin
from megatron_hydra.schema import read_config
from megatron_hydra.selection.budget import Budget, Constraints
from megatron_hydra.selection.combination import Combination
from megatron_hydra.selection.policy import PlanSummary, plan_from_scores, random_plan
from megatron_hydra.selection.scores import HeadScores
from megatron_hydra.selection.scoring_config import ScoringConfig
from megatron_hydra.selection.shape import LAHeads
from megatron_hydra.selection.windows import SCORERS, check_windows
from megatron_hydra.tasks.probes import find_sub_probe

_NO_RANDOM_WINDOWS = "heads drawn at random have no windows: leave --window-ratio out"


@dataclass(frozen=True)
class Planning:
    """What was written.

    Attributes:
        scores: As combined for this plan.
        summary: The plan, and why its heads are there.
        picture: Of the scores, with the plan's heads outlined.
    """

    scores: HeadScores
    summary: PlanSummary
    picture: Path


def plan(
    scores: Path,
    out: Path,
    budget: Budget,
    constraints: Constraints = Constraints(),
    *,
    combine: Sequence[str] = (),
    solver: Literal["exact", "greedy"] = "exact",
    window_ratio: Fraction = Fraction(0),
    random_seed: int | None = None,
    picture: Path | None = None,
    overwrite: bool = False,
) -> Planning:
    """Choose the heads that keep full attention; write the plan and its picture.

    Args:
        scores: What :func:`~megatron_hydra.api.score.score` wrote.
        out: The plan's JSON file.
        budget: What the plan may keep.
        constraints: What it must keep to.
        combine: As :func:`recombine`.
        solver: `greedy` takes the best head that fits, to compare.
        window_ratio: Share of all heads that become sliding windows; not with ``random_seed``.
        random_seed: Draw the heads at random, as a control; the scores decide nothing then.
        picture: PNG file; None for one beside the plan.
        overwrite: Replace existing outputs.

    Raises:
        UserError: For scores, a budget or constraints that cannot be met, or an output that is in
            the way; nothing is written then.
    """
    png = picture or out.with_suffix(".png")
    check_outputs([out, png], [scores])
    check_output(out, overwrite, "file")
    # Written before the plan: beside none it is left over from a call that was cut off.
    overwrite_png = overwrite or (picture is None and not out.exists())
    check_output(png, overwrite_png, "file")
    combined = recombine(HeadScores.load(scores), combine)
    if random_seed is None:
        summary = plan_from_scores(
            combined, budget, constraints, solver=solver, window_ratio=window_ratio
        )
    elif window_ratio:
        raise UserError(_NO_RANDOM_WINDOWS)
    else:
        summary = random_plan(combined, budget, constraints, seed=random_seed)
    provenance = {**summary.plan.provenance, **origin()}
    head_plan = dataclasses.replace(summary.plan, provenance=provenance)
    # matplotlib takes a while to import: bad input is reported first.
    from megatron_hydra.report.heatmap import save_head_map

    kind = "the plan" if random_seed is None else "a random plan"
    scorers = ", ".join(combined.combination.scorers).replace("_", " ")
    title = f"Head scores by {scorers}, with {kind}"
    save_head_map(png, combined, head_plan, title, overwrite_png)
    head_plan.save(out, overwrite)
    return Planning(combined, dataclasses.replace(summary, plan=head_plan), png)


@dataclass
class _Overrides:
    """What ``combine.KEY=VALUE`` and ``model.KEY=VALUE`` may change."""

    model: LAHeads
    combine: Combination


def recombine(scores: HeadScores, overrides: Sequence[str]) -> HeadScores:
    """The same effects under another combination, or for LA heads of another kind.

    Args:
        scores: Their own combination and sizes hold where nothing else is said.
        overrides: ``combine.KEY=VALUE``, whose scorers may be separated by commas, and
            ``model.la_kind``, ``model.sliding_window_tokens``.

    Raises:
        UserError: For an unknown key, scorer, capability or kind, or a value of the wrong kind.
    """
    if not overrides:
        return scores
    read = _read(overrides, dataclasses.asdict(scores.combination), scores.shape.la_heads)
    shape = dataclasses.replace(scores.shape, **dataclasses.asdict(read.model))
    return dataclasses.replace(scores.with_combination(read.combine), shape=shape)


def check_plan(
    scoring: ScoringConfig,
    combine: Sequence[str],
    window_ratio: Fraction = Fraction(0),
    budget_kind: str = "fa_heads",
    is_random: bool = False,
) -> None:
    """See, before scores are made, that a plan will find in them what it asks for.

    Args:
        scoring: How they will be made.
        combine: As of :func:`plan`.
        window_ratio: The same.
        budget_kind: Of its budget.
        is_random: Whether it has a `random_seed`.

    Raises:
        UserError: If a scorer or a capability is named that they will lack, nothing is left to
            score by, windows cannot be chosen, or an override is not allowed.
    """
    own, scorers = dataclasses.asdict(scoring.combination()), scoring.scorers.names
    read = _read(combine, own, dataclasses.asdict(LAHeads()))
    if window_ratio:
        check_windows(window_ratio, read.model.la_kind, budget_kind)
        if is_random:
            raise UserError(_NO_RANDOM_WINDOWS)
    wanted = (*read.combine.scorers, *(SCORERS if window_ratio else ()))
    if lacking := [name for name in dict.fromkeys(wanted) if name not in scorers]:
        raise UserError(
            f"the plan needs {' and '.join(lacking)}, which scorers.names of the scoring lacks"
        )
    asked = {find_sub_probe(name).capability for name in scoring.probes.names}
    for name in read.combine.weights:
        if name not in asked:
            raise UserError(
                f"the plan weighs {name!r}, for which probes.names of the scoring has no probe; "
                f"it has some for {', '.join(sorted(asked))}"
            )
    if not any(read.combine.weights.get(name, 1.0) for name in asked):
        raise UserError("the weights of all capabilities are 0: nothing is left to score by")


def _read(
    overrides: Sequence[str], combination: Mapping[str, Any], la_heads: Mapping[str, Any]
) -> _Overrides:
    """With what holds where nothing is said."""
    values = {f"combine.{name}": value for name, value in combination.items()}
    values |= {f"model.{name}": value for name, value in la_heads.items()}
    return read_config(_Overrides, None, [_as_list(word) for word in overrides], values)


def _as_list(override: str) -> str:
    """``combine.scorers=a,b`` as YAML's ``combine.scorers=[a,b]``."""
    key, equals, value = override.partition("=")
    if key == "combine.scorers" and not value.startswith("["):
        value = f"[{value}]"
    return key + equals + value
