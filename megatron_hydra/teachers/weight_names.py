"""The names and shapes of teachers' tensors: transformers' and Megatron's, side by side.

The tensors that are named here every family has, by these names; what one has beside them is in its
file. Needs the standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
