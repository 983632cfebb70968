"""The config.json of a Hugging Face folder, read as transformers reads it, or refused.

A form that is not understood is never taken for the default. Needs the standard library alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hydra.errors import UserError
from megatron_hydra.files import parse_json
from megatron_hydra.teachers.base import TeacherFamily
from megatron_hydra.teachers.families import FAMILIES
from megatron_hydra.teachers.rope_json import PLAIN_ROPE, read_rope

if TYPE_CHECKING:
    from megatron_hydra.model.config import HydraConfig

logger = logging.getLogger(__name__)

# Transformers' field (after read_config) -> HydraConfig's.
FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "vocab_size": "vocab_size",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
    "rms_norm_eps": "layernorm_epsilon",
    "rope_theta": "rotary_base",
}
LATER_FIELDS: dict[str, Any] = {"qk_layernorm": True, "add_qkv_bias": False, **PLAIN_ROPE}
"""More of HydraConfig's fields, which earlier releases' files lack, and what they meant by it."""
SHAPE_FIELDS: tuple[str, ...] = (*FIELDS.values(), *LATER_FIELDS)
"""The HydraConfig fields that a teacher decides; they make its hash and cannot be overridden."""
_FLOATS = (
    "layernorm_epsilon", "rotary_base",
    "rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor",
)  # fmt: skip
_BESIDE_SHAPE = ("max_position_embeddings", "model_type", "rope_scaling")

_REQUIRED = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size",
)  # fmt: skip
# What changes a model's outputs, and the values that do not. The lower rows are the words of other
# architectures, which transformers would not hear of in these families.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None, {}),
    "pruned_heads": (None, {}),
    "transformers_weights": (None,),
    "compression_config": (None, {}),
    "mlp_bias": (False, None),
    "is_causal": (True, None),
    "use_bidirectional_attention": (False, None),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "logits_soft_cap": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "logits_scaling": (1, None),
    "query_pre_attn_scalar": (None,),
    "rope_interleaved": (False, None),
    "no_rope_layers": (None, []),
}
# Read here by other means, or without a say in a model's outputs.
_KNOWN = {
    *FIELDS, *_ONLY, "model_type", "architectures", "max_position_embeddings",
    "rope_scaling", "rope_parameters", "original_max_position_embeddings",
    "layer_types", "use_sliding_window",
    "sliding_window", "max_window_layers",  # without use_sliding_window they say nothing
    "initializer_range", "attention_dropout", "use_cache", "dtype", "torch_dtype", "use_bfloat16",
    "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "tokenizer_class",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
    "experts_implementation", "_experts_implementation", "gradient_checkpointing",
    "return_dict", "output_hidden_states", "output_attentions", "torchscript", "tf_legacy_loss",
    "chunk_size_feed_forward", "is_decoder", "is_encoder_decoder", "add_cross_attention",
    "cross_attention_hidden_size", "tie_encoder_decoder", "prefix", "finetuning_task",
    "problem_type", "task_specific_params", "id2label", "label2id", "num_labels",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
    # What earlier releases kept here of text generation.
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "temperature", "top_k",
    "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "num_beam_groups", "diversity_penalty",
}  # fmt: skip


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check ``config.json``; return its shape-giving fields by transformers' names.

    ``rope_theta`` is at the top level whichever transformers release wrote the file, and what the
    file leaves out has transformers' default. Keys that are unknown and not null are named in a
    warning.

    Args:
        folder: A Hugging Face folder, or the file itself under any name.

    Returns:
        With ``model_type``, ``max_position_embeddings`` and, in HydraConfig's names, what
        ``rope_scaling`` holds beside ``rope_theta``.

    Raises:
        UserError: If the folder is missing, is of no known family, or uses what is not supported.
    """
    path = Path(folder)
    if not path.is_file():
        path /= "config.json"
    raw = read_keys(path)
    name = raw.get("model_type")
    if name not in tuple(FAMILIES):
        raise UserError(f"{path} has model_type {name!r}; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    _refuse_unsupported(path, raw, family)
    config = {**family.defaults, **raw}
    _fill_in(config, family)
    config["rope_theta"], config["rope_scaling"] = read_rope(path, raw, family)
    _check_values(path, config)
    _check_layer_types(path, config)
    known = {*_KNOWN, *family.only, *family.known}
    unknown = sorted(key for key in raw if key not in known and raw[key] is not None)
    if unknown:
        _warn_once(f"{path} has keys that are not read: {', '.join(unknown)}")
    return {name: config[name] for name in (*FIELDS, *_BESIDE_SHAPE)}


def shape_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`read_config` returned as the fields of HydraConfig that a teacher decides."""
    family = FAMILIES[config["model_type"]]
    named = {field: config[name] for name, field in FIELDS.items()}
    return {**named, **family.fields, **config["rope_scaling"]}


def config_hash(folder: str | os.PathLike[str]) -> str:
    """SHA-256 of the folder's shape-giving fields; see :func:`teacher_hash`."""
    return _hash(shape_fields(read_config(folder)))


def teacher_hash(config: HydraConfig) -> str:
    """SHA-256 (hex) of :data:`SHAPE_FIELDS`, by which a head plan knows its teacher.

    It tells models of another shape apart, not two trainings of one shape.
    """
    return _hash({field: getattr(config, field) for field in SHAPE_FIELDS})


def _hash(values: Mapping[str, Any]) -> str:
    """A later field is part of it where it says something that the first version could not say."""
    canonical = {
        name: float(value) if name in _FLOATS else value
        for name, value in values.items()
        if name not in LATER_FIELDS or value != LATER_FIELDS[name]
    }
    return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()


def read_keys(path: Path) -> dict[str, Any]:
    """What stands in a config.json, of whatever model it is.

    Raises:
        UserError: If there is none, or it is no JSON object.
    """
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist")
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is not a Hugging Face model: it has no config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"cannot read {path}: it holds no object")
    return found


@functools.cache
def _warn_once(message: str) -> None:
    """A file is read several times in one command."""
    logger.warning(message)


def _refuse_unsupported(path: Path, raw: Mapping[str, Any], family: TeacherFamily) -> None:
    wanted = family.architecture
    architectures = raw.get("architectures") or [wanted]
    if architectures != [wanted]:
        raise UserError(f"{path} has architectures {architectures}; allowed: {wanted}")
    for name, kind in (("rope_parameters", dict), ("rope_scaling", dict), ("layer_types", list)):
        if raw.get(name) is not None and not isinstance(raw[name], kind):
            word = "an object" if kind is dict else "a list"
            raise UserError(f"{path} has {name} {raw[name]!r}; it must be {word} or null")
    sliding = any(kind != "full_attention" for kind in raw.get("layer_types") or ())
    if sliding or raw.get("use_sliding_window"):
        raise UserError(f"{path} has sliding-window layers; only full attention is supported")
    if raw.get("quantization_config"):
        raise UserError(f"{path} has a quantization_config; quantised weights are not supported")
    for name, allowed in {**_ONLY, **family.only}.items():
        if raw.get(name, allowed[0]) not in allowed:
            raise UserError(f"{path} has {name} {raw[name]!r}; only {allowed[0]!r} is supported")


def _fill_in(config: dict[str, Any], family: TeacherFamily) -> None:
    """Give the nulls that transformers gives a meaning their value."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = heads
    is_derived = config["head_dim"] is None and family.defaults["head_dim"] is None
    if is_derived and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        config["head_dim"] = hidden // heads


def _check_values(path: Path, config: Mapping[str, Any]) -> None:
    for name in _REQUIRED:
        if name not in config:
            raise UserError(f"{path} has no {name!r}")
    for name in (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"):
        if not isinstance(config[name], int) or isinstance(config[name], bool) or config[name] < 1:
            raise UserError(f"{path} has {name} {config[name]!r}; it must be a whole number > 0")
    for name in ("rms_norm_eps", "rope_theta"):
        value = config[name]
        if type(value) not in (int, float) or not 0 < value < math.inf:  # NaN is neither
            raise UserError(f"{path} has {name} {value!r}; it must be a finite number > 0")
    if not isinstance(config["tie_word_embeddings"], bool):
        tied = config["tie_word_embeddings"]
        raise UserError(f"{path} has tie_word_embeddings {tied!r}; it must be true or false")
    if config["head_dim"] % 2:
        raise UserError(f"{path} has head_dim {config['head_dim']}; RoPE needs an even number")
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % groups:
        raise UserError(
            f"{path} has {heads} attention heads, which are not divisible by {groups} groups"
        )


def _check_layer_types(path: Path, config: Mapping[str, Any]) -> None:
    layers, types = config["num_hidden_layers"], config.get("layer_types")
    if types is not None and len(types) != layers:
        raise UserError(f"{path} has {len(types)} layer_types for num_hidden_layers {layers}")
