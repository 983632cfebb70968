"""Megatron layer specs: Megatron's transformer layer with a hybrid attention, by backend."""

from __future__ import annotations

import dataclasses

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan, LayerHeadPlan
from megatron_hydra.model.config import HydraConfig
from megatron_hydra.model.hydra_attention import HydraAttention, HydraAttentionSubmodules
from megatron_hydra.model.local_modules import LocalCoreAttention, LocalRMSNorm
from megatron_hydra.model.mixers.kinds import check_kinds
from megatron_hydra.model.padding import needs_padding, padded_mlp


def get_hydra_layer_spec(config: HydraConfig, layer_plan: LayerHeadPlan) -> ModuleSpec:
    """Spec of one layer: Megatron's own, with :class:`HydraAttention` as its self-attention.

    Args:
        config: The model's configuration.
        layer_plan: The kind of each head of the layer.

    Raises:
        UserError: If plan and config disagree, or Transformer Engine is not installed.
    """
    if layer_plan.num_heads != config.num_attention_heads:
        raise UserError(
            f"the plan has {layer_plan.num_heads} heads per layer, "
            f"the model {config.num_attention_heads}"
        )
    layer = _base_layer(config)
    attention = ModuleSpec(
        module=HydraAttention,
        params={"layer_plan": layer_plan},
        submodules=_attention_submodules(config),
    )
    return _with(
        layer,
        self_attention=attention,
        input_layernorm=IdentityOp if _fuses_norm(config) else _norm(config),
        # A checkpoint has the norm under one name, whether it is fused or not.
        sharded_state_dict_keys_map={
            **_without_attention(layer.submodules),
            "self_attention.in_proj.layer_norm_": "input_layernorm.",
        },
    )


def get_hydra_block_spec(
    config: HydraConfig, plan: HeadPlan, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Spec of this pipeline stage's layers, each by its own plan; for `GPTModel`.

    Args:
        config: The model's configuration.
        plan: The whole model's plan.
        vp_stage: Virtual pipeline stage, if there are any.

    Raises:
        UserError: If plan and config disagree, or a kind of head is unknown.
    """
    plan.check_teacher(config.num_layers, config.num_attention_heads, config.num_query_groups, "")
    check_kinds(plan)
    # Layers that differ must not be stacked on one axis of a checkpoint's tensors.
    config.hetereogenous_dist_checkpoint = True
    specs = [get_hydra_layer_spec(config, layer_plan) for layer_plan in plan.layers]
    return _block(config, specs, vp_stage)


def get_teacher_block_spec(
    config: HydraConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Spec of the teacher's layers: Megatron's own SelfAttention, no hybrid anywhere."""
    layer = _base_layer(config)
    if config.backend == "local":
        attention, qk_norm = layer.submodules.self_attention, _qk_norm(config)
        attention.submodules = dataclasses.replace(
            attention.submodules,
            core_attention=LocalCoreAttention,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        )
        layer = _with(layer, input_layernorm=LocalRMSNorm)
    return _block(config, [layer] * config.num_layers, vp_stage)


def _base_layer(config: HydraConfig) -> ModuleSpec:
    """Megatron's own spec of a layer, the MLP padded where ranks cannot share it equally."""
    layer = _megatron_layer(config)
    if needs_padding(config, config.ffn_hidden_size):
        layer = _with(layer, mlp=padded_mlp(layer.submodules.mlp))
    return layer


def _megatron_layer(config: HydraConfig) -> ModuleSpec:
    if config.backend == "local":
        layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
        return _with(layer, pre_mlp_layernorm=LocalRMSNorm)
    if config.backend == "transformer_engine":
        _transformer_engine()
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    raise UserError(f"backend is {config.backend!r}; allowed: local, transformer_engine")


def _fuses_norm(config: HydraConfig) -> bool:
    """Whether the norm before the attention is part of its in-projection's module.

    The dynamic gate looks at the normed hidden states, which then would not leave that module.
    """
    return config.backend == "transformer_engine" and config.fusion != "gate"


def _attention_submodules(config: HydraConfig) -> HydraAttentionSubmodules:
    qk_norm = _qk_norm(config)
    if config.backend == "local":
        return HydraAttentionSubmodules(
            in_proj=ColumnParallelLinear,
            core_attention=LocalCoreAttention,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
            head_norm=LocalRMSNorm,
            linear_proj=RowParallelLinear,
        )
    te, fuses_norm = _transformer_engine(), _fuses_norm(config)
    return HydraAttentionSubmodules(
        in_proj=te.TELayerNormColumnParallelLinear if fuses_norm else te.TEColumnParallelLinear,
        core_attention=te.TEDotProductAttention,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
        head_norm=te.TENorm,
        linear_proj=te.TERowParallelLinear,
    )


def _norm(config: HydraConfig) -> type:
    return LocalRMSNorm if config.backend == "local" else _transformer_engine().TENorm


def _qk_norm(config: HydraConfig) -> type:
    return _norm(config) if config.qk_layernorm else IdentityOp


def _transformer_engine():  # type: ignore[no-untyped-def]
    """Megatron's wrappers of Transformer Engine.

    Raises:
        UserError: If Transformer Engine is not installed.
    """
    from megatron.core.extensions import transformer_engine

    if not transformer_engine.HAVE_TE:
        raise UserError(
            "backend is 'transformer_engine', which is not installed: "
            "install megatron-hydra[te] on a GPU machine, or use backend 'local'"
        )
    return transformer_engine


def _block(
    config: HydraConfig, specs: list[ModuleSpec], vp_stage: int | None
) -> TransformerBlockSubmodules:
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=specs[offset : offset + count], layer_norm=_norm(config)
    )


def _with(layer: ModuleSpec, **changes: object) -> ModuleSpec:
    """A copy of a layer spec with some submodules replaced."""
    return dataclasses.replace(layer, submodules=dataclasses.replace(layer.submodules, **changes))


def _without_attention(submodules: TransformerLayerSubmodules) -> dict[str, str]:
    keys = submodules.sharded_state_dict_keys_map
    return {name: key for name, key in keys.items() if "self_attention" not in key}
