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
from the sender's layer to the highest target's, for many senders at once.

Legend: a = answer tokens, b = pairs, d = head dimension, h = hidden size, k = positions from the
first differing token on, l = layers, n = senders patched at once, s = sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from megatron_hydra.errors import UserError
from megatron_hydra.selection.activation_patching import ActivationPatching
from megatron_hydra.selection.activations import (
    Activations,
    add_mlp,
    finish_run,
    head_channels,
    num_variants_at_once,
    project,
    removed_after,
    run_with_activations,
    swap_heads,
)
from megatron_hydra.selection.combination import NOTABLE_EFFECT
from megatron_hydra.selection.probes import Probe
from megatron_hydra.selection.scorer import Effects, PairBatch

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

logger = logging.getLogger(__name__)

Head = tuple[int, int]
"""Layer and head, from 0."""


class PathPatching:
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
        self._num_rounds = 0

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

    def accepts(self, probe: Probe) -> bool:
        """Every probe."""
        return True

    @torch.no_grad()
    def measure(self, model: GPTModel, batch: PairBatch) -> Tensor:
        """Patch every path; see :class:`~megatron_hydra.selection.scorer.Scorer`.

        Heads with no target above them have effect 0.
        """
        num_heads = model.config.num_attention_heads
        effects = torch.zeros(
            batch.num_pairs, model.config.num_layers, num_heads, dtype=torch.float64
        )
        if not self.targets:
            return effects
        by_layer: dict[int, list[int]] = {}
        for layer, head in sorted(self.targets):
            by_layer.setdefault(layer, []).append(head)
        runs = _run_both(model, batch, by_layer)
        reference = batch.measure(runs.clean.logits)
        residual = runs.clean.embedding[:, None]  # [k, 1, b, h], before the layer's attention
        at_once = num_variants_at_once(residual[..., 0].numel(), batch.right.numel())
        for index in range(max(by_layer)):
            after = residual + runs.attention[index]
            for start in range(0, num_heads, at_once):
                senders = range(start, min(start + at_once, num_heads))
                outputs = swap_heads(
                    model, runs.clean.head_outputs[index], runs.corrupt.head_outputs[index], senders
                )
                changed = residual + project(model.decoder.layers[index], outputs)
                heard = _hear(model, runs, by_layer, index, changed)
                logits = finish_run(model, after[-runs.num_answers :], index, heard)
                values = batch.measure(logits.permute(1, 2, 0, 3))
                effects[:, index, list(senders)] = batch.effects(reference, values).T
            residual = add_mlp(model.decoder.layers[index], after)
        return effects


class _Runs(NamedTuple):
    """What all senders share; activations are of the last k positions."""

    clean: Activations
    corrupt: Activations
    attention: list[Tensor]
    """Each layer's clean attention output after the projection, [k, 1, b, h]."""
    before: dict[int, tuple[Tensor, Tensor]]
    """Target layer -> keys and values of the earlier positions, [s - k, b, groups, d]."""
    rotary: Tensor
    """RoPE's angles [k, 1, 1, d]."""
    num_answers: int
    """a."""


def _heads_above(effects: Iterable[Tensor], least: float) -> set[Head]:
    """Heads whose mean effect over pairs is ``least`` or more, either sign, on any sub-probe."""
    large = torch.stack([values.mean(dim=0).abs() >= least for values in effects]).any(dim=0)
    return {(layer, head) for layer, head in large.nonzero().tolist()}


def _run_both(model: GPTModel, batch: PairBatch, targets: dict[int, list[int]]) -> _Runs:
    differs = (batch.clean != batch.corrupt).any(dim=0).nonzero()
    assert differs.numel(), "a pair with a gap differs somewhere"
    length, start = batch.clean.shape[1], int(differs[0])
    before: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(index: int, module: nn.Module, args: tuple) -> None:
        before[index] = (args[1][:start].clone(), args[2][:start].clone())

    hooks = [
        model.decoder.layers[index].self_attention.core_attention.register_forward_pre_hook(
            lambda module, args, index=index: keep(index, module, args)
        )
        for index in targets
    ]
    num_answers = batch.num_answer_tokens
    with removed_after(hooks):
        clean = run_with_activations(model, batch.clean, num_answers, length - start)
    corrupt = run_with_activations(model, batch.corrupt, num_answers, length - start)
    attention = [
        project(layer, outputs)[:, None]
        for layer, outputs in zip(model.decoder.layers, clean.head_outputs, strict=True)
    ]
    rotary = model.rotary_pos_emb(length)[start:]
    return _Runs(clean, corrupt, attention, before, rotary, num_answers)


def _hear(
    model: GPTModel, runs: _Runs, targets: dict[int, list[int]], index: int, hidden: Tensor
) -> list[Tensor]:
    """Each layer's attention output at the answer positions when the targets hear the senders.

    Args:
        model: As everywhere here.
        runs: The clean run.
        targets: Layer -> heads.
        index: The senders' layer.
        hidden: Residual stream after its attention, [k, n, b, h].

    Returns:
        [a, n, b, h] in layers with targets above the senders, elsewhere the clean [a, 1, b, h].
    """
    layers, highest = model.decoder.layers, max(targets)
    heard = [output[-runs.num_answers :] for output in runs.attention]
    for above in range(index + 1, highest + 1):
        hidden = add_mlp(layers[above - 1], hidden)
        if above not in targets:
            hidden = hidden + runs.attention[above]
            continue
        # Nobody attends to the highest target, so that its answer positions are enough.
        num_queries = runs.num_answers if above == highest else hidden.shape[0]
        outputs = _attend_anew(model, runs, above, targets[above], hidden, num_queries)
        output = project(layers[above], outputs)
        heard[above] = output[-runs.num_answers :]
        if above < highest:
            hidden = hidden + output
    return heard


def _attend_anew(
    model: GPTModel, runs: _Runs, index: int, targets: list[int], hidden: Tensor, num_queries: int
) -> Tensor:
    """Head outputs of a layer at the last ``num_queries`` positions, targets live, others clean.

    Args:
        model: As everywhere here.
        runs: The clean run.
        index: The layer.
        targets: Heads of the layer, on any rank.
        hidden: The layer's input, [k, n, b, h].
        num_queries: At most k.

    Returns:
        [num_queries, n, b, channels].
    """
    layer, config = model.decoder.layers[index], model.config
    attention = layer.self_attention
    num_variants, num_pairs = hidden.shape[1:3]
    # On every rank: Megatron gathers keys here where ranks share a query group.
    query, key, value = attention.get_query_key_value_tensors(
        layer.input_layernorm(hidden.flatten(1, 2))
    )
    outputs = runs.clean.head_outputs[index][-num_queries:, None].repeat(1, num_variants, 1, 1)
    channels = [part for head in targets if (part := head_channels(model, head)) is not None]
    if not channels:
        return outputs
    heads = [part.start // config.kv_channels for part in channels]
    share = attention.num_attention_heads_per_partition // attention.num_query_groups_per_partition
    groups = [head // share for head in heads]

    def with_earlier(earlier: Tensor, later: Tensor) -> Tensor:
        earlier = earlier[:, None, :, groups].expand(-1, num_variants, -1, -1, -1)
        return torch.cat((earlier.flatten(1, 2), later[:, :, groups])).permute(1, 2, 0, 3)

    def rotated(x: Tensor, rotary: Tensor) -> Tensor:
        return apply_rotary_pos_emb(x, rotary, config=config, cp_group=model.pg_collection.cp)

    query = rotated(query[-num_queries:, :, heads], runs.rotary[-num_queries:])
    keys = with_earlier(runs.before[index][0], rotated(key, runs.rotary))
    values = with_earlier(runs.before[index][1], value)
    live = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        keys,
        values,
        attn_mask=causal_lower_right(num_queries, keys.shape[2]),
        scale=config.softmax_scale,
    )  # [n * b, targets, num_queries, d]
    live = live.permute(2, 0, 1, 3).unflatten(1, (num_variants, num_pairs))
    for position, part in enumerate(channels):
        outputs[..., part] = live[..., position, :]
    return outputs
