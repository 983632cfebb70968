"""A hybrid's configuration as the exported model's."""

from __future__ import annotations

import torch

from megatron_hydra.export.configuration_hydra import HydraHeadConfig
from megatron_hydra.export.modeling_hydra import HydraForCausalLM
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.config import HydraConfig
from megatron_hydra.model.options import stored_fields

NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "seq_length": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta",
    "qk_layernorm": "qk_norm",
    "add_qkv_bias": "qkv_bias",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
}
"""Fields of HydraConfig that are called otherwise in the exported configuration."""
_NOT_TOLD = ("la_kind", "head_init_seed")
"""Fields that say with the plan what each head is, or no longer matter once there are weights."""
SAME = tuple(name for name in stored_fields() if name not in {*NAMES, *_NOT_TOLD})
"""Fields that keep their names."""


def exported_config(config: HydraConfig, plan: HeadPlan) -> HydraHeadConfig:
    """The exported model's configuration.

    Args:
        config: The hybrid's.
        plan: Its head plan.
    """
    kinds = [list(layer.kinds) for layer in plan.resolved(config.la_kind).layers]
    renamed = {theirs: getattr(config, ours) for ours, theirs in NAMES.items()}
    same = {name: getattr(config, name) for name in SAME}
    return HydraHeadConfig(head_kinds=kinds, **renamed, **same)


def exported_shapes(config: HydraConfig, plan: HeadPlan) -> dict[str, tuple[int, ...]]:
    """Every tensor of the exported model with its shape.

    Args:
        config: The hybrid's.
        plan: Its head plan.
    """
    with torch.device("meta"):
        model = HydraForCausalLM(exported_config(config, plan))
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
