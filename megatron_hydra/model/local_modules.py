"""The `local` backend's norm and core attention, where Megatron's own are too narrow.

Megatron's local RMSNorm refuses sequence parallelism, and its local `DotProductAttention` refuses
context parallelism and packed rows, holds the whole score matrix and wants equal head counts on
every rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from megatron_hydra.model.decoding import FOR_ONE_TOKEN
from megatron_hydra.model.head_parameters import initial_device
from megatron_hydra.model.sequence import SequenceLayout


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
        device = initial_device(config)
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(ones)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised `x`, same shape and dtype."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class LocalCoreAttention(MegatronModule):
    """Causal attention through PyTorch's `scaled_dot_product_attention`; grouped queries allowed.

    Takes Megatron's constructor arguments for a core attention module; head counts come from the
    tensors, so ranks may differ. Under context parallelism each rank gathers all ranks' keys and
    values: the reference for the backends that pass them round.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
        self.cp_group = pg_collection.cp
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
            query: `[s, b, heads, d]`; `[s, heads, d]` where packed.
            key: `[s, b, groups, d]`, groups dividing heads; `[s, groups, d]` where packed. With
                more tokens than the query has, as in decoding, the query's are the last of them.
            value: As `key`.
            attention_mask: Ignored: the mask is always causal.
            packed_seq_params: Where a packed row's documents lie (`thd`).

        Returns:
            `[s, b, heads * d]`; `[s, heads * d]` where packed.
        """
        is_packed = query.dim() == 3
        if is_packed:
            query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        if len(key) > len(query):
            return self._attend_to_kept(query, key, value)
        layout = SequenceLayout.of(query.shape[0], packed_seq_params, self.cp_group)
        mask = None if layout.is_whole else layout.causal_mask().to(query.device)
        key, value = (
            gather_from_sequence_parallel_region(t.contiguous(), group=self.cp_group)
            for t in (key, value)
        )
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        output = output.permute(2, 0, 1, 3).flatten(2)
        return output.squeeze(1) if is_packed else output

    def _attend_to_kept(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`[s, b, heads * d]` of whole rows' last tokens, see `decoding.py`."""
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        s, t = query.shape[2], key.shape[2]
        options: dict[str, Any] = dict(scale=self.softmax_scale, enable_gqa=True)
        if s == 1:
            with sdpa_kernel(FOR_ONE_TOKEN):
                output = F.scaled_dot_product_attention(query, key, value, **options)
        else:
            mask = torch.ones(s, t, dtype=torch.bool, device=query.device).tril(t - s)
            output = F.scaled_dot_product_attention(query, key, value, mask, **options)
        return output.permute(2, 0, 1, 3).flatten(2)
