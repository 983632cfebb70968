"""Hugging Face Qwen3 folders: checks, configuration, weights and tokenizer, as Megatron's model."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_hydra.config import HydraConfig
from megatron_hydra.errors import UserError
from megatron_hydra.model import build_model

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from transformers import PreTrainedTokenizerBase

# Qwen3's field (after read_qwen3_config) -> HydraConfig's.
_FIELDS = {
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
SHAPE_FIELDS: tuple[str, ...] = tuple(_FIELDS.values())
"""The HydraConfig fields that a teacher decides; they make its hash and cannot be overridden."""

_REQUIRED = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size",
)  # fmt: skip
# transformers' own defaults for what a config.json may leave out.
_DEFAULTS = {
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
}
# Transformer Engine keeps a norm's weight in the linear that follows it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def read_qwen3_config(folder: str | Path) -> dict[str, Any]:
    """Read and check ``config.json``; return its shape-giving fields by transformers' names.

    ``rope_theta`` is at the top level whichever transformers release wrote the file, and what the
    file leaves out has transformers' default.

    Raises:
        UserError: If the folder is missing, is not Qwen3, or uses what is not supported.
    """
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise UserError(f"model folder {folder} does not exist")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is not a Hugging Face model: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(raw, dict) or raw.get("model_type") != "qwen3":
        found = raw.get("model_type") if isinstance(raw, dict) else None
        raise UserError(f"{path} has model_type {found!r}; only 'qwen3' is supported")
    _refuse_unsupported(path, raw)
    given = {name: value for name, value in raw.items() if value is not None}
    config = {**_DEFAULTS, "num_key_value_heads": raw.get("num_attention_heads"), **given}
    rope = raw.get("rope_parameters") or {}  # an object, as _refuse_unsupported has seen
    config["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    _check_values(path, config)
    return {name: config[name] for name in (*_FIELDS, "max_position_embeddings")}


def _refuse_unsupported(path: Path, raw: Mapping[str, Any]) -> None:
    architectures = raw.get("architectures") or ["Qwen3ForCausalLM"]
    if architectures != ["Qwen3ForCausalLM"]:
        raise UserError(f"{path} has architectures {architectures}; allowed: Qwen3ForCausalLM")
    for name, kind in (("rope_parameters", dict), ("rope_scaling", dict), ("layer_types", list)):
        if not isinstance(raw.get(name) or kind(), kind):
            word = "an object" if kind is dict else "a list"
            raise UserError(f"{path} has {name} {raw[name]!r}; it must be {word} or null")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise UserError(f"{path} has rope_scaling {rope_type!r}; only plain RoPE is supported")
    sliding = any(kind != "full_attention" for kind in raw.get("layer_types") or ())
    if sliding or raw.get("use_sliding_window"):
        raise UserError(f"{path} has sliding-window layers; only full attention is supported")
    for name, allowed in (("hidden_act", "silu"), ("attention_bias", False)):
        if raw.get(name, allowed) != allowed:
            raise UserError(f"{path} has {name} {raw[name]!r}; only {allowed!r} is supported")
    if raw.get("quantization_config"):
        raise UserError(f"{path} has a quantization_config; quantised weights are not supported")


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
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % groups:
        raise UserError(f"{path} has {heads} attention heads, not a multiple of {groups} groups")


def config_hash(folder: str | Path) -> str:
    """SHA-256 of the folder's shape-giving fields; see :func:`teacher_hash`."""
    config = read_qwen3_config(folder)
    return _hash({field: config[name] for name, field in _FIELDS.items()})


def teacher_hash(config: HydraConfig) -> str:
    """SHA-256 (hex) of :data:`SHAPE_FIELDS`, by which a head plan knows its teacher.

    It tells models of another shape apart, not two trainings of one shape.
    """
    return _hash({field: getattr(config, field) for field in SHAPE_FIELDS})


def _hash(values: Mapping[str, Any]) -> str:
    canonical = {
        name: float(value) if name in ("layernorm_epsilon", "rotary_base") else value
        for name, value in values.items()
    }
    return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()


def megatron_fields(params_dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The TransformerConfig fields that every Qwen3 has in common, for any size.

    Fusions that need apex or CUDA are off, so that one configuration runs everywhere.
    """
    return {
        "normalization": "RMSNorm",
        "qk_layernorm": True,
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
        UserError: As :func:`read_qwen3_config`, and for an unknown or forbidden override.
    """
    check_overrides(overrides)
    values = read_qwen3_config(folder)
    shape = {field: values[name] for name, field in _FIELDS.items()}
    common = megatron_fields(overrides.get("params_dtype", torch.float32))
    seq_length = values["max_position_embeddings"]
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


def expected_shapes(config: HydraConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Qwen3 model in transformers' names, with its shape."""
    hidden, ffn, dim = config.hidden_size, config.ffn_hidden_size, config.kv_channels
    query, kv = config.num_attention_heads * dim, config.num_query_groups * dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (query, hidden),
            prefix + "self_attn.k_proj.weight": (kv, hidden),
            prefix + "self_attn.v_proj.weight": (kv, hidden),
            prefix + "self_attn.q_norm.weight": (dim,),
            prefix + "self_attn.k_norm.weight": (dim,),
            prefix + "self_attn.o_proj.weight": (hidden, query),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (ffn, hidden),
            prefix + "mlp.up_proj.weight": (ffn, hidden),
            prefix + "mlp.down_proj.weight": (hidden, ffn),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config.share_embeddings_and_output_weights:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Read every tensor of the model, in transformers' names and the file's own dtype, on the CPU.

    Names, shapes and dtypes of all files are checked before any tensor is read. Tied models may
    carry a copy of the embedding as ``lm_head.weight``; it is left out, as in transformers.

    Raises:
        UserError: For a file that is missing, truncated or not safetensors, a tensor that is
            missing, unknown or of another shape, and a dtype other than float32, bfloat16, float16.
    """
    config = hydra_config(folder)
    expected = expected_shapes(config)
    found: dict[str, Path] = {}
    for path in _weight_files(Path(folder)):
        for name in _check_file(path, expected, config.share_embeddings_and_output_weights):
            if name in found:
                raise UserError(f"tensor {name} is in both {found[name]} and {path}")
            found[name] = path
    missing = [name for name in expected if name not in found]
    if missing:
        raise UserError(f"{folder} lacks tensor {missing[0]} ({len(missing)} missing in all)")
    tensors: dict[str, Tensor] = {}
    for path in dict.fromkeys(found.values()):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in found if found[name] == path}
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in dict.fromkeys(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read the weight map of {index}: {error}") from error


def _check_file(path: Path, expected: Mapping[str, tuple[int, ...]], tied: bool) -> list[str]:
    """Check one file's header; return the names of the tensors that are wanted from it."""
    if not path.is_file():
        raise UserError(f"weight file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            headers = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error})") from error
    if tied:
        headers.pop("lm_head.weight", None)
    for name, (dtype, shape) in headers.items():
        if name not in expected:
            raise UserError(f"{path} has tensor {name}, which the Qwen3 of config.json has not")
        if shape != expected[name]:
            raise UserError(
                f"tensor {name} in {path} has shape {shape}; config.json asks for {expected[name]}"
            )
        if dtype not in _DTYPES:
            raise UserError(
                f"tensor {name} in {path} has dtype {dtype}; allowed: {', '.join(_DTYPES)}"
            )
    return list(headers)


def megatron_tensors(config: HydraConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and lay out the teacher's tensors as Megatron's GPTModel at TP=1 names them.

    ``linear_qkv`` holds, query group by query group, the group's query heads, its key and its
    value; ``linear_fc1`` holds the gate above the up projection.

    Args:
        config: Of the teacher.
        tensors: As :func:`read_weights` returns them; all are used.
    """
    rest = dict(tensors)
    result = {
        "embedding.word_embeddings.weight": rest.pop("model.embed_tokens.weight"),
        "decoder.final_layernorm.weight": rest.pop("model.norm.weight"),
    }
    if not config.share_embeddings_and_output_weights:
        result["output_layer.weight"] = rest.pop("lm_head.weight")
    groups, hidden = config.num_query_groups, config.hidden_size
    for layer in range(config.num_layers):
        source, target = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        take = {name: rest.pop(name) for name in list(rest) if name.startswith(source)}
        take = {name.removeprefix(source).removesuffix(".weight"): t for name, t in take.items()}
        qkv = [take[f"self_attn.{part}_proj"].view(groups, -1, hidden) for part in "qkv"]
        result |= {
            target + "input_layernorm.weight": take["input_layernorm"],
            target + "self_attention.linear_qkv.weight": torch.cat(qkv, dim=1).view(-1, hidden),
            target + "self_attention.q_layernorm.weight": take["self_attn.q_norm"],
            target + "self_attention.k_layernorm.weight": take["self_attn.k_norm"],
            target + "self_attention.linear_proj.weight": take["self_attn.o_proj"],
            target + "pre_mlp_layernorm.weight": take["post_attention_layernorm"],
            target + "mlp.linear_fc1.weight": torch.cat(
                [take["mlp.gate_proj"], take["mlp.up_proj"]]
            ),
            target + "mlp.linear_fc2.weight": take["mlp.down_proj"],
        }
    assert not rest, f"tensors left over: {sorted(rest)}"
    return result


@torch.no_grad()
def load_weights_into(model: GPTModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy a teacher's tensors (transformers' names) into Megatron's own model of it, at TP=1.

    Every parameter is written and every tensor used, else an assertion fails.
    """
    source = megatron_tensors(model.config, tensors)
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
    tensors = read_weights(folder)
    model = build_model(config, None)
    load_weights_into(model, tensors)
    return model


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face folder or of a checkpoint's ``tokenizer`` folder.

    Raises:
        UserError: If transformers cannot read it.
    """
    from transformers import AutoTokenizer

    nested = Path(folder) / "tokenizer"
    source = nested if nested.is_dir() else Path(folder)
    try:
        # Whole texts are tokenised and cut afterwards: the tokenizer's own limit does not apply.
        limits = {"model_max_length": sys.maxsize}
        return AutoTokenizer.from_pretrained(source, local_files_only=True, **limits)
    except Exception as error:  # transformers raises whatever its tokenizer class meets
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"cannot load a tokenizer from {source}: {first_line}") from error
