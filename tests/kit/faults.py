"""Bad numbers put into a model at one place, on one rank, for one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Fault = Callable[[nn.Module], list[Any]]
"""Puts hooks on a bare GPTModel; returns the handles to remove after the forward pass."""


def head_fault(layer: int, head: int, value: float) -> Fault:
    """One number of one head's output, in its branch, on the rank that has the head.

    Args:
        layer: Counts from 0 on this pipeline stage.
        head: The teacher's index.
        value: Put there.
    """

    def put(model: nn.Module) -> list[Any]:
        attention = model.decoder.layers[layer].self_attention
        handles = []
        for branch in (attention.full_attention, attention.linear_attention):
            if head in branch.heads:
                place = (3, 0, branch.heads.index(head), 5)
                handles.append(branch.register_forward_hook(_set_output(place, value)))
        return handles

    return put


def gradient_fault(rank: int, layer: int, name: str, rows: Any, value: float) -> Fault:
    """A parameter's gradient on one rank, before gradients are summed over ranks.

    Args:
        rank: Global.
        layer: Counts from 0 on this pipeline stage.
        name: Of the parameter in its layer.
        rows: Index of what is set, or a function of the layer's attention that returns it.
        value: Put there.
    """

    def put(model: nn.Module) -> list[Any]:
        if torch.distributed.get_rank() != rank:
            return []
        module = model.decoder.layers[layer]
        place = rows(module.self_attention) if callable(rows) else rows

        def change(gradient: Tensor) -> Tensor:
            handle.remove()  # backward runs after the forward pass's handles are removed
            gradient = gradient.clone()
            gradient[place] = value
            return gradient

        handle = module.get_parameter(name).register_hook(change)
        return []

    return put


def hidden_states_fault(factor: float) -> Fault:
    """The last norm's output times a factor: behind every head, before every loss."""

    def put(model: nn.Module) -> list[Any]:
        norm = model.decoder.final_layernorm
        return [norm.register_forward_hook(lambda module, args, output: output * factor)]

    return put


def _set_output(place: tuple[int, ...], value: float) -> Callable[..., Tensor]:
    def change(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        output = output.clone()
        output[place] = value
        return output

    return change
