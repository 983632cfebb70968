"""Parallel sizes: which tensor-, pipeline- and context-parallel sizes a model's shape allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron_hydra.errors import UserError


def divisors(number: int) -> list[int]:
    """Of a whole number above 0, ascending; none of 0."""
    return [n for n in range(1, number + 1) if number % n == 0]


def padded_size(size: int, tp_size: int) -> int:
    """`size`, or the next multiple of `tp_size`: what equal parts for all ranks come to."""
    return -(-size // tp_size) * tp_size


def real_part(size: int, tp_size: int, tp_rank: int) -> tuple[int, int]:
    """Where a rank's part of something padded begins, and how much of it is no padding.

    All padding lies at the end: on the last rank, or the last ones.
    """
    part = padded_size(size, tp_size) // tp_size
    first = min(tp_rank * part, size)
    return first, min(part, size - first)


@dataclass(frozen=True)
class ParallelSizes:
    """What one shape allows, the same for a teacher and its hybrids.

    Heads, query groups and layers are not cut: they must be divisible. The vocabulary and the MLP's
    width need not be: each rank gets a part of one size, filled up with rows that take no part in
    anything (`padding.py`). Context-parallel ranks share tokens: any number of them fits any shape.

    A hybrid places its heads one by one: it needs no more than that the query heads are divisible.
    What else is asked for here comes from Megatron's attention, which the teachers run on.

    Attributes:
        num_layers: Layers.
        num_attention_heads: Query heads per layer.
        num_query_groups: Query groups (KV heads) per layer.
        kv_channels: Width of one head.
        ffn_hidden_size: Width of the gated MLP.
        vocab_size: Tokens of the vocabulary.
    """

    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int
    vocab_size: int

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ParallelSizes:
        """Those of HydraConfig's fields, of which others may be there too."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    @property
    def tensor(self) -> tuple[int, ...]:
        """Tensor-parallel sizes that are allowed, ascending."""
        sizes = range(1, self.num_attention_heads + 1)
        return tuple(size for size in sizes if self.why_not_tensor(size) is None)

    @property
    def pipeline(self) -> tuple[int, ...]:
        """Pipeline-parallel sizes that cut the layers into equal stages, ascending."""
        sizes = range(1, self.num_layers + 1)
        return tuple(size for size in sizes if self.why_not_pipeline(size) is None)

    def why_not_tensor(self, size: int) -> str | None:
        """What keeps the shape from this tensor-parallel size; None if nothing does."""
        heads, groups = self.num_attention_heads, self.num_query_groups
        if heads % size:
            return f"the {heads} query heads of a layer are not divisible by {size}"
        if groups % size and size % groups:
            return (
                f"of {size} and the {groups} query groups of a layer neither is divisible by the "
                "other, as the teacher's attention, Megatron's, needs"
            )
        if 2 * groups * self.kv_channels % size:
            return (
                f"the {2 * groups * self.kv_channels} rows of a layer's keys and values are "
                f"not divisible by {size}, as the teacher's attention, Megatron's, needs"
            )
        for what, whole in self._padded:
            if not real_part(whole, size, size - 1)[1]:
                return f"{what} of {whole} is too small to be shared by {size} ranks"
        return None

    def why_not_pipeline(self, size: int) -> str | None:
        """What keeps the shape from this pipeline-parallel size; None if nothing does."""
        if self.num_layers % size:
            return f"the {self.num_layers} layers are not divisible by {size}"
        return None

    def check(
        self,
        model: str,
        tensor: int = 1,
        pipeline: int = 1,
        *,
        section: str = "",
    ) -> None:
        """Check a layout.

        Args:
            model: What has the shape, as in "the teacher models/qwen3".
            tensor: Tensor-parallel size.
            pipeline: Pipeline-parallel size, in equal stages.
            section: What stands before `tensor_model_parallel_size` where the user gave it.

        Raises:
            UserError: If the shape does not allow a size; it names those that it allows.
        """
        for name, size, why_not, allowed in (
            ("tensor", tensor, self.why_not_tensor(tensor), self.tensor),
            ("pipeline", pipeline, self.why_not_pipeline(pipeline), self.pipeline),
        ):
            if why_not is not None:
                raise UserError(
                    f"{section}{name}_model_parallel_size {size} does not fit {model}: {why_not}; "
                    f"allowed: {_listed(allowed)}"
                )

    def describe(self) -> str:
        """One line: all that is allowed, and which sizes pad what."""
        pads = []
        for what, whole in self._padded:
            if sizes := [size for size in self.tensor if whole % size]:
                pads.append(f"{_listed(sizes)} {'pads' if len(sizes) == 1 else 'pad'} {what}")
        tensor = _listed(self.tensor) + (f" ({'; '.join(pads)})" if pads else "")
        return (
            f"parallel sizes: TP {tensor}; PP {_listed(self.pipeline)}; "
            "CP any (sequence length divisible by 2 x CP)"
        )

    @property
    def _padded(self) -> tuple[tuple[str, int], ...]:
        return (
            ("the vocabulary", self.vocab_size),
            ("the MLP's width", self.ffn_hidden_size),
        )


def _listed(sizes: tuple[int, ...] | list[int]) -> str:
    return ", ".join(map(str, sizes))
