"""The `local` backend's norm and core attention, where Megatron's own are too narrow.

Megatron's local RMSNorm refuses sequence parallelism, and its local `DotProductAttention` holds
the whole score matrix and wants equal head counts on every rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class LocalRMSNorm(torch.nn.Module):
    """RMSNorm over the last dimension, marked so that its gradient is reduced under SP.

    Args:
        config: Gives dtype and `sequence_parallel`.
        hidden_size: Size of the last dimension.
        eps: Added to the mean square.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **kwargs: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised `x`, same shape and dtype."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class LocalCoreAttention(MegatronModule):
    """Causal attention through PyTorch's `scaled_dot_product_attention`; grouped queries allowed.

    Takes Megatron's constructor arguments for a core attention module; head counts come from the
    tensors, so ranks may differ.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale if softmax_scale is not None else config.softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend causally.

        Args:
            query: `[s, b, heads, d]`.
            key: `[s, b, groups, d]`, groups dividing heads.
            value: As `key`.
            attention_mask: Ignored: the mask is always causal.
            packed_seq_params: Must be None.

        Returns:
            `[s, b, heads * d]`.

        Raises:
            NotImplementedError: For packed sequences.
        """
        if packed_seq_params is not None:
            raise NotImplementedError("the local backend does not take packed sequences")
        s, b, _, _ = query.shape
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        output = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )
        return output.permute(2, 0, 1, 3).reshape(s, b, -1)
