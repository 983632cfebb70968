"""Padding: a vocabulary or an MLP width that tensor-parallel ranks cannot share equally.

Megatron's layers give every rank a part of one size, so what is not divisible is filled up: the
embedding and the output layer with rows, the MLP's two projections with rows and columns. All
padding lies at the end, on the last rank or the last ones.

It changes no number. The padding is zero from the start and stays so: a padded channel of the MLP
is zero before its second projection, and so are its gradients on both sides; the logits of padded
rows are minus infinity, or cut off, so that no softmax sees them and no gradient reaches them. No
padding is stored: a checkpoint has the true sizes, at every layout, of weights and of the
optimizer's state. Where a size is divisible, nothing here is in the model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import (
    ReplicaId,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_hydra.model.config import HydraConfig
from megatron_hydra.model.parallel_sizes import padded_size, real_part


class PaddedVocabularyModel(GPTModel):
    """A GPTModel whose vocabulary is padded; takes its arguments, `vocab_size` the true one.

    Logits of this rank are `[b, s, padded vocabulary / tp]`, minus infinity in the padding; logits
    gathered over the ranks are `[b, s, vocabulary]`.
    """

    def __init__(self, config: HydraConfig, *, vocab_size: int, **kwargs: Any) -> None:
        padded = padded_size(vocab_size, config.tensor_model_parallel_size)
        super().__init__(config=config, vocab_size=padded, **kwargs)
        self.true_vocab_size = vocab_size
        self.num_real_rows = _real_part(vocab_size, self.tp_group)[1]
        for weight in self._vocabulary_weights().values():
            _zero_(weight, self.num_real_rows)
        if self.post_process:
            self.output_layer.register_forward_hook(self._hide_padding)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Megatron's, with the vocabulary's weights stored without padding."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, weight in self._vocabulary_weights().items():
            key = prefix + name
            if key in state:  # a tied output layer on the first stage has no entry of its own
                state[key] = _without_padding(
                    weight, state[key], self.true_vocab_size, self.tp_group
                )
        return state

    def _vocabulary_weights(self) -> dict[str, Tensor]:
        names = ("embedding.word_embeddings.weight", "output_layer.weight")
        return {name: p for name, p in self.named_parameters() if name in names}

    def _hide_padding(
        self, module: torch.nn.Module, args: tuple, output: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        logits, bias = output
        if logits.shape[-1] == self.vocab_size:  # gathered: the padding is all at the end
            return logits[..., : self.true_vocab_size], bias
        if self.num_real_rows < logits.shape[-1]:
            logits[..., self.num_real_rows :] = -torch.inf
        return logits, bias


class _PaddedMLP(MLP):
    """Megatron's gated MLP with its width padded."""

    def __init__(self, config: HydraConfig, submodules: Any, **kwargs: Any) -> None:
        padded = copy.copy(config)
        padded.ffn_hidden_size = padded_size(
            config.ffn_hidden_size, config.tensor_model_parallel_size
        )
        super().__init__(padded, submodules, ffn_hidden_size=padded.ffn_hidden_size, **kwargs)
        self.true_ffn_hidden_size = config.ffn_hidden_size
        number = _real_part(config.ffn_hidden_size, self.tp_group)[1]
        for half in self.linear_fc1.weight.data.chunk(2):  # gate and up, one above the other
            _zero_(half, number)
        _zero_(self.linear_fc2.weight.t(), number)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Megatron's, with both weights stored without padding."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, axis, stacked in (("linear_fc1", 0, 2), ("linear_fc2", 1, 1)):
            key = f"{prefix}{name}.weight"
            state[key] = _without_padding(
                getattr(self, name).weight,
                state[key],
                self.true_ffn_hidden_size,
                self.tp_group,
                axis=axis,
                stacked=stacked,
            )
        return state


def padded_mlp(spec: ModuleSpec) -> type[MLP]:
    """The spec's MLP, padded.

    A class, of which Megatron's `build_module` takes the submodules as from a spec: a spec of any
    other module than its own MLP is unknown to Megatron's layer.
    """
    return type("PaddedMLP", (_PaddedMLP,), {"submodules": spec.submodules})


def needs_padding(config: HydraConfig, size: int) -> bool:
    """Whether the tensor-parallel ranks cannot share `size` equally."""
    return size % config.tensor_model_parallel_size != 0


def _real_part(size: int, tp_group: ProcessGroup) -> tuple[int, int]:
    return real_part(size, get_pg_size(tp_group), get_pg_rank(tp_group))


@torch.no_grad()
def _zero_(weight: Tensor, num_real_rows: int) -> None:
    weight[num_real_rows:] = 0


def _without_padding(
    weight: Tensor,
    sharded: ShardedTensor | ShardedTensorFactory,
    size: int,
    tp_group: ProcessGroup,
    *,
    axis: int = 0,
    stacked: int = 1,
) -> ShardedTensorFactory:
    """Describe a padded weight to Megatron's checkpoints as a part of a tensor of the true size.

    Args:
        weight: This rank's, padded.
        sharded: How Megatron describes it; key, replicas and leading offsets (layers) stay.
        size: What is padded, whole and true.
        tp_group: Tensor-parallel ranks.
        axis: The dimension that is padded.
        stacked: Matrices that lie one above the other along it, each with padding of its own.
    """
    like = sharded.build()[0] if isinstance(sharded, ShardedTensorFactory) else sharded
    first, number = _real_part(size, tp_group)
    part = weight.shape[axis] // stacked
    leading = like.prepend_axis_num

    def build(key: str, tensor: Tensor, replica_id: ReplicaId, flattened_range: Any) -> list:
        assert flattened_range is None, "flattened optimizer shards are not in use"
        shards = []
        for index in range(stacked):
            data = tensor.narrow(axis, index * part, number)
            shape, offset = list(data.shape), [0] * data.ndim
            shape[axis], offset[axis] = stacked * size, index * size + first
            shards.append(
                ShardedTensor(
                    key,
                    data,
                    data.dtype,
                    tuple(data.shape),
                    (*like.global_shape[:leading], *shape),
                    (*like.global_offset[:leading], *offset),
                    None,  # parts differ in size: there is no regular grid
                    replica_id,
                    leading,
                )
            )
        return shards

    def merge(shards: Sequence[Tensor]) -> Tensor:
        behind = [0, 0] * (weight.ndim - 1 - axis) + [0, part - number]
        return torch.cat([F.pad(shard, behind) for shard in shards], dim=axis)

    return ShardedTensorFactory(sharded.key, weight, build, merge, sharded.replica_id)
