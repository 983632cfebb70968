"""Gated DeltaNet: a gated linear recurrence over heads that have their own key and value.

Legend: s = sequence, b = batch, n = LA heads on the rank, d = head dimension, m = the rank's
pieces of the stream (`context_parallel.py`).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from hydra_kernels.gated_delta_rule import gated_delta_rule
from hydra_kernels.gated_delta_rule.compilation import Mode
from hydra_kernels.la_preparation import la_preparation
from hydra_kernels.warm_up import load
from torch import Tensor

from megatron_hydra.errors import UserError
from megatron_hydra.model.context_parallel import Pieces
from megatron_hydra.model.head_parameters import (
    InitHead,
    head_parameter,
    init_heads,
)
from megatron_hydra.model.kernel_choice import (
    check_la_heads,
    choose_fused_kernels,
    choose_la_kernel,
)
from megatron_hydra.model.mixers.base import CalibratedStart, Mixer, Stream
from megatron_hydra.model.mixers.costs import GatedDeltaNetCosts
from megatron_hydra.model.options import HydraFields
from megatron_hydra.model.projection import Section, Sections, Units

_MIN_DT, _MAX_DT = 1e-3, 1e-1
_MIN_A, _MAX_A = 1.0, 16.0
MAX_A_LOG = 80.0
"""Above it a chunk's sum of log decays can leave float32, whose largest number is exp(88.7)."""


class GatedDeltaNet(Mixer):
    """Gated DeltaNet (arXiv 2412.06464) over the LA heads that one tensor-parallel rank owns.

    q, k and v pass a short causal convolution with SiLU; q and k then the teacher's norm, RoPE
    and the L2 norm. Decay exp(-exp(A_log) softplus(a + dt_bias)) is computed in float32.
    """

    label = "LA"
    module_name = "linear_attention"
    costs = GatedDeltaNetCosts()
    kind = costs.kind
    prefix = "la"
    """Of its sections' names."""
    gate_name = "la_gate"
    head_tensors = ("conv_weight", "A_log", "dt_bias")
    float32_parameters = ("A_log", "dt_bias")
    has_fused_decay = True
    """Whether the fused preparation computes it."""

    @classmethod
    def sections(
        cls, config: HydraFields, head_dim: int, heads: Units, groups: Units
    ) -> list[Section]:
        """Query, key and value of each head's own, read as one, `la_qkv`; gate, decay and beta."""
        prefix = cls.prefix
        sections = [
            Section(f"{prefix}_{name}", *heads, head_dim, teacher=name, part=f"{prefix}_qkv")
            for name in ("query", "key", "value")
        ]
        if config.la_output_gate != "none":
            is_identity = config.la_output_gate == "sigmoid"
            sections.append(Section(cls.gate_name, *heads, head_dim, starts_at_zero=is_identity))
        if config.la_decay:
            sections.append(Section(f"{prefix}_decay", *heads, cls.costs.decay_rows(head_dim)))
        if config.la_beta:
            sections.append(Section(f"{prefix}_beta", *heads, 1))
        return sections

    @classmethod
    def gate_activation(cls, config: HydraFields) -> Literal["silu", "sigmoid2"]:
        """`silu` is Gated DeltaNet's own."""
        return "silu" if config.la_output_gate == "silu" else "sigmoid2"

    def _build(self, submodules: Any, cp_comm_type: str | None) -> None:
        config = self.config
        self.impl = choose_la_kernel(config.la_kernel)
        check_la_heads(config, self.impl, self.layer_number, len(self.heads))
        self.preparation = choose_fused_kernels(config.fused_kernels)
        if config.la_rope and config.rotary_interleaved:
            raise UserError(
                "rotary_interleaved is True, which LA heads do not know: set la_rope to False"
            )
        if config.la_qk_norm:
            self._build_norms(submodules)
        # A rank without LA heads has none of their parameters.
        if config.la_short_conv and self.heads:
            self.conv_weight = head_parameter(config, self._identity_convolution())
        if config.la_decay and self.heads:
            self._build_decay()

    def _build_decay(self) -> None:
        self.A_log = self._per_head("A_log", init_a_log)
        self.dt_bias = self._per_head("dt_bias", init_dt_bias)

    def parameter_sections(self) -> dict[str, list[Section]]:
        """The taps of query, key and value; one number for each head of the others."""
        heads, d = (self.heads, self.all_heads), self.config.kv_channels
        taps = [Section(name, *heads, d) for name in ("query", "key", "value")]
        one = [Section("", *heads, 1)]
        return {"conv_weight": taps, "A_log": one, "dt_bias": one}

    def empty_state(self, num_rows: int, num_tokens: int, like: Tensor) -> dict[str, Tensor]:
        """`recurrent` `[num_rows, n, d, d]` float32, rows are keys; `conv`, the last inputs.

        These are `[num_rows, taps - 1, 3 n d]`, and none without the convolution or with one tap.
        """
        n, d, config = len(self.heads), self.config.kv_channels, self.config
        if not n:
            return {}
        state = {"recurrent": like.new_zeros(num_rows, n, d, d, dtype=torch.float32)}
        if config.la_short_conv and config.la_conv_kernel_size > 1:
            state["conv"] = like.new_zeros(num_rows, config.la_conv_kernel_size - 1, 3 * n * d)
        return state

    def calibrated_start(self, distance: Tensor, write: Tensor) -> CalibratedStart:
        """Decays that reach as far back, the same for all tokens; strengths that tell tokens apart.

        A state that forgets by gamma each token holds what is gamma / (1 - gamma) tokens back on
        the mean. With gamma = exp(-exp(A_log) softplus(dt_bias)) and A_log = 0 that is
        exp(-dt_bias).
        """
        config, prefix, n = self.config, self.prefix, len(self.heads)
        parameters, rows = {}, {}
        if config.la_decay and n:
            width = self.dt_bias.numel() // n
            parameters["A_log"] = torch.zeros(n)
            parameters["dt_bias"] = -distance.log().repeat_interleave(width)
            num_rows = self.costs.decay_rows(config.kv_channels)
            rows[f"{prefix}_decay"] = write.new_zeros(n, num_rows, write.shape[1])
        if config.la_beta and n:
            rows[f"{prefix}_beta"] = write[:, None]
        return CalibratedStart(parameters, rows)

    def load_kernels(self, num_sequences: int, num_tokens: int) -> None:
        """The gated delta rule's and, for it, the preparation's and the fusion's, on a GPU."""
        if self.impl != "fla" or not self.heads:
            return
        config, d = self.config, self.config.kv_channels
        is_split = config.context_parallel_size > 1
        mode = Mode(d, d, config.params_dtype, is_split, not self.has_fused_decay)
        rows = num_sequences * len(self.heads)
        load(mode, rows, num_tokens, torch.device("cuda", torch.cuda.current_device()))

    def faults_of_weights(self) -> list[str]:
        """Decays that are NaN in the chunked kernels."""
        if not hasattr(self, "A_log"):
            return []
        return [
            f"A_log of head {head} ({self.label}) of layer {self.layer_number - 1} is {value:g}, "
            f"and a decay by exp(A_log) gives NaN; allowed: {MAX_A_LOG:g} at most"
            for head, value in zip(self.heads, self.A_log.tolist(), strict=True)
            if not value <= MAX_A_LOG  # nor NaN
        ]

    def forward(self, sections: Sections, stream: Stream) -> Tensor:
        """Run the recurrence over every sequence, of which other ranks may hold parts.

        Args:
            sections: By the kind's prefix: `la_qkv` [s, b, 3 n d]; `la_decay`, `la_beta` [s, b, n].
            stream: The rank's tokens; `piece_angles` are used if `config.la_rope`.

        Returns:
            `[s, b, n, d]`.
        """
        pieces = stream.pieces
        if not self.heads:
            empty = sections[f"{self.prefix}_qkv"].unflatten(-1, (0, self.config.kv_channels))
            return self._stay_in_graph(empty)
        sections = self._own(sections, pieces)
        kept = None if stream.state is None else stream.state.of_kind(self)
        prepared = self._prepare(sections, stream.piece_angles, pieces, kept)
        output = self._recur(*prepared, pieces, kept)
        return pieces.from_contiguous(pieces.sequence_first(output))

    def _prepare(
        self,
        sections: Sections,
        rotary_pos_emb: Tensor | None,
        pieces: Pieces,
        kept: dict[str, Tensor] | None,
    ) -> list[Tensor]:
        """The recurrence's inputs, of sections that a kernel reads where they lie.

        They are copied once where a rank has two pieces of each of several rows. Their gradients go
        where those of all sections are joined, but for context parallelism, whose last tokens have
        another reader. A decay that is no single number per head is left to :meth:`_log_decay`.

        Returns:
            Query, key and value `[m b, s / m, n, d]`, log decay and beta `[m b, s / m, n]`.
        """
        config = self.config
        known = ("qkv", "decay", "beta") if self.has_fused_decay else ("qkv", "beta")
        names = [name for name in known if name in sections]
        parts = {name: pieces.batch_first(sections[name]) for name in names}
        options: dict[str, Any] = {}
        if not pieces.is_split:
            gradients = sections.gradients
            options["empty_gradients"] = lambda: [
                pieces.batch_first(place)
                for place in gradients.empty(*(f"{self.prefix}_{name}" for name in names))
            ]
        if config.la_short_conv:
            options["conv_weight"] = self.conv_weight
            options["initial_state"] = (
                pieces.tokens_before(parts["qkv"], config.la_conv_kernel_size - 1)
                if kept is None
                else _pass_on(kept, parts["qkv"])
            )
        if config.la_qk_norm and config.qk_layernorm:
            options["q_norm_weight"] = self.q_layernorm.weight
            options["k_norm_weight"] = self.k_layernorm.weight
        if config.la_rope:
            # Of [s, 1, 1, d], whose halves are equal, to [m, s / m, d / 2].
            angles = pieces.batch_first(rotary_pos_emb[:, 0].chunk(2, dim=-1)[0])
            options |= {"cos": angles.cos(), "sin": angles.sin()}
        if "decay" in parts:
            options |= {"a": parts["decay"], "a_log": self.A_log, "dt_bias": self.dt_bias}
        if "beta" in parts:
            options["b"] = parts["beta"]
        query, key, value, log_decay, beta = la_preparation(
            parts["qkv"],
            num_heads=len(self.heads),
            norm_eps=config.layernorm_epsilon,
            cu_seqlens=pieces.cu_seqlens,
            impl=self.preparation,
            **options,
        )
        if log_decay is None:
            rest = {name: pieces.batch_first(x) for name, x in sections.items() if name == "decay"}
            log_decay = self._log_decay(rest, query)
        beta = every_head(query, 1.0) if beta is None else beta
        return [query, key, value, log_decay, beta]

    def _own(self, sections: Sections, pieces: Pieces) -> Sections:
        """The recurrence's inputs `qkv`, `decay` and `beta` where they run, in one exchange."""
        names = [name for name in ("qkv", "decay", "beta") if f"{self.prefix}_{name}" in sections]
        views = {name: sections[f"{self.prefix}_{name}"] for name in names}
        if pieces.moves_tokens:
            parts = [view.flatten(2) for view in views.values()]
            moved = pieces.to_contiguous(torch.cat(parts, dim=-1))
            parts = moved.split([part.shape[-1] for part in parts], dim=-1)
            views = {name: part.view_as(views[name]) for name, part in zip(names, parts)}
        return Sections(views, sections.gradients)

    def _recur(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        pieces: Pieces,
        kept: dict[str, Tensor] | None,
    ) -> Tensor:
        """The gated delta rule over a rank's pieces, each from the state that precedes it."""
        if kept is not None:
            # Chunks of kernels hold many tokens; a single one is a few products.
            is_step = query.shape[1] == 1
            output, end = gated_delta_rule(
                query,
                key,
                value,
                log_decay,
                beta,
                initial_state=kept["recurrent"],
                output_final_state=True,
                impl="reference" if is_step else self.impl,
                **({"chunk_size": 1} if is_step else {}),
            )
            kept["recurrent"].copy_(end)
            return output
        if not pieces.is_split:
            return gated_delta_rule(
                query, key, value, log_decay, beta, cu_seqlens=pieces.cu_seqlens, impl=self.impl
            ).output
        # From zeros and from the identity, see `context_parallel.py`.
        start = pieces.start_of_recurrence(value)
        runs = [
            gated_delta_rule(
                query,
                key,
                values,
                log_decay,
                beta,
                initial_state=state,
                output_final_state=True,
                cu_seqlens=pieces.cu_seqlens,
                impl=self.impl,
            )
            for values, state in (
                (value, torch.zeros_like(start)),
                (torch.zeros_like(value), start),
            )
        ]
        (from_zeros, additions), (from_identity, transitions) = runs
        state = pieces.states_before(torch.stack((additions, transitions), dim=2)).to(value.dtype)
        return from_zeros + torch.einsum("bsnk,bnkv->bsnv", from_identity, state)

    def _log_decay(self, sections: dict[str, Tensor], like: Tensor) -> Tensor:
        """Where the preparation makes none."""
        return every_head(like, 0.0)

    def _identity_convolution(self) -> Tensor:
        """Depthwise taps `[3 n d, kernel]` that pass each token on unchanged at the start."""
        config = self.config
        rows = 3 * len(self.heads) * config.kv_channels
        taps = torch.zeros(rows, config.la_conv_kernel_size, dtype=config.params_dtype)
        taps[:, -1] = 1.0
        return taps

    def _per_head(
        self, name: str, init: InitHead, width: int = 1, num_columns: int | None = None
    ) -> torch.nn.Parameter:
        """Float32 numbers, `width` per head or as many rows of a matrix."""
        config, section = self.config, Section(name, self.heads, self.all_heads, width)
        values = init_heads(
            section,
            init if config.perform_initialization else _leave,
            seed=config.head_init_seed,
            layer_number=self.layer_number,
            num_columns=num_columns,
        )
        return head_parameter(config, values)


def _pass_on(kept: dict[str, Tensor], inputs: Tensor) -> Tensor | None:
    """The convolution's last inputs `[b, taps - 1, 3 n d]`, in whose place the new ones come."""
    if "conv" not in kept:
        return None
    before = kept["conv"].clone()
    count = before.shape[1]
    kept["conv"].copy_(torch.cat((before, inputs[:, -count:]), dim=1)[:, -count:])
    return before


def every_head(like: Tensor, value: float) -> Tensor:
    """One float32 constant for each head and token of `[..., n, d]`."""
    return torch.full(like.shape[:-1], value, dtype=torch.float32, device=like.device)


def _leave(tensor: Tensor, generator: torch.Generator) -> None:
    """What is loaded afterwards."""


def init_a_log(tensor: Tensor, generator: torch.Generator) -> None:
    """Decay rates uniform in [1, 16], as in Gated DeltaNet's code and Kimi Linear's."""
    tensor.uniform_(_MIN_A, _MAX_A, generator=generator).log_()


def init_dt_bias(tensor: Tensor, generator: torch.Generator) -> None:
    """softplus(dt_bias) is log-uniform in [1e-3, 1e-1], as in Mamba-2 (arXiv 2405.21060)."""
    dt = tensor.uniform_(math.log(_MIN_DT), math.log(_MAX_DT), generator=generator).exp_()
    tensor.copy_(dt + torch.log(-torch.expm1(-dt)))
