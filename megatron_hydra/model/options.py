"""The new configuration fields of a head-level hybrid, declared once: without Megatron and PyTorch.

A training's YAML, planning and the configurations of Megatron and NeMo all take them from here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from megatron_hydra.errors import UserError
from megatron_hydra.model.mixers.costs import DEFAULT_LA_KIND, CostModel, LAKind
from megatron_hydra.model.parallel_sizes import ParallelSizes
from megatron_hydra.schema import MAY_LACK, Count, Limits, check_fields

CHOSEN_AT_LOAD = {"chosen_at_load": True}
"""Metadata of a field that no checkpoint stores: where and how a model runs."""
# Megatron's fields whose other values teacher and hybrid would not honour on every backend: what
# the layer specs fix, and what the FA and LA branches have no part for.
_MEGATRON_FIELDS: dict[str, Any] = {
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "add_bias_linear": False,
    "attention_dropout": 0.0,
    "window_size": None,
    "softmax_type": "vanilla",
    "qk_l2_norm": False,
    "qk_clip": False,
    "apply_query_key_layer_scaling": False,
    "attention_output_gate": False,
    "no_rope_freq": None,
    "experimental_attention_variant": None,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
}
_UNEVEN_STAGES = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


@dataclass
class HydraFields:
    """What a hybrid has beside Megatron's fields; a mixin, so that NeMo's config can carry it too.

    A field's type holds its choices and range. Defaults follow the paper (arXiv 2606.20097) where
    it is known, see the comments.
    """

    vocab_size: Count = 0
    """Tokens of the vocabulary; padded where tensor-parallel ranks cannot share them equally."""
    seq_length: Count = 2048
    """Longest sequence the model is built for, in tokens."""
    rotary_base: Annotated[float, Limits(above=0)] = 10000.0
    rope_scaling_factor: Annotated[float, Limits(least=1)] = 1.0
    """1 is plain RoPE; above it Llama 3.1's scaling with this factor, see `rotary.py`."""
    rope_low_freq_factor: Annotated[float, Limits(above=0)] = 1.0
    rope_high_freq_factor: Annotated[float, Limits(above=0)] = 4.0
    rope_original_length: Count = 8192
    share_embeddings_and_output_weights: bool = False

    backend: Literal["local", "transformer_engine"] = field(
        default="local", metadata=CHOSEN_AT_LOAD
    )
    """`local` (PyTorch) or `transformer_engine`: linears, norms and core attention."""
    la_kernel: Literal["auto", "reference", "fla"] = field(default="auto", metadata=CHOSEN_AT_LOAD)
    """`reference` (PyTorch), `fla` (Triton) or `auto`: fla on a GPU, the reference on a CPU."""
    fused_kernels: Literal["auto", "reference", "triton"] = field(
        default="auto", metadata=CHOSEN_AT_LOAD
    )
    """What surrounds the LA kernel, the fusion, and distillation's loss: `triton` (our kernels),
    `reference` (PyTorch; the backend's norm in the fusion) or `auto`: triton on a GPU, the
    reference on a CPU. The fusion `gate` always runs as the reference."""
    overlap_branches: bool | None = field(default=None, metadata=CHOSEN_AT_LOAD)
    """On a GPU, run the LA heads on a stream of their own beside the FA heads. None: up to 32,768
    tokens per micro-batch on one context-parallel rank, where that measured faster."""
    placement: Literal["balanced", "by_type"] = field(default="balanced", metadata=CHOSEN_AT_LOAD)
    """How a layer's heads are dealt to tensor-parallel ranks: `balanced` or `by_type`."""
    head_init_seed: int = 1234
    """Seeds the per-head initialisation, which is the same for every layout."""

    # FA heads: no position encoding, query scaled by log position, output gate at identity.
    fa_rope: bool = False
    fa_query_scale: Literal["none", "inference", "always"] = "inference"
    """When queries are scaled by log_a(max(t - start, 0) + a): `none`, `inference` or `always`."""
    fa_query_scale_base: Annotated[float, Limits(above=1)] = 500.0
    """a in the scale above (HALO, arXiv 2601.22156)."""
    fa_query_scale_start: Annotated[int, Limits(least=0, below=2**31)] = 0
    """Positions up to this one, in tokens, keep scale 1; the training length is a good choice."""
    fa_output_gate: bool = True

    # LA heads. What begins with la_ holds for all kinds that have a recurrence: their native parts,
    # plus RoPE on q and k.
    la_kind: LAKind = field(default=DEFAULT_LA_KIND, metadata=MAY_LACK)
    """What the heads are that are not FA, where the plan names no kind: `gated_delta_net` (arXiv
    2412.06464), `kda` (Kimi Delta Attention, arXiv 2510.26692) or `sliding_window`."""
    la_short_conv: bool = True
    la_conv_kernel_size: Count = 4
    la_decay: bool = True
    la_beta: bool = True
    la_output_gate: Literal["silu", "sigmoid", "none"] = "silu"
    """`silu` (native), `sigmoid` (twice the sigmoid: identity at the start) or `none`."""
    la_rope: bool = True
    la_qk_norm: bool = True
    """Keep the teacher's q and k norms before the L2 norm; says nothing where it has none."""

    # Heads of a sliding window, with the teacher's RoPE and an output gate at identity.
    sliding_window_tokens: Count = field(default=512, metadata=MAY_LACK)
    """Tokens that a head attends to, its own counted in."""
    sliding_window_sink: bool = field(default=True, metadata=MAY_LACK)
    """A learnable logit per head in each softmax's sum, for weight that goes to no token. It scales
    a head's output, token by token; a fusion with a norm per head takes that off again, so there
    it has next to no effect."""

    # Fusion, the paper's Eq 13-14 and its Table 5.
    fusion: Literal["scale", "norm", "none", "gate"] = "scale"
    """`scale` (per-head RMSNorm and scale), `norm` (no scale), `none`, `gate` (dynamic)."""

    @property
    def cost_model(self: Any) -> CostModel:
        """The sizes that a head's costs depend on, by which placement deals heads out."""
        return CostModel(
            self.hidden_size,
            self.kv_channels,
            la_conv_kernel_size=self.la_conv_kernel_size if self.la_short_conv else 0,
            sliding_window_tokens=self.sliding_window_tokens,
        )

    @property
    def has_head_scales(self) -> bool:
        """Whether each head's output is multiplied by a scale of its own."""
        return self.fusion in ("scale", "gate")

    def check_hydra_fields(self: Any) -> None:
        """Check the fields of this mixin against each other and Megatron's.

        Raises:
            UserError: On the first value that is not allowed.
        """
        check_fields(self, HydraFields)
        epsilon = self.layernorm_epsilon  # Megatron's field; a NaN is above nothing
        if type(epsilon) not in (int, float) or not 0 < epsilon < math.inf:
            raise UserError(f"layernorm_epsilon is {epsilon!r}; it must be a finite number above 0")
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        if not low < high:
            raise UserError(
                f"rope_low_freq_factor is {low!r}; it must be below rope_high_freq_factor, {high!r}"
            )
        for name, only in _MEGATRON_FIELDS.items():
            value = getattr(self, name, only)  # not every Megatron has every field
            if value != only:
                raise UserError(f"{name} is {value!r}; hybrids and their teachers need {only!r}")
        if getattr(self, "num_moe_experts", None) is not None:
            raise UserError(
                f"num_moe_experts is {self.num_moe_experts}; hybrids and their teachers need dense "
                "MLPs: mixtures of experts, and with them expert parallelism, are out of scope"
            )
        self._check_parallel_sizes()

    def _check_parallel_sizes(self: Any) -> None:
        """Before Megatron does, whose modules assert while they are built.

        Uneven pipeline stages are Megatron's own fields, and its own checks.
        """
        heads = self.num_attention_heads
        uneven = any(getattr(self, name, None) for name in _UNEVEN_STAGES)
        ParallelSizes(
            num_layers=self.num_layers,
            num_attention_heads=heads,
            num_query_groups=self.num_query_groups or heads,
            kv_channels=self.kv_channels or self.hidden_size // heads,
            ffn_hidden_size=self.ffn_hidden_size or 4 * self.hidden_size,
            vocab_size=self.vocab_size,
        ).check(
            "the model",
            self.tensor_model_parallel_size,
            1 if uneven else self.pipeline_model_parallel_size,
        )


def stored_fields() -> tuple[str, ...]:
    """Names of the fields that a hybrid's checkpoint stores."""
    return tuple(item.name for item in fields(HydraFields) if "chosen_at_load" not in item.metadata)
