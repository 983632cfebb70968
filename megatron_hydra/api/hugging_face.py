"""What a Hugging Face folder's config.json says of its model, without loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_hydra.errors import UserError
from megatron_hydra.files import parse_json
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.cost import ModelShape
from megatron_hydra.teachers.config_json import read_config, shape_fields
from megatron_hydra.teachers.families import FAMILIES


def folder_config(folder: Path) -> dict[str, Any]:
    """The keys of config.json; UserError if it cannot be read."""
    path = folder / "config.json"
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"cannot read {path}: it holds no object")
    return found


def built_for(folder: Path) -> int | None:
    """Tokens that the model is built for; None where its configuration does not say."""
    config = folder_config(folder)
    if config.get("model_type") == "hydra_head":
        from megatron_hydra.export.configuration_hydra import HydraHeadConfig

        return int(HydraHeadConfig.from_pretrained(folder).max_position_embeddings)
    found = config.get("max_position_embeddings")
    return found if isinstance(found, int) else None


def folder_shape(folder: Path) -> tuple[ModelShape | None, HeadPlan | None]:
    """What costs are counted from, and a hybrid's plan; None where it is of no kind known here."""
    model_type = folder_config(folder).get("model_type")
    if model_type == "hydra_head":
        return _hybrid_shape(folder)
    if model_type not in FAMILIES:
        return None, None
    # A teacher's costs are those of its shape, and what a hybrid of it would be has no part in it.
    return ModelShape.from_fields(shape_fields(read_config(folder))), None


def _hybrid_shape(folder: Path) -> tuple[ModelShape, HeadPlan]:
    from megatron_hydra.export.configuration_hydra import HydraHeadConfig

    config = HydraHeadConfig.from_pretrained(folder)
    layers = range(config.num_hidden_layers)
    shape = ModelShape(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        tied_embeddings=config.tie_word_embeddings,
        conv_kernel_size=config.la_conv_kernel_size if config.la_short_conv else 0,
        sliding_window_tokens=config.sliding_window_tokens,
    )
    others: dict[int, dict[Any, list[int]]] = {
        n: {
            kind: heads for kind in ("kda", "sliding_window") if (heads := config.heads_of(n, kind))
        }
        for n in layers
    }
    plan = HeadPlan.from_fa_heads(
        {n: config.heads_of(n, "fa") for n in layers},
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        other_kinds=others,
    )
    return shape, plan
