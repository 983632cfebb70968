"""What one head of each kind costs: matrices, operations, state, and what a training step keeps.

Free of PyTorch, so that planning starts quickly. Here each kind says its name, too: placement,
planning and the estimates find the kinds in `COSTS`, and know none by name but full attention.

Legend: T = tokens of a sequence, h = hidden size, d = head dimension, w = a window's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from megatron_hydra.head_plan import HeadKind
from megatron_hydra.schema import Limits

_STATE_BYTES_PER_VALUE = 4  # a recurrent state is float32

Memory = Literal["tokens", "state", "window"]
"""What a head keeps of earlier tokens: keys and values of all, of the last few alone, or a state
that every token changes, which one context-parallel rank hands on to the next."""


@dataclass(frozen=True)
class CostModel:
    """Floating-point operations (FLOPs) of the forward pass of one sequence, counted by hand.

    One multiply-add is two FLOPs. Softmax, norms and activations are left out, and so are memory
    traffic and communication: the numbers compare ranks, they do not predict milliseconds. LA
    kernels reach a smaller share of a GPU's peak than attention does, so LA is underestimated.
    The defaults are Qwen3-1.7B's sizes.

    Attributes:
        hidden_size: Width of the model.
        head_dim: Width of one head.
        la_chunk_tokens: Tokens per chunk of the chunked gated delta rule.
        la_conv_kernel_size: Taps of the short convolution on LA's q, k and v; 0 without.
        sliding_window_tokens: w.
    """

    hidden_size: int = 2048
    head_dim: int = 128
    la_chunk_tokens: int = 64
    la_conv_kernel_size: int = 4
    sliding_window_tokens: int = 512

    @property
    def matrix(self) -> int:
        """Values of one projection [h, d]."""
        return self.hidden_size * self.head_dim

    def projection(self, sequence_length: int) -> float:
        """FLOPs of one [h, d] matrix over the sequence."""
        return 2.0 * sequence_length * self.hidden_size * self.head_dim

    def head(self, kind: HeadKind, sequence_length: int) -> float:
        """FLOPs of a head of a kind; of an LA head of a model unknown, the default kind's."""
        return COSTS[DEFAULT_LA_KIND if kind == "la" else kind].flops(self, sequence_length)

    def fa_group(self, sequence_length: int) -> float:
        """Key and value projection of one query group, paid by the rank that owns it."""
        return 2 * self.projection(sequence_length)


class FullAttentionCosts:
    """Softmax over all that came before; keys and values are the query group's cost."""

    kind: ClassVar[HeadKind] = "fa"
    """As plans name it."""
    title = "full attention"
    memory: ClassVar[Memory] = "tokens"

    def weights(self, model: CostModel) -> float:
        """Values of its matrices: query, gate, output."""
        return 3 * model.matrix

    def flops(self, model: CostModel, num_tokens: int) -> float:
        """Query, gate and output projection, and causal QK^T and PV over half the square."""
        attention = 2.0 * num_tokens**2 * model.head_dim
        return 3 * model.projection(num_tokens) + attention

    def state_bytes(self, model: CostModel, value_bytes: int) -> float:
        """Bytes that decoding keeps whatever the length."""
        return 0

    def kept_bytes(self, model: CostModel, num_runs: int = 1) -> float:
        """Bytes per token that wait for the backward pass, in bfloat16.

        Query and gate as projected; query and key before and after their norms, value, output; the
        norms' rates, the softmax's sum.

        Args:
            model: Sizes.
            num_runs: Of a recurrence: two where context-parallel ranks share the tokens, and its
                output is composed of theirs.
        """
        return 4 * model.head_dim + 12 * model.head_dim + 12

    def gradient_bytes(self, model: CostModel, num_runs: int = 1) -> float:
        """Bytes per token that its backward pass holds at its widest, beside those."""
        return 4 * model.head_dim


class GatedDeltaNetCosts:
    """A gated linear recurrence with a decay per head."""

    kind: ClassVar[HeadKind] = "gated_delta_net"
    title = "Gated DeltaNet"
    memory: ClassVar[Memory] = "state"

    def decay_rows(self, head_dim: int) -> int:
        """Rows of the in-projection that its decay is made of."""
        return 1

    def weights(self, model: CostModel) -> float:
        """q, k, v, z and output; decay and beta; taps."""
        rows = self.decay_rows(model.head_dim) + 1
        taps = 3 * model.head_dim * model.la_conv_kernel_size
        return 5 * model.matrix + rows * model.hidden_size + taps

    def flops(self, model: CostModel, num_tokens: int) -> float:
        """q, k, v, z and output projection, decay and beta, convolution, chunked delta rule.

        The rule in its chunked form (arXiv 2412.06464, section 3.3) makes five chunk-wide and
        three state-wide products per token, and solves one triangular system per chunk.
        """
        dim, chunk = model.head_dim, model.la_chunk_tokens
        per_token = (
            2 * (self.decay_rows(model.head_dim) + 1) * model.hidden_size  # rows a and b
            + 6 * model.la_conv_kernel_size * dim
            + 5 * 2 * chunk * dim  # QK^T, KK^T, T K, T V, (QK^T) U
            + 3 * 2 * dim * dim  # W S, Q S, K^T U
            + chunk * chunk
        )
        return 5 * model.projection(num_tokens) + float(num_tokens * per_token)

    def state_bytes(self, model: CostModel, value_bytes: int) -> float:
        """A matrix in float32, and the convolution's last inputs in the format that serves."""
        d = model.head_dim
        past = 3 * d * max(0, model.la_conv_kernel_size - 1)
        return d * d * _STATE_BYTES_PER_VALUE + past * value_bytes

    def kept_bytes(self, model: CostModel, num_runs: int = 1) -> float:
        """Query, key, value and gate as projected, two gates; query and key as prepared.

        Of each run value, output, the chunks' triangular systems, decay and step size; of two the
        output composed of theirs.
        """
        d = model.head_dim
        kept = 8 * d + 4 + 4 * d + num_runs * (4 * d + 2 * model.la_chunk_tokens + 8)
        return kept + (2 * d if num_runs > 1 else 0)

    def gradient_bytes(self, model: CostModel, num_runs: int = 1) -> float:
        """The joined gradient of the projected sections, and the gated delta rule's.

        Those of the prepared query, key and value of each run, and the states of all chunks, which
        the last run computes again.
        """
        d = model.head_dim
        return 8 * d + 4 + num_runs * 6 * d + 2 * d**2 // model.la_chunk_tokens


class KimiDeltaAttentionCosts(GatedDeltaNetCosts):
    """A decay per channel. What training keeps of it is counted, not measured on a GPU."""

    kind = "kda"
    title = "Kimi Delta Attention"

    def decay_rows(self, head_dim: int) -> int:
        """r, the width of the decay's bottleneck, see `mixers/kda.py`."""
        return max(1, head_dim // 8)

    def weights(self, model: CostModel) -> float:
        """As Gated DeltaNet's, and what takes the bottleneck to the channels."""
        return super().weights(model) + self.decay_rows(model.head_dim) * model.head_dim

    def flops(self, model: CostModel, num_tokens: int) -> float:
        """As Gated DeltaNet's, and the same."""
        up = 2.0 * num_tokens * self.decay_rows(model.head_dim) * model.head_dim
        return super().flops(model, num_tokens) + up

    def kept_bytes(self, model: CostModel, num_runs: int = 1) -> float:
        """As Gated DeltaNet's, and its decays in float32: raw, and summed for each run."""
        kept = 2 * self.decay_rows(model.head_dim) + 4 * model.head_dim * (1 + 2 * num_runs)
        return super().kept_bytes(model, num_runs) + kept

    def gradient_bytes(self, model: CostModel, num_runs: int = 1) -> float:
        """As Gated DeltaNet's, and the decays' in float32."""
        return super().gradient_bytes(model, num_runs) + 4 * model.head_dim * num_runs


class SlidingWindowCosts:
    """Softmax over the last w tokens. What training keeps is counted, not measured on a GPU."""

    kind: ClassVar[HeadKind] = "sliding_window"
    title = "sliding window"
    memory: ClassVar[Memory] = "window"

    def weights(self, model: CostModel) -> float:
        """q, k, v, gate and output."""
        return 5 * model.matrix

    def flops(self, model: CostModel, num_tokens: int) -> float:
        """Five projections, and QK^T and PV over the w tokens that a query sees, or fewer."""
        w = min(model.sliding_window_tokens, num_tokens)
        pairs = w * num_tokens - w * w / 2
        return 5 * model.projection(num_tokens) + 4.0 * model.head_dim * pairs

    def state_bytes(self, model: CostModel, value_bytes: int) -> float:
        """Keys and values of w tokens."""
        return 2 * model.sliding_window_tokens * model.head_dim * value_bytes

    def kept_bytes(self, model: CostModel, num_runs: int = 1) -> float:
        """Projected; query and key after norm and RoPE; blocks, whose keys stand twice; output."""
        d = model.head_dim
        return 8 * d + 8 * d + 5 * 2 * d + 2 * d + 12

    def gradient_bytes(self, model: CostModel, num_runs: int = 1) -> float:
        """Of the projected sections and of the blocks."""
        return 8 * model.head_dim + 5 * 2 * model.head_dim


KindCosts = FullAttentionCosts | GatedDeltaNetCosts | SlidingWindowCosts
_ALL = (FullAttentionCosts(), GatedDeltaNetCosts(), KimiDeltaAttentionCosts(), SlidingWindowCosts())
COSTS: dict[HeadKind, KindCosts] = {costs.kind: costs for costs in _ALL}
LA_KINDS = tuple(kind for kind in COSTS if kind != "fa")
DEFAULT_LA_KIND: HeadKind = LA_KINDS[0]
"""What LA heads are where nothing says what."""
WINDOW_KIND: HeadKind = next(kind for kind, costs in COSTS.items() if costs.memory == "window")
"""What heads become whose work is local."""
LAKind = Annotated[str, Limits(choices=LA_KINDS)]
"""The type of a field that says what LA heads are."""
