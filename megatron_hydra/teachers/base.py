"""What a family of teachers is: what its config.json means, and the names of its tensors.

The tensors that are named here every family has, by these names; what one has beside them is in its
file. Needs the standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[str, ...]
"""Of a tensor, by words: `vocabulary`, `hidden`, `ffn`, `head` (the dimension of one), `queries`
(of all heads together) and `keys` (of all query groups)."""


@dataclass(frozen=True)
class Weight:
    """One parameter of Megatron's GPTModel at TP=1 and the tensors of Hugging Face's in it.

    Attributes:
        megatron: Megatron's name; of a layer's, what follows `decoder.layers.N.`.
        hugging_face: Transformers' names with their shapes; of a layer's, what follows
            `model.layers.N.`. Several lie one above the other along dimension 0.
        by_group: Several lie so within each query group: its query heads, its key, its value.
    """

    megatron: str
    hugging_face: Mapping[str, Shape]
    by_group: bool = False

    def of_layer(self, layer: int) -> Weight:
        """With the whole names of one layer's tensors, numbered from 0."""
        source, target = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        names = {source + name: shape for name, shape in self.hugging_face.items()}
        return Weight(target + self.megatron, names, self.by_group)


EMBEDDING = Weight(
    "embedding.word_embeddings.weight", {"model.embed_tokens.weight": ("vocabulary", "hidden")}
)
FINAL_NORM = Weight("decoder.final_layernorm.weight", {"model.norm.weight": ("hidden",)})
OUTPUT_LAYER = Weight("output_layer.weight", {"lm_head.weight": ("vocabulary", "hidden")})
"""Where it is not tied to the embedding."""
LAYER = (
    Weight("input_layernorm.weight", {"input_layernorm.weight": ("hidden",)}),
    Weight(
        "self_attention.linear_qkv.weight",
        {
            "self_attn.q_proj.weight": ("queries", "hidden"),
            "self_attn.k_proj.weight": ("keys", "hidden"),
            "self_attn.v_proj.weight": ("keys", "hidden"),
        },
        by_group=True,
    ),
    Weight("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": ("hidden", "queries")}),
    Weight("pre_mlp_layernorm.weight", {"post_attention_layernorm.weight": ("hidden",)}),
    Weight(
        "mlp.linear_fc1.weight",
        {"mlp.gate_proj.weight": ("ffn", "hidden"), "mlp.up_proj.weight": ("ffn", "hidden")},
    ),
    Weight("mlp.linear_fc2.weight", {"mlp.down_proj.weight": ("hidden", "ffn")}),
)
"""Of a layer of every family."""


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
