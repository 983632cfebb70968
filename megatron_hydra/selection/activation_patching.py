"""Activation patching: a head's direct effect on the answer, downstream attention frozen (Eq 9-11).

For each pair the teacher runs twice, on the clean and on the corrupt prompt. Then one head's output
(before the output projection) is replaced in the clean run by the corrupt run's, while every later
layer's attention keeps its clean output. What the head itself writes for the answer counts; what
later heads make of it does not, so a head whose output is only read by another head gets nothing.

With attention frozen nothing moves between positions any more: the patch at one position reaches
the logits of that position alone, through residual stream and MLPs. So patching a head at all
positions and patching it where the answer is predicted are the same, and all that follows the two
full runs happens at the answer positions, from the patched layer upwards.

Legend: a = answer tokens, b = pairs, h = hidden size, n = heads patched at once, v = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from megatron_hydra.errors import UserError
from megatron_hydra.selection.readout import answer_logits, readout, teacher_forced
from megatron_hydra.selection.scorer import (
    Probe,
    ProbeEffects,
    Progress,
    ScorerResult,
    no_progress,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron.core.models.gpt import GPTModel

MIN_GAP_LOGITS = 1.0
"""Default for the smallest clean-corrupt difference of the readout that a pair must show: below,
the model hardly tells the two answers apart and the effect is a quotient of noise."""
_MAX_TOKENS = 8192  # of the full runs held at once
_MAX_PATCHED_POSITIONS = 4096  # rows of logits held at once; 2.5 GB at Qwen3's vocabulary


class AnswerActivations(NamedTuple):
    """A run, seen at the answer positions only."""

    embedding: Tensor
    """[a, b, h], the input of the first layer."""
    head_outputs: list[Tensor]
    """The output projection's input on this rank, [a, b, channels], for each layer."""
    logits: Tensor
    """[b, a, v]."""

    def of_pairs(self, pairs: Sequence[int]) -> AnswerActivations:
        """The same run with some of its pairs."""
        index = torch.tensor(pairs)
        heads = [output[:, index] for output in self.head_outputs]
        return AnswerActivations(self.embedding[:, index], heads, self.logits[index])


class ActivationPatching:
    """Finds receivers: the heads that write the answer.

    Args:
        min_gap: Pairs whose readout differs by less between the clean and the corrupt run, in
            logits, are dropped and counted.
    """

    name = "activation_patching"

    def __init__(self, min_gap: float = MIN_GAP_LOGITS) -> None:
        if min_gap <= 0:
            raise UserError(f"the smallest clean-corrupt gap is {min_gap}; it must be above 0")
        self.min_gap = min_gap

    @torch.no_grad()
    def score(
        self, model: GPTModel, probes: Sequence[Probe], progress: Progress = no_progress
    ) -> ScorerResult:
        """Measure every head; see :class:`~megatron_hydra.selection.scorer.Scorer`.

        Both runs are teacher-forced with the clean answer, so that their inputs differ in the
        needle alone.

        Raises:
            UserError: If a forward gives NaN or infinity, or the model answers no pair of a probe.
        """
        _check_model(model)
        return ScorerResult(
            self.name, tuple(self._score_probe(model, probe, progress) for probe in probes)
        )

    def _score_probe(self, model: GPTModel, probe: Probe, progress: Progress) -> ProbeEffects:
        right_answers = [pair.clean.answer for pair in probe.pairs]
        tokens, right = teacher_forced([pair.clean for pair in probe.pairs])
        corrupt_tokens, _ = teacher_forced([pair.corrupt for pair in probe.pairs], right_answers)
        wrong = torch.tensor([pair.corrupt.answer for pair in probe.pairs])
        both = _run_in_batches(
            model, torch.cat((tokens, corrupt_tokens)), right.shape[1], probe.name, progress
        )
        num_pairs = len(probe.pairs)
        clean = both.of_pairs(range(num_pairs))
        corrupt = both.of_pairs(range(num_pairs, 2 * num_pairs))

        gaps = readout(clean.logits, right, wrong) - readout(corrupt.logits, right, wrong)
        kept = self._kept_pairs(gaps, probe)
        right, wrong = right[kept], wrong[kept]
        patched = _patched_readouts(
            model, clean.of_pairs(kept), corrupt.of_pairs(kept), right, wrong, probe.name, progress
        )
        reference = readout(clean.logits[kept], right, wrong)
        effects = (reference - patched) / gaps[kept]  # [layers, heads, b]
        return ProbeEffects(probe, effects.permute(2, 0, 1).cpu(), tuple(kept))

    def _kept_pairs(self, gaps: Tensor, probe: Probe) -> list[int]:
        if not gaps.isfinite().all():
            raise UserError(f"the model's logits on probe {probe.name!r} are not finite")
        kept = (gaps >= self.min_gap).nonzero().flatten().tolist()
        if not kept:
            raise UserError(
                f"probe {probe.name!r} says nothing about this model: of {len(gaps)} pairs the "
                f"largest clean-corrupt gap is {gaps.max():.3g} logits, and {self.min_gap:g} is "
                "the least that counts; leave the probe out or use a teacher that retrieves"
            )
        return kept


def run_with_answer_activations(
    model: GPTModel, tokens: Tensor, num_answer_tokens: int
) -> AnswerActivations:
    """Run the model and keep what it computed at the last positions.

    Args:
        model: In evaluation mode, on one pipeline stage, without sequence parallel.
        tokens: [b, s].
        num_answer_tokens: How many positions, from the end.
    """
    embedding: list[Tensor] = []
    head_outputs: list[Tensor] = []

    def keep_embedding(module: nn.Module, args: tuple, output: Tensor) -> None:
        embedding.append(output[-num_answer_tokens:].clone())

    def keep_heads(module: nn.Module, args: tuple) -> None:
        head_outputs.append(args[0][-num_answer_tokens:].clone())

    hooks = [model.embedding.register_forward_hook(keep_embedding)]
    for layer in model.decoder.layers:
        hooks.append(layer.self_attention.linear_proj.register_forward_pre_hook(keep_heads))
    with _removed_after(hooks):
        logits = answer_logits(model, tokens, num_answer_tokens)
    return AnswerActivations(embedding[0], head_outputs, logits)


def _run_in_batches(
    model: GPTModel, tokens: Tensor, num_answer_tokens: int, name: str, progress: Progress
) -> AnswerActivations:
    """:func:`run_with_answer_activations` for more sequences than fit at once."""
    batches = tokens.split(max(1, _MAX_TOKENS // tokens.shape[1]))
    runs = [
        run_with_answer_activations(model, batch, num_answer_tokens)
        for batch in progress(batches, f"run {name}", "batch")
    ]
    by_layer = zip(*(run.head_outputs for run in runs), strict=True)
    return AnswerActivations(
        torch.cat([run.embedding for run in runs], dim=1),
        [torch.cat(outputs, dim=1) for outputs in by_layer],
        torch.cat([run.logits for run in runs]),
    )


def head_channels(model: GPTModel, head: int) -> slice | None:
    """A head's channels in the output projection's input; None on ranks that do not hold it.

    Megatron's own attention deals heads to tensor-parallel ranks in order, equally many to each.
    """
    config, group = model.config, model.pg_collection.tp
    local = head - group.rank() * (config.num_attention_heads // group.size())
    if not 0 <= local < config.num_attention_heads // group.size():
        return None
    return slice(local * config.kv_channels, (local + 1) * config.kv_channels)


def _patched_readouts(
    model: GPTModel,
    clean: AnswerActivations,
    corrupt: AnswerActivations,
    right: Tensor,
    wrong: Tensor,
    name: str,
    progress: Progress,
) -> Tensor:
    """The readout m(x; O_lh <- O_lh(x')) of every head, [layers, heads, b] in float64."""
    layers, num_heads = model.decoder.layers, model.config.num_attention_heads
    frozen = [_project(layer, x) for layer, x in zip(layers, clean.head_outputs, strict=True)]
    at_once = max(1, _MAX_PATCHED_POSITIONS // right.numel())
    residual = clean.embedding
    rows = []
    for index in progress(range(len(layers)), f"patch {name}", "layer"):
        row = []
        for heads in torch.arange(num_heads).split(at_once):
            outputs = _swap_heads(
                model, clean.head_outputs[index], corrupt.head_outputs[index], heads.tolist()
            )
            patched = residual[:, None] + _project(layers[index], outputs)  # [a, n, b, h]
            logits = _finish_run(model, patched, index, frozen)
            row.append(readout(logits.permute(1, 2, 0, 3), right, wrong))
        rows.append(torch.cat(row))
        residual = _add_mlp(layers[index], residual + frozen[index])
    return torch.stack(rows)


def _swap_heads(model: GPTModel, clean: Tensor, corrupt: Tensor, heads: Sequence[int]) -> Tensor:
    """A variant of the clean head outputs for each head, its own swapped: [a, n, b, channels]."""
    variants = clean[:, None].repeat(1, len(heads), 1, 1)
    for variant, head in enumerate(heads):
        channels = head_channels(model, head)
        if channels is not None:
            variants[:, variant, :, channels] = corrupt[:, :, channels]
    return variants


def _finish_run(model: GPTModel, hidden: Tensor, index: int, frozen: list[Tensor]) -> Tensor:
    """From the residual stream after layer ``index``'s attention, [a, n, b, h], to the logits."""
    layers = model.decoder.layers
    hidden = _add_mlp(layers[index], hidden)
    for layer, attention_output in zip(layers[index + 1 :], frozen[index + 1 :], strict=True):
        hidden = _add_mlp(layer, hidden + attention_output[:, None])
    weight = None
    if model.share_embeddings_and_output_weights:
        weight = model.shared_embedding_or_output_weight()
    hidden = model.decoder.final_layernorm(hidden)
    logits, _ = model.output_layer(hidden, weight=weight, runtime_gather_output=True)
    return logits


def _add_mlp(layer: nn.Module, hidden: Tensor) -> Tensor:
    return hidden + _with_bias(layer.mlp(layer.pre_mlp_layernorm(hidden)))


def _project(layer: nn.Module, head_outputs: Tensor) -> Tensor:
    return _with_bias(layer.self_attention.linear_proj(head_outputs))


def _with_bias(output_and_bias: tuple[Tensor, Tensor | None]) -> Tensor:
    output, bias = output_and_bias
    return output if bias is None else output + bias


def _check_model(model: GPTModel) -> None:
    if not (model.pre_process and model.post_process):
        raise UserError("activation patching needs the whole model on one pipeline stage")
    if model.config.sequence_parallel:
        raise UserError("activation patching needs sequence_parallel off: it reads the last tokens")


@contextmanager
def _removed_after(hooks: list) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
