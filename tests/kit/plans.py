"""Head plans for tests."""

from __future__ import annotations

from megatron_hydra.head_plan import HeadPlan


def all_fa(
    num_layers: int, num_heads: int, num_query_groups: int, config_hash: str = ""
) -> HeadPlan:
    """The plan that keeps every head: the teacher's own attention."""
    every = dict.fromkeys(range(num_layers), range(num_heads))
    return HeadPlan.from_fa_heads(every, num_layers, num_heads, num_query_groups, config_hash)
