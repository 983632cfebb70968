"""What a layer's heads keep while a model decodes, in Megatron's static inference context.

The context has a place for each layer, filled at the first token and begun anew at position 0.
Whoever calls the model moves it on (`increment_sequence_len_offset`), as everywhere in Megatron;
:func:`megatron_hydra.model.generation.generate` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from megatron_hydra.errors import UserError

if TYPE_CHECKING:
    from megatron_hydra.model.config import HydraConfig
    from megatron_hydra.model.mixers.base import Mixer


# Without cuDNN, which plans anew, far longer than a token takes, for every number of keys.
FOR_ONE_TOKEN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# What Megatron's and Transformer Engine's modules, and configurations, read in a forward pass.
_SEQUENCE_PARALLEL = (
    "sequence_parallel",
    "reduce_scatter_embeddings",
    "scatter_to_sequence_parallel",
)


class LayerState:
    """Of the heads that one tensor-parallel rank owns.

    All rows of a batch have seen the same number of tokens: there is no padding.

    Attributes:
        tensors: By kind (`Mixer.module_name`) and name, `[most rows, ...]`, changed in place; see
            each kind's `empty_state`.
        num_tokens: Seen so far by each row.
        num_rows: Of the batch in progress.
    """

    def __init__(self, mixers: Sequence[Mixer], context: Any, like: Tensor) -> None:
        sizes = (context.max_batch_size, context.max_sequence_length)
        self.tensors = {mixer.module_name: mixer.empty_state(*sizes, like) for mixer in mixers}
        self.num_tokens = self.num_rows = 0

    @classmethod
    def of(
        cls, context: Any, layer_number: int, mixers: Sequence[Mixer], projected: Tensor
    ) -> LayerState:
        """What the context holds of a layer, ready for the next tokens.

        Args:
            context: A `StaticInferenceContext` that :func:`check_decoding` let pass.
            layer_number: Counts from 1.
            mixers: The layer's kinds.
            projected: `[s, b, rows]`, of the coming tokens; gives number format and device.

        Raises:
            UserError: If the tokens do not fit the context, or are not those that come next.
        """
        s, b, _ = projected.shape
        start, layers = context.sequence_len_offset, context.key_value_memory_dict
        if start + s > context.max_sequence_length or b > context.max_batch_size:
            raise UserError(
                f"{b} rows of {start + s} tokens do not fit the inference context, which was made "
                f"for {context.max_batch_size} of {context.max_sequence_length}"
            )
        if layer_number not in layers:
            layers[layer_number] = cls(mixers, context, projected)
        state = layers[layer_number]
        if start == 0:
            state.reset(b)
        if (start, b) != (state.num_tokens, state.num_rows):
            raise UserError(
                f"the inference context stands at token {start} of {b} rows, but layer "
                f"{layer_number - 1} has seen {state.num_tokens} of {state.num_rows}: states go on "
                "from the last token alone, or from position 0"
            )
        return state

    def of_kind(self, mixer: Mixer) -> dict[str, Tensor]:
        """A kind's tensors, `[b, ...]`: of the batch's rows."""
        return {name: x[: self.num_rows] for name, x in self.tensors[mixer.module_name].items()}

    def advance(self, num_tokens: int) -> None:
        """Count tokens that all heads have seen."""
        self.num_tokens += num_tokens

    def reset(self, num_rows: int) -> None:
        """Forget all tokens; so many rows follow."""
        if self.num_tokens:
            for tensors in self.tensors.values():
                for tensor in tensors.values():
                    tensor.zero_()
        self.num_tokens, self.num_rows = 0, num_rows

    @property
    def num_bytes(self) -> int:
        """Memory that it holds."""
        tensors = [x for of_kind in self.tensors.values() for x in of_kind.values()]
        return sum(x.untyped_storage().nbytes() for x in tensors)


def check_decoding(
    config: HydraConfig, context: Any, is_training: bool, packed_seq_params: Any = None
) -> None:
    """See that a model can decode as it stands, before it does.

    Args:
        config: The model's.
        context: Megatron's inference context.
        is_training: Whether the model is in training mode.
        packed_seq_params: Of a packed row, or None.

    Raises:
        UserError: Names what decoding does not know.
    """
    if is_training or torch.is_grad_enabled():
        raise UserError(
            "a model decodes in evaluation mode and without gradients alone: call model.eval() "
            "first, and it under torch.no_grad()"
        )
    unknown = {
        f"an inference context of type {type(context).__name__}": not context.is_static_batching(),
        "packed rows": packed_seq_params is not None,
        "sequence_parallel": config.sequence_parallel,
        f"context_parallel_size {config.context_parallel_size}": config.context_parallel_size > 1,
        f"pipeline_model_parallel_size {config.pipeline_model_parallel_size}": (
            config.pipeline_model_parallel_size > 1
        ),
        "FP8": bool(config.fp8),
        "batch_size_offset, parts of a batch": getattr(context, "batch_size_offset", 0) != 0,
        "decode mode, which replays CUDA graphs": (
            config.cuda_graph_impl != "none" and context.is_decode_only()
        ),
    }
    for what, is_asked in unknown.items():
        if is_asked:
            raise UserError(
                f"a model does not decode with {what}; it needs whole rows, a "
                "StaticInferenceContext, and no parallelism but tensor and data parallel"
            )


@contextmanager
def without_sequence_parallelism(model: torch.nn.Module) -> Iterator[None]:
    """Give every tensor-parallel rank all tokens: a step of one cannot be shared among them.

    Results are the same but for rounding. Afterwards modules and configurations say again what they
    said. (Megatron's `set_model_to_sequence_parallel` switches the same attributes, but knows
    models by their ids for good, and no copies of a configuration.)

    Args:
        model: A GPTModel, for forward passes without gradients.
    """
    owners: dict[int, Any] = {}
    if model.config.sequence_parallel:  # type: ignore[union-attr]
        for module in model.modules():
            for owner in (module, getattr(module, "config", None)):
                owners[id(owner)] = owner
    switched = [
        (owner, name)
        for owner in owners.values()
        for name in _SEQUENCE_PARALLEL
        if getattr(owner, name, None) is True
    ]
    try:
        for owner, name in switched:
            setattr(owner, name, False)
        yield
    finally:
        for owner, name in switched:
            setattr(owner, name, True)
