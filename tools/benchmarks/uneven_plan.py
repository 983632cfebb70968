"""Plans of Qwen3-1.7B's shape whose layers differ as those of a global top-K of head scores do.

A model of which every layer has as many FA heads as the next has one size of everything; the plans
that `megatron-hydra plan` writes have another size in each layer, from no FA head to all of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from qwen3_1p7b import GROUPS, HEADS, LAYERS

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan, LayerHeadPlan

PINNED_COUNTS = (0, 1, 3, 5, 9, HEADS)
"""Numbers of FA heads that some layer of every plan has."""


def uneven_scores(num_fa_heads: int, seed: int = 0) -> NDArray[np.float64]:
    """Head scores whose `num_fa_heads` highest are an uneven plan's FA heads.

    A head's score is its layer's scale times its own, both log-normal: a few layers hold much of
    all. One layer, drawn by lot, of each of `PINNED_COUNTS` is then scaled so that as many of its
    heads are among the highest.

    Args:
        num_fa_heads: From 35 to 386: the pinned layers take 34, the other 22 the rest.
        seed: Of the draws.

    Returns:
        `[28, 16]`, above 0.

    Raises:
        UserError: If there is no such plan.
    """
    free = num_fa_heads - sum(PINNED_COUNTS)
    most = (LAYERS - len(PINNED_COUNTS)) * HEADS
    if not 1 <= free <= most:
        low, high = (sum(PINNED_COUNTS) + n for n in (1, most))
        raise UserError(f"an uneven plan has {low} to {high} FA heads, not {num_fa_heads}")
    generator = np.random.default_rng(seed)
    scales = generator.lognormal(sigma=1.0, size=(LAYERS, 1))
    scores = scales * generator.lognormal(sigma=1.0, size=(LAYERS, HEADS))
    layers = generator.permutation(LAYERS)
    pinned = layers[: len(PINNED_COUNTS)]
    lowest = np.sort(scores[layers[len(PINNED_COUNTS) :]], axis=None)[-free]  # that is still FA
    for layer, count in zip(pinned, PINNED_COUNTS, strict=True):
        # The border is put between the last that is FA and the next.
        ranked = np.sort(scores[layer])[::-1]
        last = ranked[count - 1] if count else 4 * ranked[0]
        following = ranked[count] if count < HEADS else ranked[-1] / 4
        scores[layer] *= lowest / np.sqrt(last * following)
    return scores


def uneven_plan(num_fa_heads: int, seed: int = 0) -> HeadPlan:
    """The plan of the highest of :func:`uneven_scores`, whose arguments and errors it has."""
    scores = uneven_scores(num_fa_heads, seed)
    chosen = np.argsort(-scores, axis=None)[:num_fa_heads]
    fa_heads: dict[int, list[int]] = {}
    for layer, head in zip(*np.unravel_index(chosen, scores.shape), strict=True):
        fa_heads.setdefault(int(layer), []).append(int(head))
    return HeadPlan.from_fa_heads(fa_heads, LAYERS, HEADS, GROUPS)


def layers_by_count(plan: HeadPlan) -> dict[int, LayerHeadPlan]:
    """By number of FA heads, ascending: the first layer of a plan that has so many."""
    by_count = {len(layer.fa_heads): layer for layer in reversed(plan.layers)}
    return dict(sorted(by_count.items()))
