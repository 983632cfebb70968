"""Distillation's loss as a run's YAML and the memory estimate know it; free of PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["forward", "reverse", "jsd"]
TEACHER_SHARE = 3 / 8
"""Of a chunk's rows, those whose teacher's logits exist at once: few enough to save memory, enough
for full products. The kernels and the memory estimate read it."""


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What the loss is, from a run's YAML to the kernels; `api.linear_kl` has the formulas.

    Attributes:
        kl_weight: Factor on the divergence.
        ce_weight: Factor on the cross entropy.
        kind: The divergence.
        jsd_beta: Share of the teacher in the mixture, between 0 and 1; read for "jsd" alone.
        temperature: T above 0, which softens both distributions of the divergence.
        chunk_tokens: Rows whose student's logits exist at once, 1 or more.
        float32_logits: Keep the sums of the logits' products in float32; otherwise the logits are
            rounded to the weights' dtype, as Megatron's output layer does. Costs memory and time.

    Raises:
        ValueError: If a value is out of range.
    """

    kl_weight: float
    ce_weight: float
    kind: Kind = "forward"
    jsd_beta: float = 0.5
    temperature: float = 1.0
    chunk_tokens: int = 1024
    float32_logits: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {get_args(Kind)}, got {self.kind!r}")
        if self.kind == "jsd" and not 0 < self.jsd_beta < 1:
            raise ValueError(f"jsd_beta must be between 0 and 1, got {self.jsd_beta}")
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be 1 or more, got {self.chunk_tokens}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
