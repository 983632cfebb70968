"""Orders of heads that know nothing of the model, to compare plans with.

Each is a full ranking without ties, so that a plan of any size follows from it. They fill a head
scores file like a scorer's effects, under the pseudo-probe :data:`CONTROL_PROBE`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_hydra.errors import UserError

CONTROLS = ("random", "fixed", "every_nth")
"""``random``: by lot. ``fixed``: the same heads in every layer, low indices first. ``every_nth``:
all heads of every n-th layer (the last of each n, as layer-wise hybrids have it), then of the
others, from below."""

CONTROL_PROBE = "control"
"""Sub-probe and capability of a control's one pseudo-pair."""


def control_effects(
    name: str, num_layers: int, num_heads: int, *, seed: int = 0, every: int = 4
) -> NDArray[np.float64]:
    """The effects of a control: its ranking, from 1 for the first head down to 1 / (l n).

    Args:
        name: One of :data:`CONTROLS`.
        num_layers: l.
        num_heads: n.
        seed: Of ``random``.
        every: n-th layers of ``every_nth``; 4 fits a budget of a quarter of the heads.

    Returns:
        [1, l, n].

    Raises:
        UserError: If the name is unknown or ``every`` leaves no layer.
    """
    layers, heads = np.indices((num_layers, num_heads)).reshape(2, -1)
    if name == "random":
        order = np.random.default_rng(seed).permutation(num_layers * num_heads)
    elif name == "fixed":
        order = np.lexsort((layers, heads))
    elif name == "every_nth":
        if not 1 <= every <= num_layers:
            raise UserError(
                f"every_nth keeps every layer number {every}; allowed: 1 to {num_layers}"
            )
        order = np.lexsort((heads, layers, (layers + 1) % every != 0))
    else:
        raise UserError(f"unknown control {name!r}; known controls: {', '.join(CONTROLS)}")
    effects = np.empty(num_layers * num_heads)
    effects[order] = np.arange(num_layers * num_heads, 0, -1) / (num_layers * num_heads)
    return effects.reshape(1, num_layers, num_heads)
