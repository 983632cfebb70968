"""A Hugging Face folder as Megatron's model: its configuration, and the teacher of it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hydra.errors import UserError
from megatron_hydra.model.build import build_model
from megatron_hydra.model.config import HydraConfig
from megatron_hydra.teachers.config_json import SHAPE_FIELDS, read_config, shape_fields
from megatron_hydra.teachers.conversion import megatron_tensors
from megatron_hydra.teachers.weights import read_weights

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

# Transformer Engine keeps a norm's weight in the linear that follows it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def megatron_fields(params_dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The TransformerConfig fields that teachers have in common, for any size.

    Fusions that need apex or CUDA are off, so that one configuration runs everywhere.
    """
    return {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": params_dtype,
        "pipeline_dtype": params_dtype,
        "bf16": params_dtype == torch.bfloat16,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "hetereogenous_dist_checkpoint": True,
        "persist_layer_norm": False,
        "batch_p2p_comm": False,
        "barrier_with_L1_time": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
    }


def hydra_config(folder: str | Path, **overrides: Any) -> HydraConfig:
    """The configuration of the folder's model, with ``overrides`` of HydraConfig's fields.

    ``seq_length`` is ``max_position_embeddings`` unless overridden.

    Raises:
        UserError: As :func:`read_config`, and for an unknown or forbidden override.
    """
    check_overrides(overrides)
    values = read_config(folder)
    common = megatron_fields(overrides.get("params_dtype", torch.float32))
    seq_length = values["max_position_embeddings"]
    shape = shape_fields(values)
    return HydraConfig(**{**common, "seq_length": seq_length, **shape, **overrides})


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Check that every name is a HydraConfig field that the teacher leaves open, of its type.

    Raises:
        UserError: For an unknown field (naming the nearest known one), one that the teacher's
            shape decides, or a value of another type than the field's default.
    """
    defaults = {field.name: field.default for field in dataclass_fields(HydraConfig) if field.init}
    for name, value in overrides.items():
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"unknown model option {name}{hint}")
        if name in SHAPE_FIELDS:
            raise UserError(f"{name} is given by the teacher and cannot be overridden")
        wanted = type(defaults[name])
        allowed = (int, float) if wanted is float else (wanted,)
        if wanted in (bool, int, float, str) and type(value) not in allowed:
            raise UserError(f"{name} is {value!r}; it must be a {wanted.__name__}")


@torch.no_grad()
def load_weights_into(model: GPTModel, tensors: Mapping[str, Tensor], ends: bool = True) -> None:
    """Copy a teacher's tensors (transformers' names) into Megatron's own model of it, at TP=1.

    Every parameter is written and every tensor used, else an assertion fails. Without its ends the
    model is layers alone.
    """
    source = megatron_tensors(model.config, tensors, ends)
    for name, parameter in model.named_parameters():
        for fused, norm in _FUSED_NORMS.items():
            name = name.replace(fused, norm)
        tensor = source.pop(name)
        assert tensor.shape == parameter.shape, (name, tensor.shape, parameter.shape)
        parameter.copy_(tensor)
    assert not source, f"the model has no parameter for {sorted(source)}"


def load_teacher(folder: str | Path, **overrides: Any) -> GPTModel:
    """Build the folder's model from Megatron's own layers, with its weights, on one rank.

    Raises:
        UserError: As :func:`hydra_config` and :func:`read_weights`.
    """
    config = hydra_config(folder, **overrides)
    return build_teacher(config, read_weights(folder))


def build_teacher(config: HydraConfig, tensors: Mapping[str, Tensor]) -> GPTModel:
    """The same from weights that are read already."""
    model = build_model(config, None)
    load_weights_into(model, tensors)
    return model
