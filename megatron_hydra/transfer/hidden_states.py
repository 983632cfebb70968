"""A GPTModel's hidden states: what its layers give, without the logits that would follow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams


def unwrapped_model(model: Any) -> GPTModel:
    """The GPTModel inside its wrappers (DDP, Float16Module, NeMo's).

    By its class: NeMo's wrappers have the attributes of what they hold, so that Megatron's
    `get_attr_wrapped_model` stops at them.
    """
    while not isinstance(model, GPTModel):
        model = model.module
    return model


@contextmanager
def without_output_layer(gpt_model: Any) -> Iterator[None]:
    """GPTModel's forward returns what the final norm gives: as on a stage before the last.

    The decoder keeps its own `post_process`, so the final norm stays.
    """
    post_process, gpt_model.post_process = gpt_model.post_process, False
    try:
        yield
    finally:
        gpt_model.post_process = post_process


def stage_hidden_states(
    model: torch.nn.Module,
    tokens: Tensor,
    position_ids: Tensor,
    packed_seq_params: PackedSeqParams | None = None,
) -> Tensor:
    """Run this pipeline stage's layers of a model, bare or wrapped.

    Args:
        model: On a stage after the first, `set_input_tensor` was called with the hidden states
            of the stage before.
        tokens: [b, s] integer.
        position_ids: [b, s] integer.
        packed_seq_params: Documents of packed sequences, with b = 1; None for whole sequences.

    Returns:
        [s, b, h], after the final norm on the last stage; [s / tp, b, h] under sequence
        parallelism.
    """
    with without_output_layer(unwrapped_model(model)):
        return model(tokens, position_ids, attention_mask=None, packed_seq_params=packed_seq_params)


def final_hidden_states(
    model: torch.nn.Module,
    tokens: Tensor,
    position_ids: Tensor,
    packed_seq_params: PackedSeqParams | None = None,
) -> Tensor:
    """Run a model's last pipeline stage, up to its output layer.

    Args:
        model: As in :func:`stage_hidden_states`.
        tokens: [b, s] integer.
        position_ids: [b, s] integer.
        packed_seq_params: As in :func:`stage_hidden_states`.

    Returns:
        [s, b, h] after the final norm, whole on every TP rank.

    Raises:
        ValueError: If the model does not hold the last pipeline stage.
    """
    gpt_model = unwrapped_model(model)
    if not gpt_model.post_process:
        raise ValueError("the loss belongs to the last pipeline stage: this model has no output")
    hidden = stage_hidden_states(model, tokens, position_ids, packed_seq_params)
    if gpt_model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=gpt_model.pg_collection.tp)
    return hidden
