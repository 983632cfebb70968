"""What a family of teachers is: what its config.json means, and which tensors it has.

Needs the standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_hydra.teachers.weight_names import Weight


@dataclass(frozen=True)
class TeacherFamily:
    """The models of one `model_type`.

    Attributes:
        model_type: As config.json says it.
        architecture: Transformers' class of the causal language model.
        tokenizer_class: What transformers takes for a tokenizer that names no class.
        layer: The tensors of a layer.
        fields: HydraConfig's fields that the family fixes.
        defaults: Transformers' own for what a config.json may leave out. Null for
            `num_key_value_heads` is as many as attention heads, for `head_dim` the hidden size
            divided by those.
        only: Keys that change a model's outputs, and the values that do not; on top of those that
            `config_json` has for all families.
        known: More keys without a say in a model's outputs.
        rope_types: Which types of RoPE are read; `default` is the plain one.
    """

    model_type: str
    architecture: str
    tokenizer_class: str
    layer: tuple[Weight, ...]
    fields: Mapping[str, Any]
    defaults: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    known: tuple[str, ...] = ()
    rope_types: tuple[str, ...] = ("default",)
