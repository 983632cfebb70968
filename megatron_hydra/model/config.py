"""A hybrid's configuration: the fields of `options.py` on top of Megatron's TransformerConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hydra.model.options import HydraFields


@dataclass
class HydraConfig(HydraFields, TransformerConfig):
    """Megatron's TransformerConfig with the hybrid's fields, for use without NeMo."""

    def __post_init__(self) -> None:
        """Check and complete the fields.

        Raises:
            UserError: As :meth:`HydraFields.check_hydra_fields`.
        """
        self.check_hydra_fields()
        super().__post_init__()


def recompute_fields(granularity: str | None, num_layers: int | None = None) -> dict[str, Any]:
    """Megatron's fields that recompute activations.

    Args:
        granularity: `selective`, what lies between an attention's two projections; `full`, each
            layer; None or `none`, nothing.
        num_layers: With `full`, the first so many layers of a pipeline stage alone; None for all.
    """
    if granularity in (None, "none"):
        return {}
    fields: dict[str, Any] = {"recompute_granularity": granularity}
    if granularity == "full":
        method = "uniform" if num_layers is None else "block"
        fields |= {"recompute_method": method, "recompute_num_layers": num_layers or 1}
    return fields
