"""A GPTModel's final hidden states, without the logits that would follow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor


def unwrapped_model(model: torch.nn.Module) -> Any:
    """The GPTModel inside its wrappers (DDP, Float16Module).

    Raises:
        ValueError: If it does not hold the last pipeline stage.
    """
    gpt_model = get_attr_wrapped_model(model, "post_process", return_model_obj=True)
    if not gpt_model.post_process:
        raise ValueError("the loss belongs to the last pipeline stage: this model has no output")
    return gpt_model


@contextmanager
def without_output_layer(gpt_model: Any) -> Iterator[None]:
    """GPTModel's forward returns what the final norm gives: as on a stage before the last.

    The decoder keeps its own `post_process`, so the final norm stays.
    """
    gpt_model.post_process = False
    try:
        yield
    finally:
        gpt_model.post_process = True


def final_hidden_states(model: torch.nn.Module, tokens: Tensor, position_ids: Tensor) -> Tensor:
    """Run a model, bare or wrapped, up to its output layer.

    Args:
        model: Holds the last pipeline stage.
        tokens: [b, s] integer.
        position_ids: [b, s] integer.

    Returns:
        [s, b, h] after the final norm, whole on every TP rank.
    """
    gpt_model = unwrapped_model(model)
    with without_output_layer(gpt_model):
        hidden = model(tokens, position_ids, attention_mask=None)
    if gpt_model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=gpt_model.pg_collection.tp)
    return hidden
