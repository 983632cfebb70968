"""The model that `hydra_tools.certify` certifies, from its YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_hydra.certify.certificate import WELL_CONDITIONED
from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.config import HydraConfig
from megatron_hydra.model.options import HydraFields
from megatron_hydra.schema import read_config
from megatron_hydra.teachers.checkpoint import model_fields, read_metadata
from megatron_hydra.teachers.loading import megatron_fields

_PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(kw_only=True)
class ModelSection(HydraFields):
    """A hybrid's shape and switches, as HydraConfig names them."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    layernorm_epsilon: float = 1e-6
    qk_layernorm: bool = True
    add_qkv_bias: bool = False


@dataclass
class CertifyConfig:
    """Either a hybrid checkpoint's folder, or a model and its heads; weights are random."""

    checkpoint: str | None = None
    model: ModelSection | None = None
    plan: str | None = None
    """A head plan's file."""
    fa_heads_per_layer: int | None = None
    """Instead of a plan: so many FA heads, spread over each layer's and shifted by layer."""


def certified_model(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    num_layers: int | None = None,
    precision: str | None = None,
    backend: str | None = None,
) -> tuple[dict[str, Any], HeadPlan]:
    """Read the file.

    Args:
        path: YAML, see :class:`CertifyConfig`.
        overrides: `section.key=value`.
        num_layers: Keep only the first so many.
        precision: `float32` or `bf16`; None takes bf16 on a GPU, else float32.
        backend: None takes the file's, and for a checkpoint the one that the machine is for.

    Returns:
        HydraConfig's fields with what :data:`WELL_CONDITIONED` changes, and the plan.

    Raises:
        UserError: If a key or value is not allowed, or model and plan disagree.
    """
    config = read_config(CertifyConfig, path, overrides)
    _check_choice(path, config)
    on_gpu = torch.cuda.is_available()
    dtype = _PRECISIONS[precision or ("bf16" if on_gpu else "float32")]
    if config.checkpoint is not None:
        fields, plan = _from_checkpoint(Path(config.checkpoint), dtype)
        fields["backend"] = "transformer_engine" if on_gpu else "local"
    else:
        fields, plan = {**megatron_fields(dtype), **asdict(config.model)}, _plan(config)  # type: ignore[call-overload]
    if backend is not None:
        fields["backend"] = backend
    shape = ("num_layers", "num_attention_heads", "num_query_groups")
    plan.check_teacher(*(fields[name] for name in shape), "")
    if num_layers is not None:
        if num_layers > plan.num_layers:
            raise UserError(f"--layers is {num_layers}, but the model has {plan.num_layers}")
        fields["num_layers"] = num_layers
        plan = HeadPlan(plan.layers[:num_layers], plan.num_query_groups)
    fields.update(WELL_CONDITIONED)
    HydraConfig(**fields)  # says what is wrong with a value, before any rank waits for another
    return fields, plan


def _check_choice(path: str | Path, config: CertifyConfig) -> None:
    heads = (config.plan, config.fa_heads_per_layer)
    if (config.checkpoint is None) == (config.model is None):
        raise UserError(f"{path} must have either checkpoint (a folder) or a section model")
    if config.checkpoint is not None and heads != (None, None):
        raise UserError(f"{path} has a checkpoint, which has its own plan: name no other")
    if config.model is not None and heads.count(None) != 1:
        raise UserError(f"{path} must have either plan (a file) or fa_heads_per_layer")


def _from_checkpoint(folder: Path, dtype: torch.dtype) -> tuple[dict[str, Any], HeadPlan]:
    meta = read_metadata(folder)
    if meta["kind"] != "hybrid":
        raise UserError(f"{folder} is a teacher's checkpoint; a hybrid's is needed")
    return model_fields(meta, dtype), HeadPlan.load(folder / "plan.json")


def _plan(config: CertifyConfig) -> HeadPlan:
    if config.plan is not None:
        return HeadPlan.load(config.plan)
    assert config.model is not None and config.fa_heads_per_layer is not None
    model, number = config.model, config.fa_heads_per_layer
    heads = model.num_attention_heads
    if not 0 <= number <= heads:
        raise UserError(f"fa_heads_per_layer is {number}; allowed: 0 to {heads}")
    fa_heads = {
        layer: sorted((layer + step * heads // number) % heads for step in range(number))
        for layer in range(model.num_layers)
    }
    return HeadPlan.from_fa_heads(fa_heads, model.num_layers, heads, model.num_query_groups)
