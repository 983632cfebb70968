"""config.json of Qwen3 folders: every form that is read gives transformers' logits, others none."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kit.tiny_qwen3 import (
    TINY_SHAPE,
    edit_config,
    logits_difference,
    write_tiny_qwen3,
)

from megatron_hydra.errors import UserError
from megatron_hydra.teachers import config_json, loading, weights

BASE = 5e5
PLAIN = {"rope_type": "default", "rope_theta": BASE}

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_qwen3(tmp_path / "teacher")


# What transformers 4.57 reads, held to what it makes of the very file.
OF_TRANSFORMERS_4: dict[str, dict[str, Any]] = {
    "base": {"rope_theta": BASE},
    "whole-number": {"rope_theta": 500000},
    "no-base": {"rope_theta": "REMOVE"},
    "scaling-null": {"rope_theta": BASE, "rope_scaling": None},
    "scaling-left-out": {"rope_theta": BASE, "rope_scaling": "REMOVE"},
    "scaling-default": {"rope_theta": BASE, "rope_scaling": {"rope_type": "default"}},
    "scaling-type": {"rope_theta": BASE, "rope_scaling": {"type": "default"}},
    "scaling-both-types": {"rope_scaling": {"type": "default", "rope_type": "default"}},
    "scaling-nulls": {"rope_scaling": {"rope_type": "default", "factor": None}},
    "partial-1": {"rope_theta": BASE, "partial_rotary_factor": 1.0},
    "parameters-beside-equal": {"rope_theta": BASE, "rope_parameters": PLAIN},
    "parameters-without-base": {"rope_theta": BASE, "rope_parameters": {"rope_type": "default"}},
    "parameters-null": {"rope_theta": BASE, "rope_parameters": None},
    "window-unused": {"sliding_window": 4, "max_window_layers": 0},
    "window-false": {"sliding_window": 4, "use_sliding_window": False, "layer_types": None},
    "layer-types-null": {"layer_types": None},
    "layer-types-left-out": {"layer_types": "REMOVE"},
    "no-architectures": {"architectures": "REMOVE"},
    "architectures-null": {"architectures": None},
    "torch-dtype": {"dtype": "REMOVE", "torch_dtype": "bfloat16"},
    "dtype-null": {"dtype": None},
    "bias-null": {"attention_bias": None},
    "swish": {"hidden_act": "swish"},
    "eps": {"rms_norm_eps": 1e-2},
    "eps-left-out": {"rms_norm_eps": "REMOVE"},
    "token-ids": {"eos_token_id": [256, 257], "pad_token_id": 256, "bos_token_id": 1},
    "generation": {"temperature": 0.6, "top_k": 20, "max_length": 50},
}  # fmt: skip


@pytest.mark.parametrize("changes", OF_TRANSFORMERS_4.values(), ids=OF_TRANSFORMERS_4)
def test_forms_of_transformers_4_have_its_logits(folder: Path, changes: dict[str, Any]) -> None:
    edit_config(folder, **changes)
    assert logits_difference(folder) < 1e-4


@pytest.mark.parametrize(
    "fields",
    [
        {"num_key_value_heads": 4, "tie_word_embeddings": False},
        {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
        {"num_hidden_layers": 3, "hidden_size": 24, "rope_theta": 1e6},
        {"head_dim": 128, "num_attention_heads": 2},
    ],
    ids=["mha-untied", "gqa-narrow", "one-group-wide", "three-layers", "head-dim-default"],
)
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": None}, {"head_dim": "REMOVE"}, {"tie_word_embeddings": "REMOVE"}],
    ids=["as-saved", "groups-null", "no-head-dim", "no-tie"],
)
def test_shapes_have_the_logits_of_transformers_or_none(
    tmp_path: Path, fields: dict[str, Any], changes: dict[str, Any]
) -> None:
    """A field that is left out has transformers' default, which the weights then fit or do not."""
    folder = write_tiny_qwen3(tmp_path / "teacher", **fields)
    edit_config(folder, **changes)
    saved = {**TINY_SHAPE, **fields}
    read = {
        "num_key_value_heads": saved["num_attention_heads"],
        "head_dim": 128,
        "tie_word_embeddings": False,
    }
    fits = all(saved[name] == read[name] for name in changes)
    if fits:
        assert logits_difference(folder) < 1e-4
    else:
        with pytest.raises(UserError, match=r"has shape|lacks tensor lm_head.weight"):
            weights.read_weights(folder)


# What transformers 5 alone reads, by hand: `rope_scaling` if it is not empty, else
# `rope_parameters`; in it `rope_theta`, else that of the top level, else 10,000 (seen in 5.24).
# An object for each type of layer is its form for models whose layers differ.
OF_TRANSFORMERS_5: dict[str, tuple[dict[str, Any], float]] = {
    "parameters": ({"rope_parameters": PLAIN}, BASE),
    "type": ({"rope_parameters": {"type": "default", "rope_theta": BASE}}, BASE),
    "no-type": ({"rope_parameters": {"rope_theta": BASE}}, BASE),
    "no-base": ({"rope_parameters": {"rope_type": "default"}}, 1e4),
    "top-null": ({"rope_theta": None, "rope_parameters": PLAIN}, BASE),
    "in-scaling": ({"rope_scaling": PLAIN}, BASE),
    "scaling-empty": ({"rope_scaling": {}, "rope_parameters": PLAIN}, BASE),
    "both-empty": ({"rope_scaling": {}, "rope_parameters": {}, "rope_theta": BASE}, BASE),
    "both-equal": ({"rope_scaling": PLAIN, "rope_parameters": PLAIN}, BASE),
    "partial-1": ({"rope_parameters": {**PLAIN, "partial_rotary_factor": 1.0}}, BASE),
    "nested": ({"rope_parameters": {"full_attention": PLAIN}}, BASE),
    "nested-twice": (
        {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN}}, BASE
    ),
    "nested-top": (
        {"rope_theta": BASE, "rope_parameters": {"full_attention": {"rope_type": "default"}}}, BASE
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "base"), OF_TRANSFORMERS_5.values(), ids=list(OF_TRANSFORMERS_5)
)
def test_forms_of_transformers_5_mean_their_base(
    folder: Path, changes: dict[str, Any], base: float
) -> None:
    oracle = Path(shutil.copytree(folder, folder.with_name("oracle")))
    edit_config(oracle, rope_theta=base)
    edit_config(folder, **{"rope_theta": "REMOVE", "rope_scaling": "REMOVE", **changes})
    assert logits_difference(folder, oracle) < 1e-4
    edit_config(oracle, rope_theta=base * 1.1)
    assert logits_difference(folder, oracle) > 1e-2, "a wrong base would go unseen"


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_scaling": YARN},
            "rope_type 'yarn' in rope_scaling; only plain RoPE, 'default', is",
        ),
        ({"rope_scaling": YARN, "rope_parameters": PLAIN}, "rope_type 'yarn' in rope_scaling"),
        ({"rope_scaling": PLAIN, "rope_parameters": YARN}, "rope_type 'yarn' in rope_parameters"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "type 'linear' in rope_scaling"),
        ({"rope_scaling": {**YARN, "type": "default"}}, "rope_type 'yarn' in rope_scaling"),
        ({"rope_scaling": {"rope_type": "default", "type": "yarn"}}, "type 'yarn' in rope_scaling"),
        *(
            ({"rope_parameters": {"rope_type": kind, "factor": 2.0}}, f"rope_type '{kind}' in rope")
            for kind in ("dynamic", "llama3", "longrope", "mrope", "Default", "")
        ),
        ({"rope_scaling": {"rope_type": None}}, "rope_type None in rope_scaling"),
        ({"rope_scaling": {"factor": 4.0}}, "factor 4.0 in rope_scaling, which plain RoPE has not"),
        (
            {"rope_parameters": {**PLAIN, "mrope_section": [2, 3]}},
            r"mrope_section \[2, 3\] in rope",
        ),
        ({"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5; only 1 is supported"),
        ({"rope_scaling": {"rope_type": "default", "new": 1}}, "new 1 in rope_scaling"),
        ({"rope_parameters": {"full_attention": YARN}}, "'yarn' in rope_parameters.full_attention"),
        ({"rope_parameters": {"full_attention": None}}, "full_attention None in rope_parameters"),
        (
            {"rope_parameters": {"full_attention": PLAIN, "rope_type": "default"}},
            "rope_type beside full_attention in rope_parameters: keep one form",
        ),
        (
            {"rope_parameters": {"full_attention": {"full_attention": PLAIN}}},
            "full_attention {.*} in rope_parameters.full_attention",
        ),
        (
            {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": {"rope_theta": 7}}},
            "500000.0 in rope_parameters.full_attention and 7 in rope_parameters.sliding_attention",
        ),
        (
            {"rope_theta": 1e6, "rope_parameters": PLAIN},
            "500000.0 in rope_parameters and 1000000.0 in the top level: keep the one that the",
        ),
        ({"rope_theta": 1e6, "rope_scaling": PLAIN}, "500000.0 in rope_scaling and 1000000.0 in"),
        (
            {"rope_theta": "REMOVE", "rope_scaling": {"type": "default"}, "rope_parameters": PLAIN},
            "10000.0 in rope_scaling and 500000.0 in rope_parameters",
        ),
        ({"rope_scaling": "yarn"}, "rope_scaling 'yarn'; it must be an object or null"),
        ({"rope_scaling": False}, "rope_scaling False; it must be an object or null"),
        ({"rope_parameters": [1]}, r"rope_parameters \[1\]; it must be an object or null"),
        ({"rope_theta": None}, "rope_theta None; it must be a finite number > 0"),
        ({"rope_theta": "10000"}, "rope_theta '10000'"),
        ({"rope_theta": "REMOVE", "rope_parameters": {"rope_theta": "x"}}, "rope_theta 'x'"),
        ({"rope_theta": "REMOVE", "rope_parameters": {"rope_theta": None}}, "rope_theta None"),
    ],
)
def test_rope_that_is_not_understood_is_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=f"config.json has .*{message}") as raised:
        config_json.read_config(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "other"}, "model_type 'other'; supported: .*qwen3"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "architectures"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True; only False is supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; only 'silu' is supported"),
        ({"hidden_act": None}, "hidden_act None"),
        ({"is_causal": False}, "is_causal False; only True is supported"),
        ({"num_experts": 8}, "num_experts 8"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ({"attention_multiplier": 0.5}, "attention_multiplier 0.5"),
        ({"logits_scaling": 8}, "logits_scaling 8"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights 'other.safetensors'"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"layer_types": 5}, "layer_types 5; it must be a list or null"),
        ({"layer_types": [["full_attention"]]}, "sliding-window"),
        ({"layer_types": ["full_attention"]}, "1 layer_types for num_hidden_layers 2"),
        ({"layer_types": []}, "0 layer_types for num_hidden_layers 2"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rms_norm_eps": True}, "rms_norm_eps True"),
        ({"rms_norm_eps": None}, "rms_norm_eps None"),
        ({"head_dim": None}, "head_dim None; it must be a whole number > 0"),
        ({"head_dim": 15}, "head_dim 15; RoPE needs an even number"),
        ({"max_position_embeddings": None}, "max_position_embeddings None"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings None"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings 'yes'; it must be true or false"),
        ({"hidden_size": "REMOVE"}, "no 'hidden_size'"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers 2.5"),
        ({"num_key_value_heads": 3}, "not divisible by 3"),
        ({"num_key_value_heads": "REMOVE"}, "4 attention heads, which are not divisible by 32"),
    ],
)
def test_unsupported_configs_are_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=f"config.json has .*{message}"):
        config_json.read_config(folder)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"rms_norm_eps": 1e-06', '"rms_norm_eps": NaN', "NaN is no number"),
        ('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e999', "1e999 is too large"),
        ('"rope_theta": 10000.0', '"rope_theta": -Infinity', "-Infinity is no number"),
        ('"rope_theta": 10000.0', '"rope_theta": 1e4, "rope_theta": 1e6', "'rope_theta' stands tw"),
    ],
)
def test_what_json_does_not_know_is_refused(
    folder: Path, before: str, after: str, message: str
) -> None:
    """Python's reader takes NaN, and of two equal keys the last."""
    text = (folder / "config.json").read_text()
    assert text.count(before) == 1
    (folder / "config.json").write_text(text.replace(before, after))
    with pytest.raises(UserError, match=f"cannot read .*config.json: .*{message}"):
        config_json.read_config(folder)


def test_keys_that_are_not_read_are_named_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And none of transformers' own is."""
    from transformers import Qwen3Config

    edit_config(folder, **Qwen3Config(**json.loads((folder / "config.json").read_text())).to_dict())
    with caplog.at_level(logging.WARNING):
        loading.hydra_config(folder)
    assert not caplog.messages
    edit_config(folder, unsloth_fixed=True, auto_map={"AutoModel": "own.Model"}, empty=None)
    with caplog.at_level(logging.WARNING):
        loading.hydra_config(folder)
        loading.hydra_config(folder)
    assert caplog.messages == [
        f"{folder}/config.json has keys that are not read: auto_map, unsloth_fixed"
    ]


def test_left_out_fields_have_the_defaults_of_transformers(folder: Path) -> None:
    from transformers import Qwen3Config

    optional = ("head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings",
                "max_position_embeddings", "num_key_value_heads")  # fmt: skip
    edit_config(folder, num_attention_heads=64, **dict.fromkeys(optional, "REMOVE"))
    found = config_json.read_config(folder)
    expected = Qwen3Config()
    assert {name: found[name] for name in optional} == {
        name: getattr(expected, name) for name in optional
    }


def test_missing_folder_and_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        config_json.read_config(tmp_path / "nothing")
    with pytest.raises(UserError, match="has no config.json"):
        config_json.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        config_json.read_config(tmp_path)


def test_a_folder_is_checked_without_pytorch(folder: Path) -> None:
    """So that a bad one is said before the imports that take seconds."""
    program = (
        "import sys; from megatron_hydra.teachers import config_json, model_folder, tokenizer\n"
        f"folder = {str(folder)!r}\n"
        "assert not model_folder.is_checkpoint_folder(folder)\n"
        "print(config_json.config_hash(folder), model_folder.weights_hash(folder))\n"
        "assert not model_folder.check_model_folder(folder)\n"
        "slow = {'torch', 'megatron', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == config_json.config_hash(folder)
