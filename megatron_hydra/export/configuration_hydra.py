"""The configuration of a head-level hybrid as a Hugging Face model.

Copied into every exported folder: imports transformers alone.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

KINDS = ("fa", "gated_delta_net", "kda", "sliding_window")
"""Kinds of heads, in the order in which a layer runs them."""
_CHOICES = {
    "fa_query_scale": ("none", "inference", "always"),
    "la_output_gate": ("silu", "sigmoid", "none"),
    "fusion": ("scale", "norm", "none", "gate"),
}


class HydraHeadConfig(PretrainedConfig):
    """What a layer's heads are, the teacher's sizes, and the hybrid's switches.

    Args:
        vocab_size: Tokens of the vocabulary.
        hidden_size: Width of the model.
        intermediate_size: Width of the gated MLP.
        num_hidden_layers: Layers.
        num_attention_heads: Query heads per layer, of all kinds.
        num_key_value_heads: Query groups per layer.
        head_dim: Width of one head.
        head_kinds: For each layer the kind of each head, one of `KINDS`; None makes all `fa`.
        max_position_embeddings: Longest sequence that the model was built for, in tokens.
        rms_norm_eps: Of all norms.
        rope_theta: Base of RoPE.
        rope_scaling_factor: 1 is plain RoPE; above it Llama 3.1's scaling with this factor.
        rope_low_freq_factor: Frequencies that turn less often within the original length are
            divided by the factor.
        rope_high_freq_factor: Frequencies that turn more often stay.
        rope_original_length: That length, in tokens.
        qk_norm: Whether the teacher has norms of each head's query and key.
        qkv_bias: Whether projections into the heads have biases.
        fa_rope: RoPE in full attention.
        fa_query_scale: When its queries are scaled by log_a(max(t - start, 0) + a) at position t:
            `none`, `inference` (in eval mode) or `always`.
        fa_query_scale_base: a.
        fa_query_scale_start: start, in tokens.
        fa_output_gate: Twice a sigmoid on the outputs of full attention and sliding windows.
        la_short_conv: A causal convolution with SiLU on recurrent heads' query, key and value.
        la_conv_kernel_size: Its taps.
        la_decay: Whether recurrent states decay.
        la_beta: A write strength per token, else 1.
        la_output_gate: `silu`, `sigmoid` (twice it) or `none`.
        la_rope: RoPE on recurrent heads' query and key.
        la_qk_norm: The teacher's norms on these, where it has them.
        sliding_window_tokens: What a window head sees, its own token counted in.
        sliding_window_sink: A logit per head in its softmax's sum.
        fusion: `scale` (norm and scale per head), `norm`, `none` or `gate` (and a softmax over full
            attention and the others).
        initializer_range: Standard deviation of new weights.
        use_cache: Return a cache.
        tie_word_embeddings: Whether the output layer is the embedding. Releases before 5 leave a
            true one out of config.json, so that this default must stay.
        **kwargs: Of transformers' base class.

    Raises:
        ValueError: For heads that do not fit, a kind or a choice that is unknown.
    """

    model_type = "hydra_head"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 2048,
        intermediate_size: int = 6144,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 8,
        head_dim: int = 128,
        head_kinds: list[list[str]] | None = None,
        max_position_embeddings: int = 32768,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        rope_scaling_factor: float = 1.0,
        rope_low_freq_factor: float = 1.0,
        rope_high_freq_factor: float = 4.0,
        rope_original_length: int = 8192,
        qk_norm: bool = True,
        qkv_bias: bool = False,
        fa_rope: bool = False,
        fa_query_scale: str = "inference",
        fa_query_scale_base: float = 500.0,
        fa_query_scale_start: int = 0,
        fa_output_gate: bool = True,
        la_short_conv: bool = True,
        la_conv_kernel_size: int = 4,
        la_decay: bool = True,
        la_beta: bool = True,
        la_output_gate: str = "silu",
        la_rope: bool = True,
        la_qk_norm: bool = True,
        sliding_window_tokens: int = 512,
        sliding_window_sink: bool = True,
        fusion: str = "scale",
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        if head_kinds is None:
            head_kinds = [["fa"] * num_attention_heads for _ in range(num_hidden_layers)]
        self.head_kinds = [list(kinds) for kinds in head_kinds]
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.rope_scaling_factor = rope_scaling_factor
        self.rope_low_freq_factor = rope_low_freq_factor
        self.rope_high_freq_factor = rope_high_freq_factor
        self.rope_original_length = rope_original_length
        self.qk_norm = qk_norm
        self.qkv_bias = qkv_bias
        self.fa_rope = fa_rope
        self.fa_query_scale = fa_query_scale
        self.fa_query_scale_base = fa_query_scale_base
        self.fa_query_scale_start = fa_query_scale_start
        self.fa_output_gate = fa_output_gate
        self.la_short_conv = la_short_conv
        self.la_conv_kernel_size = la_conv_kernel_size
        self.la_decay = la_decay
        self.la_beta = la_beta
        self.la_output_gate = la_output_gate
        self.la_rope = la_rope
        self.la_qk_norm = la_qk_norm
        self.sliding_window_tokens = sliding_window_tokens
        self.sliding_window_sink = sliding_window_sink
        self.fusion = fusion
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self._check()
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def heads_of(self, layer: int, kind: str) -> list[int]:
        """The heads of a kind in a layer, ascending; both count from 0."""
        return [head for head, name in enumerate(self.head_kinds[layer]) if name == kind]

    def stored_groups(self, layer: int) -> list[int]:
        """The layer's query groups whose keys and values some FA head uses, ascending."""
        per_group = self.num_attention_heads // self.num_key_value_heads
        return sorted({head // per_group for head in self.heads_of(layer, "fa")})

    @property
    def cache_sizes(self) -> tuple[Any, ...]:
        """What decides the shapes of a cache: one made for other sizes is another model's."""
        kernel_size = self.la_conv_kernel_size if self.la_short_conv else 0
        kinds = tuple(map(tuple, self.head_kinds))
        sizes = (self.num_key_value_heads, self.head_dim, self.sliding_window_tokens)
        return (kinds, *sizes, kernel_size)

    def _check(self) -> None:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ValueError(f"{heads} attention heads are not a multiple of {groups} query groups")
        if len(self.head_kinds) != self.num_hidden_layers:
            raise ValueError(
                f"head_kinds has {len(self.head_kinds)} layers, the model {self.num_hidden_layers}"
            )
        for layer, kinds in enumerate(self.head_kinds):
            if len(kinds) != heads:
                raise ValueError(f"layer {layer} has {len(kinds)} head_kinds for {heads} heads")
            for head, kind in enumerate(kinds):
                if kind not in KINDS:
                    raise ValueError(
                        f"head {head} of layer {layer} is of kind {kind!r}; allowed: "
                        f"{', '.join(KINDS)}"
                    )
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}"
                )
