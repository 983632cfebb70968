"""What a model keeps of a sequence while it generates: KV cache of FA heads, state of LA heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megatron_hydra.head_plan import HeadPlan

if TYPE_CHECKING:
    from megatron_hydra.config import HydraConfig

_STATE_BYTES_PER_VALUE = 4  # the recurrent state is float32


def cache_bytes_per_token(config: HydraConfig, plan: HeadPlan | None) -> int:
    """Bytes of key and value that one more token adds to the cache, all layers together.

    A query group is stored in the model's dtype if any FA head uses it.

    Args:
        config: Shapes and dtype.
        plan: None for a teacher, which stores every group.
    """
    num_groups = config.num_layers * config.num_query_groups
    if plan is not None:
        num_groups = sum(len(plan.fa_groups(layer)) for layer in range(plan.num_layers))
    return num_groups * 2 * config.kv_channels * _value_bytes(config)


def state_bytes(config: HydraConfig, plan: HeadPlan | None) -> int:
    """Bytes of the LA heads' state of one sequence, whatever its length.

    Each head has a float32 matrix of head dimension squared and, with the short convolution, the
    last inputs of query, key and value in the model's dtype.

    Args:
        config: Shapes, dtype and switches.
        plan: None for a teacher, which has no LA head.
    """
    if plan is None:
        return 0
    num_la_heads = plan.num_layers * plan.num_heads - plan.num_fa_heads
    dim = config.kv_channels
    per_head = dim * dim * _STATE_BYTES_PER_VALUE
    if config.la_short_conv:
        per_head += 3 * dim * (config.la_conv_kernel_size - 1) * _value_bytes(config)
    return num_la_heads * per_head


def _value_bytes(config: HydraConfig) -> int:
    return torch.empty(0, dtype=config.params_dtype).element_size()
