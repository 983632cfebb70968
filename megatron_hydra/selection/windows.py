"""Which of the heads without full attention become sliding windows: those that do local work."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from fractions import Fraction

import numpy as np

from megatron_hydra.errors import UserError
from megatron_hydra.model.mixers.costs import COSTS
from megatron_hydra.selection.budget import Budget
from megatron_hydra.selection.combination import Array
from megatron_hydra.selection.optimiser import Head
from megatron_hydra.selection.scores import HeadScores

SCORERS = ("mean_ablation", "window_ablation")
"""By whose effects windows are chosen."""


def kept_in_window(scores: HeadScores) -> Array:
    """What answers lose without a head and do not lose while it sees a window, [layers, heads].

    The difference of two mean effects, by the scores' weights of capabilities: large for a head
    whose work is local, about 0 for one that does nothing and for one that looks far back.

    Raises:
        UserError: If one of the two scorers was not run.
    """
    if missing := [name for name in SCORERS if name not in scores.effects]:
        raise UserError(
            f"the scores have no {' and no '.join(missing)}, by which windows are chosen: run "
            f"`score` with scorers.names that hold {' and '.join(SCORERS)}"
        )
    without, in_window = (
        scores.with_combination(
            replace(scores.combination, scorers=(name,), consistency=False, normalise=False)
        ).scores
        for name in SCORERS
    )
    return without - in_window


def check_windows(ratio: Fraction, la_kind: str, budget_kind: str) -> None:
    """See that windows can be chosen beside what a plan is told; arguments as of it.

    Raises:
        UserError: If not.
    """
    if not 0 <= ratio <= 1:
        raise UserError(f"the window ratio is {float(ratio):g}; allowed: 0 to 1")
    if COSTS[la_kind].memory == "window":
        raise UserError(f"model.la_kind is {la_kind}: all heads without FA are windows already")
    if budget_kind in ("cache_gib", "decode_ms"):
        raise UserError(
            f"a budget by {budget_kind} counts no windows: give the number or ratio of FA heads, "
            "or of the KV cache, beside --window-ratio"
        )


def choose_windows(
    scores: HeadScores, fa_heads: Collection[Head], ratio: Fraction, budget: Budget
) -> dict[int, list[int]]:
    """The heads that become windows, by layer.

    Args:
        scores: Of every head.
        fa_heads: Keep full attention.
        ratio: Share of all heads that become windows, rounded to the nearest number.
        budget: That the FA heads were chosen by.

    Raises:
        UserError: If the ratio is no share, the heads do not suffice, all others are windows
            already, the budget is one that windows' states would break, or
            :func:`kept_in_window` raises.
    """
    shape = scores.shape
    check_windows(ratio, shape.la_kind, budget.kind)
    kept, number = kept_in_window(scores), round(ratio * shape.total_heads)
    ranked = np.argsort(-kept, axis=None, kind="stable")
    others = [head for head in _places(ranked, shape.num_heads) if head not in fa_heads]
    if number > len(others):
        raise UserError(f"{number} heads cannot become windows: {len(others)} have no FA")
    found: dict[int, list[int]] = {}
    for layer, head in sorted(others[:number]):
        found.setdefault(layer, []).append(head)
    return found


def _places(flat: Array, num_heads: int) -> list[Head]:
    return [divmod(int(index), num_heads) for index in flat]
