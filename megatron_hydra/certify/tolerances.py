"""How far a layout's quantities may be from the reference's.

Tolerances are derived on the spot. The reference is trained a second time from weights whose
last bit is changed at random: what that does to the logits and gradients is what rounding does to
this model, at its depth and precision. A layout may differ by a small multiple of it, and never
by more than the cap, at which a layout would be called wrong whatever the rounding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_hydra.certify.comparison import QUANTITIES, Difference
from megatron_hydra.certify.training import Record

# Multiples of what one changed bit per weight does, and of the precision's unit roundoff, below
# which a single draw of such changes says nothing.
_TIMES_ROUNDING, _LEAST_ROUNDOFFS = 8.0, 64.0
# Each layout sums the squares of other parts of a gradient.
_TIMES_SUMMATION = 2.0
_CAPS: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {
        "logits": 1e-3,
        "loss": 1e-4,
        "gradient norm": 1e-3,
        "gradients": 5e-3,
        "parameters": 2e-3,
    },
    torch.bfloat16: {
        "logits": 0.1,
        "loss": 1e-2,
        "gradient norm": 0.05,
        "gradients": 0.5,
        "parameters": 0.1,
    },
}

# transformers runs an exported model with operators of its own. In bf16, and in the TF32 of a GPU's
# kernels, these round at other places than Megatron's: there the cap decides.
_EXPORTED_FLOAT32_ON_A_CPU = 1e-5


def tolerances_of(
    record: Record, rounding: Mapping[str, Difference], dtype: torch.dtype
) -> dict[str, float]:
    """Of each quantity.

    Args:
        record: The reference's.
        rounding: What one changed bit per weight does to it.
        dtype: Of the parameters.
    """
    least = dict.fromkeys(QUANTITIES, _LEAST_ROUNDOFFS * torch.finfo(dtype).eps)
    least["gradient norm"] += _TIMES_SUMMATION * _summation_error(record)
    return {
        quantity: min(max(_TIMES_ROUNDING * found.value, least[quantity]), _CAPS[dtype][quantity])
        for quantity, found in rounding.items()
    }


def tolerance_of_export(dtype: torch.dtype) -> float:
    """Of an exported model's logits."""
    if dtype == torch.float32 and not torch.cuda.is_available():
        return _EXPORTED_FLOAT32_ON_A_CPU
    return _CAPS[dtype]["logits"]


def _summation_error(record: Record) -> float:
    """Relative error of the optimizer's gradient norm, which it sums in float32."""
    squares = sum(value.double().square().sum().item() for value in record.gradients.values())
    return abs(record.grad_norms[0] - squares**0.5) / squares**0.5
