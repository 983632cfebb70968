"""The sizes of a teacher, which its hybrids share: all that planning asks of a model.

Free of PyTorch, so that planning starts quickly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.mixers.costs import WINDOW_KIND, CostModel, LAKind
from megatron_hydra.model.options import HydraFields
from megatron_hydra.model.parallel_sizes import ParallelSizes
from megatron_hydra.schema import MAY_LACK, Count, Limits, check_fields

if TYPE_CHECKING:
    from megatron_hydra.model.config import HydraConfig


@dataclass(frozen=True, kw_only=True)
class LAHeads:
    """The model's options that decide what its LA heads cost; a plan may be made for any of them.

    Attributes:
        la_kind: What the LA heads are.
        sliding_window_tokens: What heads of a sliding window see.
    """

    la_kind: LAKind = field(default=HydraFields.la_kind, metadata=MAY_LACK)
    sliding_window_tokens: Count = field(
        default=HydraFields.sliding_window_tokens, metadata=MAY_LACK
    )


@dataclass(frozen=True)
class ModelShape(LAHeads):
    """Sizes of a teacher, which its hybrids share: all that the costs depend on.

    Attributes:
        num_layers: Layers.
        num_heads: Query heads per layer.
        num_query_groups: Query groups (KV heads) per layer.
        head_dim: Width of one head.
        hidden_size: Width of the model.
        ffn_hidden_size: Width of the gated MLP.
        vocab_size: Rows of the embedding and of the output layer.
        tied_embeddings: Whether both are one matrix.
        conv_kernel_size: Taps of the LA heads' short convolution; 0 without.

    Raises:
        UserError: If a size is no positive whole number, or the heads are not divisible by groups.
    """

    FORMER_KEYS: ClassVar = ("value_bytes",)  # the number format that the weights had

    num_layers: Count
    num_heads: Count
    num_query_groups: Count
    head_dim: Count
    hidden_size: Count
    ffn_hidden_size: Count
    vocab_size: Count
    tied_embeddings: bool
    conv_kernel_size: Annotated[int, Limits(least=0)] = 4

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_heads % self.num_query_groups:
            raise UserError(
                f"{self.num_heads} heads are not divisible by {self.num_query_groups} query groups"
            )

    @classmethod
    def from_config(cls, config: HydraConfig) -> ModelShape:
        """The shape of the models that a configuration builds, teacher or hybrid."""
        return cls.from_fields(vars(config))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> ModelShape:
        """As :meth:`from_config`, of a configuration's fields; those of LA heads may be lacking."""
        taps = fields.get("la_conv_kernel_size", cls.conv_kernel_size)
        la_heads = {item.name for item in dataclass_fields(LAHeads)}
        return cls(
            num_layers=fields["num_layers"],
            num_heads=fields["num_attention_heads"],
            num_query_groups=fields["num_query_groups"],
            head_dim=fields["kv_channels"],
            hidden_size=fields["hidden_size"],
            ffn_hidden_size=fields["ffn_hidden_size"],
            vocab_size=fields["vocab_size"],
            tied_embeddings=fields["share_embeddings_and_output_weights"],
            conv_kernel_size=taps if fields.get("la_short_conv", True) else 0,
            **{name: fields[name] for name in la_heads & fields.keys()},
        )

    @property
    def la_heads(self) -> dict[str, Any]:
        """What :class:`LAHeads` says, by the names of the model's options."""
        return {item.name: getattr(self, item.name) for item in dataclass_fields(LAHeads)}

    @property
    def total_heads(self) -> int:
        """Query heads of all layers."""
        return self.num_layers * self.num_heads

    @property
    def total_groups(self) -> int:
        """Query groups of all layers."""
        return self.num_layers * self.num_query_groups

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key and value."""
        return self.num_heads // self.num_query_groups

    @property
    def cost_model(self) -> CostModel:
        """The sizes that a head's costs depend on."""
        return CostModel(
            self.hidden_size,
            self.head_dim,
            la_conv_kernel_size=self.conv_kernel_size,
            sliding_window_tokens=self.sliding_window_tokens,
        )

    @property
    def parallel_sizes(self) -> ParallelSizes:
        """The layouts that can hold such a model."""
        return ParallelSizes(
            num_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_query_groups=self.num_query_groups,
            kv_channels=self.head_dim,
            ffn_hidden_size=self.ffn_hidden_size,
            vocab_size=self.vocab_size,
        )


def even_plan(shape: ModelShape, fa_ratio: float, window_ratio: float = 0.0) -> HeadPlan:
    """A plan of so many FA heads, and windows among the others, evenly spread: for estimates alone.

    Args:
        shape: Of the model.
        fa_ratio: Share of all heads.
        window_ratio: The same.

    Raises:
        UserError: If one is no share, or both are more than all heads.
    """
    for name, ratio in (("FA heads", fa_ratio), ("windows", window_ratio)):
        if not 0 <= ratio <= 1:
            raise UserError(f"the fraction of {name} is {ratio:g}; allowed: 0 to 1")
    total, n = shape.total_heads, shape.num_heads
    num_fa, num_windows = round(fa_ratio * total), round(window_ratio * total)
    if num_fa + num_windows > total:
        raise UserError(f"{num_windows} of {total} heads cannot become windows beside {num_fa} FA")
    fa = [i * total // num_fa for i in range(num_fa)]
    others = sorted({*range(total)} - {*fa})
    windows = [others[i * len(others) // num_windows] for i in range(num_windows)]

    def by_layer(heads: Sequence[int]) -> dict[int, list[int]]:
        return {
            layer: [head % n for head in heads if head // n == layer]
            for layer in range(shape.num_layers)
        }

    return HeadPlan.from_fa_heads(
        by_layer(fa), shape.num_layers, n, shape.num_query_groups,
        other_kinds={layer: {WINDOW_KIND: heads} for layer, heads in by_layer(windows).items()},
    )  # fmt: skip


def whole_layers(shape: ModelShape, fraction: float) -> HeadPlan:
    """As many of all heads FA, as near as can be, in layers that are FA throughout, spread."""
    number = round(fraction * shape.num_layers)
    layers = [place * shape.num_layers // number for place in range(number)]
    heads = list(range(shape.num_heads))
    sizes = (shape.num_layers, shape.num_heads, shape.num_query_groups)
    return HeadPlan.from_fa_heads(dict.fromkeys(layers, heads), *sizes)
