"""From the effects of scorers on sub-probes to one score per head (Eq 12), each step switchable.

Legend: l = layers, n = heads of a layer, r = resamples or any other leading dimensions.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from megatron_hydra.errors import UserError
from megatron_hydra.schema import Limits, check_fields

logger = logging.getLogger(__name__)
Array = NDArray[np.float64]

NOTABLE_EFFECT = 0.01
"""A sub-probe counts for a head's consistency from this absolute mean effect on (Eq 12)."""


@dataclass(frozen=True)
class Combination:
    """How effects become scores; the defaults are the paper's but for ``weigh_by_gap``.

    Attributes:
        scorers: Whose effects enter; a head's strength is the largest among them.
        weigh_by_gap: Weigh each pair by its clean-corrupt gap, so that a mean effect is the ratio
            of the totals. An effect is divided by its pair's gap: where gaps differ, as on running
            text, pairs with small ones are the noisiest. Off: all pairs alike, as in the paper.
        consistency: Multiply a head's strength by its kappa, the share of the capability's
            sub-probes where some scorer finds an effect of :data:`NOTABLE_EFFECT` or more.
        normalise: Map each capability's strengths to 0 to 1 (min-max over all heads).
        weights: Weight of a capability in the mean; 1 where it is not named.

    Raises:
        UserError: If no scorer is named, a weight is negative, or a value of the wrong type.
    """

    scorers: tuple[str, ...]
    consistency: bool = True
    normalise: bool = True
    weights: Mapping[str, Annotated[float, Limits(least=0)]] = field(default_factory=dict)
    weigh_by_gap: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.scorers:
            raise UserError("the combination names no scorer")


def combine(
    means: Mapping[str, Mapping[str, Array]],
    capabilities: Mapping[str, str],
    combination: Combination,
) -> Array:
    """Head scores from mean effects: weighted mean of :func:`capability_scores`.

    Args:
        means: Scorer -> sub-probe -> mean effects [..., l, n]; a scorer may lack sub-probes.
        capabilities: Sub-probe -> its capability.
        combination: The switches.

    Returns:
        [..., l, n]; from 0 to 1 when normalised.

    Raises:
        UserError: If a scorer has no effects, a weight names no capability, or all weights are 0.
    """
    by_capability = capability_scores(means, capabilities, combination)
    for name in combination.weights:
        if name not in set(capabilities.values()):
            known = ", ".join(sorted(set(capabilities.values())))
            raise UserError(f"a weight is given for capability {name!r}; the scores have: {known}")
    weights = {name: combination.weights.get(name, 1.0) for name in by_capability}
    total = sum(weights.values())
    if total == 0:
        raise UserError("the weights of all capabilities are 0: nothing is left to score by")
    return np.asarray(sum(weights[name] / total * by_capability[name] for name in by_capability))


def capability_scores(
    means: Mapping[str, Mapping[str, Array]],
    capabilities: Mapping[str, str],
    combination: Combination,
) -> dict[str, Array]:
    """The score of each head for each capability, before weights; arguments as :func:`combine`."""
    for scorer in combination.scorers:
        if not means.get(scorer):
            raise UserError(
                f"the combination names scorer {scorer!r}, but the effects are of "
                f"{', '.join(sorted(name for name in means if means[name])) or 'none'}"
            )
    chosen = {scorer: means[scorer] for scorer in combination.scorers}
    found = {}
    for capability in dict.fromkeys(capabilities.values()):
        probes = [name for name in capabilities if capabilities[name] == capability]
        probes = [name for name in probes if any(name in by_probe for by_probe in chosen.values())]
        if not probes:
            continue
        strength = np.max([_strength(by, probes) for by in chosen.values()], axis=0)
        if combination.consistency:
            strength = strength * consistency(chosen, probes)
        found[capability] = _min_max(strength, capability) if combination.normalise else strength
    return found


def consistency(means: Mapping[str, Mapping[str, Array]], probes: list[str]) -> Array:
    """kappa, [..., l, n]: share of ``probes`` in which some scorer's effect is notable."""
    notable = []
    for probe in probes:
        sizes = [np.abs(by_probe[probe]) for by_probe in means.values() if probe in by_probe]
        notable.append(np.max(sizes, axis=0) >= NOTABLE_EFFECT)
    return np.asarray(np.mean(notable, axis=0), dtype=np.float64)


def _strength(by_probe: Mapping[str, Array], probes: list[str]) -> Array:
    """Mean over the sub-probes that a scorer has of the absolute mean effect; else 0."""
    sizes = [np.abs(by_probe[name]) for name in probes if name in by_probe]
    if not sizes:
        return np.zeros_like(next(iter(by_probe.values())))
    return np.asarray(np.mean(sizes, axis=0))


def _min_max(values: Array, capability: str) -> Array:
    """Map the least of the last two dimensions to 0, the largest to 1; a constant map to 0."""
    low = values.min(axis=(-2, -1), keepdims=True)
    spread = values.max(axis=(-2, -1), keepdims=True) - low
    if values.ndim == 2 and not spread.any():
        logger.warning("all heads score %g for %s: none stands out", low.item(), capability)
    return np.asarray(np.where(spread > 0, (values - low) / np.where(spread > 0, spread, 1.0), 0.0))
