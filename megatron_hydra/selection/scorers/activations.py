"""What a scorer keeps of a run, and how a run is finished from the middle with attention frozen.

Legend: a = answer tokens, b = batch, h = hidden size, k = kept positions, l = layers, n = variants
of a run side by side, r = rows of a variant (positions times pairs), s = sequence, v = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_hydra.errors import UserError
from megatron_hydra.tasks.readout import answer_logits

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from megatron_hydra.selection.scorers.base import PairBatch

MAX_POSITIONS = 16384  # run side by side; 0.6 GB in an MLP of Qwen3-1.7B in 16 bits
MAX_LOGIT_ROWS = 4096  # 2.5 GB at Qwen3's vocabulary in 32 bits
MAX_STREAM_BYTES = 8 * 2**30  # of all variants' residual streams; Qwen3-1.7B's at 4K take 7.0 GiB

Item = TypeVar("Item")


class Activations(NamedTuple):
    """A run, seen at its last k positions."""

    embedding: Tensor
    """[k, b, h], the input of the first layer."""
    head_outputs: list[Tensor]
    """The output projection's input on this rank, [k, b, channels], for each layer."""
    logits: Tensor
    """[b, a, v], at the answer positions only."""


def run_with_activations(
    model: GPTModel, tokens: Tensor, num_answer_tokens: int, num_kept: int | None = None
) -> Activations:
    """Run the model and keep what it computed at the last positions.

    Args:
        model: As for :meth:`~megatron_hydra.selection.scorers.base.Scorer.measure`.
        tokens: [b, s].
        num_answer_tokens: Positions, from the end, whose logits are wanted.
        num_kept: k; None keeps the answer positions.

    Raises:
        UserError: If the model is split in a way that scorers do not know.
    """
    _check_model(model)
    kept = num_kept or num_answer_tokens
    embedding: list[Tensor] = []
    head_outputs: list[Tensor] = []

    def keep_embedding(module: nn.Module, args: tuple, output: Tensor) -> None:
        embedding.append(output[-kept:].clone())

    def keep_heads(module: nn.Module, args: tuple) -> None:
        head_outputs.append(args[0][-kept:].clone())

    hooks = [model.embedding.register_forward_hook(keep_embedding)]
    for layer in model.decoder.layers:
        hooks.append(layer.self_attention.linear_proj.register_forward_pre_hook(keep_heads))
    with removed_after(hooks):
        logits = answer_logits(model, tokens, num_answer_tokens)
    return Activations(embedding[0], head_outputs, logits)


def head_channels(model: GPTModel, head: int) -> slice | None:
    """A head's channels in the output projection's input; None on ranks that do not hold it.

    Megatron's own attention deals heads to tensor-parallel ranks in order, equally many to each.
    """
    config, group = model.config, model.pg_collection.tp
    local = head - group.rank() * (config.num_attention_heads // group.size())
    if not 0 <= local < config.num_attention_heads // group.size():
        return None
    return slice(local * config.kv_channels, (local + 1) * config.kv_channels)


def num_variants_at_once(num_positions: int, num_logit_rows: int) -> int:
    """How many variants of a run fit side by side.

    Args:
        num_positions: Positions of all pairs that one variant runs.
        num_logit_rows: Positions of all pairs whose logits one variant reads.
    """
    return max(1, min(MAX_POSITIONS // num_positions, MAX_LOGIT_ROWS // num_logit_rows))


def waves(variants: Sequence[Item], num_rows: int, embedding: Tensor) -> Iterator[Sequence[Item]]:
    """Cut variants of a run into so many at a time as may hold their residual streams.

    Args:
        variants: In order.
        num_rows: r.
        embedding: Of the streams' hidden size and dtype.
    """
    row_bytes = embedding.shape[-1] * embedding.element_size()
    size = max(1, MAX_STREAM_BYTES // (num_rows * row_bytes))
    for start in range(0, len(variants), size):
        yield variants[start : start + size]


def variants_in(rows: Tensor) -> Iterator[slice]:
    """Slices of the variants [n, r, …] that are run side by side."""
    size = max(1, MAX_POSITIONS // rows.shape[1])
    for start in range(0, rows.shape[0], size):
        yield slice(start, start + size)


def add_patched_runs(
    model: GPTModel,
    index: int,
    clean: Activations,
    corrupt: Activations,
    heads: Sequence[int],
    streams: Tensor,
    num_streams: int,
) -> int:
    """Begin a run for each head of a layer: the clean run with that head's corrupt output.

    The head's change is written by itself: in 16 bits it keeps its digits, as it would not in the
    sum over all heads.

    Args:
        model: As everywhere here.
        index: The layer, from 0.
        clean: Of the pairs, of r rows.
        corrupt: Likewise.
        heads: Heads of the layer, on any rank.
        streams: Residual streams [n, r, h] after the layer's attention, the clean run's first.
        num_streams: How many there are; the new ones come after them.

    Returns:
        How many there are then.
    """
    if not heads:
        return num_streams
    weight = model.decoder.layers[index].self_attention.linear_proj.weight  # [h, channels]
    change = (corrupt.head_outputs[index] - clean.head_outputs[index]).flatten(0, 1)
    own = streams[num_streams : num_streams + len(heads)].zero_()
    for place, head in enumerate(heads):
        channels = head_channels(model, head)
        if channels is not None:
            torch.mm(change[:, channels], weight[:, channels].T, out=own[place])
    sum_over_ranks(model, own).add_(streams[0])
    return num_streams + len(heads)


def sum_over_ranks(model: GPTModel, parts: Tensor) -> Tensor:
    """Sum contiguous ``parts`` over the tensor-parallel ranks, in place."""
    group = model.pg_collection.tp
    if group.size() > 1:
        dist.all_reduce(parts, group=group)
    return parts


def read_out(model: GPTModel, batch: PairBatch, streams: Tensor) -> Tensor:
    """The readout of the last layer's output at the answer positions.

    Args:
        model: As everywhere here.
        batch: The pairs.
        streams: [n, a * b, h].

    Returns:
        Float64 [n, b], on the CPU.
    """
    rows = (batch.num_answer_tokens, batch.num_pairs)
    size = max(1, MAX_LOGIT_ROWS // streams.shape[1])
    return torch.cat(
        [
            batch.measure(read_logits(model, part).unflatten(1, rows).transpose(1, 2))
            for part in streams.split(size)
        ]
    )


def gather_heads(model: GPTModel, local: Tensor) -> Tensor:
    """Values of all heads [..., heads], on the CPU, from those of each rank's heads."""
    group = model.pg_collection.tp
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts, dim=-1).cpu()


def swap_heads(model: GPTModel, clean: Tensor, other: Tensor, heads: Sequence[int]) -> Tensor:
    """A variant of the head outputs [k, b, channels] for each head, its own taken from ``other``.

    Returns:
        [k, n, b, channels].
    """
    variants = clean[:, None].repeat(1, len(heads), 1, 1)
    for variant, head in enumerate(heads):
        channels = head_channels(model, head)
        if channels is not None:
            variants[:, variant, :, channels] = other[:, :, channels]
    return variants


def read_logits(model: GPTModel, hidden: Tensor) -> Tensor:
    """Logits [..., v] of the last layer's output [..., h]; the whole vocabulary on every rank."""
    weight = None
    if model.share_embeddings_and_output_weights:
        weight = model.shared_embedding_or_output_weight()
    hidden = model.decoder.final_layernorm(hidden)
    logits, _ = model.output_layer(hidden, weight=weight, runtime_gather_output=True)
    return logits


def add_mlp(layer: nn.Module, hidden: Tensor) -> Tensor:
    """The residual stream [..., h] after the layer's MLP."""
    return hidden + _with_bias(layer.mlp(layer.pre_mlp_layernorm(hidden)))


def add_mlp_in_place(layer: nn.Module, streams: Tensor) -> None:
    """:func:`add_mlp` on contiguous streams [n, r, h], some rows at a time."""
    if not streams.numel():  # which Transformer Engine's norm does not take
        return
    for rows in streams.flatten(0, 1).split(MAX_POSITIONS):
        rows = rows[:, None]  # Megatron's [s, b, h]
        rows += _with_bias(layer.mlp(layer.pre_mlp_layernorm(rows)))


def project(layer: nn.Module, head_outputs: Tensor) -> Tensor:
    """The attention output [..., h] of head outputs [..., channels]; reduced over the ranks."""
    return _with_bias(layer.self_attention.linear_proj(head_outputs))


@contextmanager
def removed_after(hooks: list) -> Iterator[None]:
    """Remove the hooks when the block ends."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _with_bias(output_and_bias: tuple[Tensor, Tensor | None]) -> Tensor:
    output, bias = output_and_bias
    return output if bias is None else output + bias


def _check_model(model: GPTModel) -> None:
    if not (model.pre_process and model.post_process):
        raise UserError("scoring needs the whole model on one pipeline stage")
    if model.config.sequence_parallel:
        raise UserError("scoring needs sequence_parallel off: it reads the last tokens")
