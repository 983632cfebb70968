"""Kimi Delta Attention: Gated DeltaNet with a decay for each channel of the keys.

Legend: s = sequence, b = batch, n = KDA heads on the rank, d = head dimension, r = rows of a head
that its decays are made of.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hydra.model.mixers.costs import KimiDeltaAttentionCosts
from megatron_hydra.model.mixers.gated_delta_net import (
    GatedDeltaNet,
    every_head,
    init_a_log,
    init_dt_bias,
)
from megatron_hydra.model.projection import Section


class KimiDeltaAttention(GatedDeltaNet):
    """Kimi Delta Attention (Kimi Linear, arXiv 2510.26692) over a tensor-parallel rank's KDA heads.

    As Gated DeltaNet, but the decay exp(-exp(A_log) softplus(decay_up a + dt_bias)) is one per
    channel of the keys, a being r = d / 8 rows of the in-projection. Kimi Linear's bottleneck has d
    rows for all heads of a layer together; here every head has its own, so that a head stays what
    tensor-parallel ranks, checkpoints and plans deal with.
    """

    label = "KDA"
    module_name = "kimi_delta_attention"
    costs = KimiDeltaAttentionCosts()
    kind = costs.kind
    prefix = "kda"
    gate_name = "kda_gate"
    head_tensors = ("conv_weight", "A_log", "dt_bias", "decay_up")
    has_fused_decay = False

    def _build_decay(self) -> None:
        config, d = self.config, self.config.kv_channels

        def normal(tensor: Tensor, generator: torch.Generator) -> None:
            tensor.normal_(0.0, config.init_method_std, generator=generator)

        self.A_log = self._per_head("A_log", init_a_log)
        self.dt_bias = self._per_head("dt_bias", init_dt_bias, width=d)
        up = self._per_head("decay_up", normal, width=d, num_columns=self.costs.decay_rows(d))
        up.data = up.data.to(config.params_dtype)
        self.decay_up = up

    def parameter_sections(self) -> dict[str, list[Section]]:
        """As Gated DeltaNet's, with d biases per head and d rows `[d, r]` of `decay_up`."""
        channels = [Section("", self.heads, self.all_heads, self.config.kv_channels)]
        return {**super().parameter_sections(), "dt_bias": channels, "decay_up": channels}

    def _log_decay(self, sections: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """`[..., n, d]` float32, of `decay` `[..., n, r]`."""
        n, d = len(self.heads), self.config.kv_channels
        if not self.config.la_decay:
            return every_head(like, 0.0).unsqueeze(-1).expand(*like.shape[:-1], d)
        # A bottleneck of one row comes without its dimension.
        rows = sections["decay"].unflatten(-1, (n, -1)) if d < 16 else sections["decay"]
        up = self.decay_up.view(n, d, -1).to(rows.dtype)
        raw = torch.einsum("...nr,ndr->...nd", rows, up).float() + self.dt_bias.view(n, d)
        return -self.A_log.exp()[:, None] * F.softplus(raw)
