"""Path patching: a head's effect on the answer through other heads that matter (senders).

After Wang et al. (arXiv 2211.00593), as HydraHead (arXiv 2606.20097) uses it: one step back from a
set of targets, at first the receivers that activation patching found, then these and their senders,
until the set is stable. For one sender the teacher runs twice more on the clean prompt:

1. The sender's output is the corrupt run's, at all positions. Attention outputs keep their clean
   value, save those of the targets above the sender, which attend anew to what the sender changed;
   MLPs run. The targets' outputs are noted.
2. The sender is clean again, the targets above it give what was noted, and all other attention
   outputs are clean. The effect is Eq 10 with this run's readout.

So the sender's own way to the logits does not count, and neither do ways past the targets. Targets
hear one another in the first run, hence a sender's sender counts once the sender is a target.

In the second run nothing moves between positions, so that it happens at the answer positions alone.
In the first, what stands before the first differing token cannot change: only what follows is run,
from the sender's layer to the highest target's. Both go through the layers once for all senders of
a pair: each layer adds its own senders' runs to those that it takes over. Of a target's layer only
what its targets read and write is computed; the MLPs are what is left of the work.

Legend: a = answer tokens, d = head dimension, g = query groups of a layer's targets, h = hidden
size, k = positions from the first differing token on, l = layers, n = senders' runs side by side,
s = sequence, t = targets of a layer on this rank.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from megatron_hydra.errors import UserError
from megatron_hydra.selection.combination import NOTABLE_EFFECT
from megatron_hydra.selection.scorers.activation_patching import ActivationPatching
from megatron_hydra.selection.scorers.activations import (
    Activations,
    add_mlp_in_place,
    add_patched_runs,
    head_channels,
    project,
    read_out,
    removed_after,
    run_with_activations,
    sum_over_ranks,
    variants_in,
    waves,
)
from megatron_hydra.selection.scorers.base import Effects, PairBatch, Scorer

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

logger = logging.getLogger(__name__)

Head = tuple[int, int]
"""Layer and head, from 0."""


class PathPatching(Scorer):
    """Finds senders: the heads that feed the heads that matter.

    Args:
        min_effect: A head is a target from this absolute mean effect over pairs on, on any
            sub-probe; by default twice what counts as notable, for each layer with a target makes
            the search slower, and a target of no weight passes nothing on.
        max_rounds: How often the targets are taken anew; the paper has about two.

    Raises:
        UserError: If an argument is out of range.
    """

    name = "path_patching"

    def __init__(self, min_effect: float = 2 * NOTABLE_EFFECT, max_rounds: int = 2) -> None:
        if not min_effect > 0:
            raise UserError(f"path_patching's min_effect is {min_effect}; it must be above 0")
        if max_rounds < 1:
            raise UserError(f"path_patching's max_rounds is {max_rounds}; it must be 1 or more")
        self.min_effect, self.max_rounds = min_effect, max_rounds
        self.targets: frozenset[Head] = frozenset()

    def start_round(self, done: Effects) -> bool:
        """Take the receivers, later also the last round's senders, as targets.

        Raises:
            UserError: If activation patching's effects are missing.
        """
        if self._num_rounds == self.max_rounds:
            return False
        source = self.name if self._num_rounds else ActivationPatching.name
        if not done.get(source):
            raise UserError(
                f"path_patching starts from the receivers that {ActivationPatching.name} finds: "
                f"run {ActivationPatching.name} before it"
            )
        grown = self.targets | _heads_above(done[source].values(), self.min_effect)
        if self._num_rounds and grown == self.targets:
            return False
        self.targets, self._num_rounds = grown, self._num_rounds + 1
        logger.info("path_patching: round %d, %d targets", self._num_rounds, len(grown))
        if not grown:
            logger.warning("no head's effect reaches %g: there are no senders", self.min_effect)
        return True

    @torch.no_grad()
    def measure(self, model: GPTModel, batch: PairBatch) -> Tensor:
        """Patch every path; see :class:`~megatron_hydra.selection.scorers.base.Scorer`.

        Heads with no target above them have effect 0.
        """
        shape = (model.config.num_layers, model.config.num_attention_heads)
        effects = torch.zeros(batch.num_pairs, *shape, dtype=torch.float64)
        if all(layer == 0 for layer, _ in self.targets):
            return effects
        by_layer: dict[int, list[int]] = {}
        for layer, head in sorted(self.targets):
            by_layer.setdefault(layer, []).append(head)
        targets = {index: _targets_of(model, index, heads) for index, heads in by_layer.items()}
        senders = [(index, head) for index in range(max(by_layer)) for head in range(shape[1])]
        # Pair by pair: each has its own first differing token.
        for pair, one in enumerate(batch.one_by_one()):
            effects[pair, : max(by_layer)] = _effects_of(model, one, targets, senders)
        return effects


class _Targets(NamedTuple):
    """A layer's targets on this rank, and the weights that they read and write with."""

    heads: list[int]
    """t heads of the layer."""
    groups: Tensor
    """Their query groups [g] as this rank counts them in the core attention's input."""
    group_of: Tensor
    """For each target, the place of its group in :attr:`groups` [t]."""
    read: Tensor
    """Rows of the in-projection, queries, keys, values: [(t + 2g) * d, h]."""
    read_bias: Tensor | None
    """Their biases [(t + 2g) * d]."""
    write: Tensor
    """Columns of the output projection [h, t * d]."""


class _Runs(NamedTuple):
    """What all senders of a pair share; activations are of the last k positions."""

    clean: Activations
    corrupt: Activations
    attention: list[Tensor]
    """Each layer's clean attention output after the projection, [k, h]."""
    targets: dict[int, _Targets]
    """Layer -> targets."""
    before: dict[int, tuple[Tensor, Tensor]]
    """Layer -> the targets' keys and values of the earlier positions, [s - k, g, d]."""
    rotary: Tensor
    """RoPE's angles [1, k, 1, d]."""
    num_answers: int
    """a."""


def _heads_above(effects: Iterable[Tensor], least: float) -> set[Head]:
    """Heads whose mean effect over pairs is ``least`` or more, either sign, on any sub-probe."""
    large = torch.stack([values.mean(dim=0).abs() >= least for values in effects]).any(dim=0)
    return {(layer, head) for layer, head in large.nonzero().tolist()}


def _targets_of(model: GPTModel, index: int, heads: Sequence[int]) -> _Targets:
    config, tp = model.config, model.pg_collection.tp
    attention = model.decoder.layers[index].self_attention
    weight, bias = (_of_all_ranks(model, x) for x in _weight_and_bias(attention.linear_qkv))
    heads = [head for head in heads if head_channels(model, head) is not None]
    share = config.num_attention_heads // config.num_query_groups
    groups = sorted({head // share for head in heads})

    def rows_of(joined: Tensor) -> Tensor:
        """Of the heads' queries, then the groups' keys, then their values."""
        # Group by group: the queries of its heads, its key, its value.
        rows = joined.unflatten(0, (config.num_query_groups, share + 2, config.kv_channels))
        parts = [rows[head // share, head % share] for head in heads]
        parts += [rows[group, place] for place in (share, share + 1) for group in groups]
        return torch.cat(parts) if parts else joined[:0]

    output = attention.linear_proj.weight
    write = [output[:, head_channels(model, head)] for head in heads]
    first_group = tp.rank() * (config.num_attention_heads // tp.size()) // share
    # On the device from here on: an index list would make the host wait at each use.
    place = partial(torch.tensor, dtype=torch.long, device=weight.device)
    return _Targets(
        heads,
        place([group - first_group for group in groups]),
        place([groups.index(head // share) for head in heads]),
        rows_of(weight),
        None if bias is None else rows_of(bias),
        torch.cat(write, dim=1) if heads else output[:, :0],
    )


def _weight_and_bias(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Transformer Engine has an empty tensor for no bias."""
    bias = linear.bias
    return linear.weight, None if bias is None or not bias.numel() else bias


def _of_all_ranks(model: GPTModel, rows: Tensor | None) -> Tensor | None:
    """Where ranks share a query group, its rows lie on several of them."""
    tp = model.pg_collection.tp
    if rows is None or tp.size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(tp.size())]
    dist.all_gather(parts, rows.detach().contiguous(), group=tp)
    return torch.cat(parts)


def _effects_of(
    model: GPTModel, pair: PairBatch, targets: dict[int, _Targets], senders: Sequence[Head]
) -> Tensor:
    """Effects of all heads of the layers below the highest target's, [layers, heads]."""
    runs = _run_both(model, pair, targets)
    embedding = runs.clean.embedding
    values = torch.cat(
        [
            read_out(model, pair, _send(model, runs, wave))
            for wave in waves(senders, embedding.shape[0], embedding)
        ]
    )
    effects = pair.effects(pair.measure(runs.clean.logits), values)
    return effects.view(-1, model.config.num_attention_heads)


def _run_both(model: GPTModel, pair: PairBatch, targets: dict[int, _Targets]) -> _Runs:
    differs = (pair.clean != pair.corrupt)[0].nonzero()
    assert differs.numel(), "a pair with a gap differs somewhere"
    length, start = pair.clean.shape[1], int(differs[0])
    before: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(index: int, module: nn.Module, args: tuple) -> None:
        groups = targets[index].groups
        before[index] = (args[1][:start, 0, groups], args[2][:start, 0, groups])

    hooks = [
        model.decoder.layers[index].self_attention.core_attention.register_forward_pre_hook(
            lambda module, args, index=index: keep(index, module, args)
        )
        for index in targets
    ]
    num_answers = pair.num_answer_tokens
    with removed_after(hooks):
        clean = run_with_activations(model, pair.clean, num_answers, length - start)
    corrupt = run_with_activations(model, pair.corrupt, num_answers, length - start)
    attention = [
        project(layer, outputs)[:, 0]
        for layer, outputs in zip(model.decoder.layers, clean.head_outputs, strict=True)
    ]
    rotary = model.rotary_pos_emb(length)[start:].transpose(0, 1)
    return _Runs(clean, corrupt, attention, targets, before, rotary, num_answers)


def _send(model: GPTModel, runs: _Runs, senders: Sequence[Head]) -> Tensor:
    """The last layer's output at the answer positions in each sender's second run.

    Args:
        model: As everywhere here.
        runs: Of the pair.
        senders: In ascending order, each below some target.

    Returns:
        [n, a, h].
    """
    highest, num_answers = max(runs.targets), runs.num_answers
    embedding = runs.clean.embedding[:, 0]
    # First runs, the clean run above them, and second runs: residual streams.
    first = embedding.new_empty(1 + len(senders), *embedding.shape)
    second = embedding.new_empty(len(senders), num_answers, embedding.shape[1])
    first[0], num_first = embedding, 1
    for index, layer in enumerate(model.decoder.layers):
        attention = runs.attention[index]
        heard = second[: num_first - 1]
        if index in runs.targets and num_first > 1:
            _hear(model, runs, index, first[1:num_first], heard)
        heard += attention[-num_answers:]
        if index < highest:
            first[:num_first] += attention
            heads = [head for of_layer, head in senders if of_layer == index]
            num_before, num_first = (
                num_first,
                add_patched_runs(model, index, runs.clean, runs.corrupt, heads, first, num_first),
            )
            second[num_before - 1 : num_first - 1] = first[0, -num_answers:]
            add_mlp_in_place(layer, first[:num_first])
        add_mlp_in_place(layer, second[: num_first - 1])
    return second


def _hear(model: GPTModel, runs: _Runs, index: int, first: Tensor, second: Tensor) -> None:
    """Add to the streams before a layer what its targets give otherwise than in the clean run.

    Args:
        model: As everywhere here.
        runs: Of the pair.
        index: The targets' layer.
        first: The first runs [n, k, h].
        second: The second runs [n, a, h].
    """
    targets, is_highest = runs.targets[index], index == max(runs.targets)
    # Nobody attends to the highest target, so that its answer positions are enough.
    num_queries = runs.num_answers if is_highest else first.shape[1]
    clean = [
        runs.clean.head_outputs[index][-num_queries:, 0, head_channels(model, head)]
        for head in targets.heads
    ]
    clean = torch.stack(clean, dim=1) if clean else None  # [num_queries, t, d]
    for part in variants_in(first):
        if clean is None:
            written = torch.zeros_like(first[part, -num_queries:])
        else:
            change = _attend_anew(model, runs, index, first[part], num_queries) - clean
            written = F.linear(change.flatten(2), targets.write)
        sum_over_ranks(model, written)
        second[part] += written[:, -runs.num_answers :]
        if not is_highest:
            first[part] += written


def _attend_anew(
    model: GPTModel, runs: _Runs, index: int, hidden: Tensor, num_queries: int
) -> Tensor:
    """Outputs of a layer's targets at the last ``num_queries`` positions.

    Args:
        model: As everywhere here.
        runs: Of the pair.
        index: The layer.
        hidden: The layer's input [n, k, h].
        num_queries: At most k.

    Returns:
        [n, num_queries, t, d].
    """
    layer, config, targets = model.decoder.layers[index], model.config, runs.targets[index]
    sizes = (len(targets.heads), len(targets.groups), len(targets.groups))
    read = F.linear(_normed(layer, hidden), targets.read, targets.read_bias)
    query, key, value = read.unflatten(-1, (-1, config.kv_channels)).split(sizes, dim=2)
    attention = layer.self_attention

    def rotated(x: Tensor, rotary: Tensor) -> Tensor:
        return apply_rotary_pos_emb(x, rotary, config=config, cp_group=model.pg_collection.cp)

    def with_earlier(earlier: Tensor, later: Tensor) -> Tensor:
        earlier = earlier.expand(len(later), -1, -1, -1)
        return torch.cat((earlier, later), dim=1)[:, :, targets.group_of].transpose(1, 2)

    query = attention.q_layernorm(query[:, -num_queries:].contiguous())
    key = rotated(attention.k_layernorm(key.contiguous()), runs.rotary)
    keys = with_earlier(runs.before[index][0], key)
    outputs = F.scaled_dot_product_attention(
        rotated(query, runs.rotary[:, -num_queries:]).transpose(1, 2),
        keys,
        with_earlier(runs.before[index][1], value),
        attn_mask=causal_lower_right(num_queries, keys.shape[2]),
        scale=config.softmax_scale,
    )  # [n, t, num_queries, d]
    return outputs.transpose(1, 2)


def _normed(layer: nn.Module, hidden: Tensor) -> Tensor:
    """The attention's input; Transformer Engine keeps its norm in the in-projection's module."""
    weight = getattr(layer.self_attention.linear_qkv, "layer_norm_weight", None)
    if weight is None:
        return layer.input_layernorm(hidden)
    return F.rms_norm(hidden, weight.shape, weight, layer.config.layernorm_epsilon)
