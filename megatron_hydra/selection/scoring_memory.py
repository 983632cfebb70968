"""What a scoring run needs of a device's memory, from shapes alone, before it starts.

Counted are the weights and, of each scorer, what it keeps of a batch's runs, the residual streams
of the variants that it runs side by side, and the largest of: an MLP's inner activations, the
logits. Only path patching is counted pair by pair, as it runs.

Legend: a = answer tokens, b = pairs of a batch, k = positions from the first differing token on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_hydra.errors import UserError
from megatron_hydra.selection.scorers import activations
from megatron_hydra.tasks.probes import Probe

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

_GIB = 2**30
_RESUMED = (
    "zero_ablation",
    "mean_ablation",
    "window_ablation",
)  # attention runs again: all positions are kept
_AT_THE_ANSWER = ("activation_patching", "attribution_patching")


@dataclass(frozen=True)
class _Sizes:
    """Bytes of a rank's parts."""

    weights: int
    stream: int
    """A position of the residual stream."""
    heads: int
    """A position of a layer's head outputs."""
    mlp: int
    """A position inside an MLP: gate and up, the two factors, the product; and five of the stream:
    the embedding, what came in, that again normed, the residual, what goes out."""
    logits: int
    """A position's logits."""
    wide_logits: int
    """Beside them, where a log-probability is read: in 32 bits, and their exponentials."""
    num_layers: int
    num_heads: int

    @classmethod
    def of(cls, model: GPTModel) -> _Sizes:
        config, tp = model.config, model.pg_collection.tp.size()
        item = config.params_dtype.itemsize
        return cls(
            sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
            config.hidden_size * item,
            config.num_attention_heads * config.kv_channels // tp * item,
            (5 * config.ffn_hidden_size // tp + 5 * config.hidden_size) * item,
            config.vocab_size * item,
            config.vocab_size * (2 * 4 if item < 4 else item),
            config.num_layers,
            config.num_attention_heads,
        )


def scoring_peak_bytes(
    model: GPTModel, probes: Sequence[Probe], scorers: Sequence[str], batch_tokens: int
) -> int:
    """Peak memory of a scoring run on this rank, in bytes.

    Args:
        model: The teacher's part on this rank.
        probes: Sub-probes.
        scorers: Names; those that run no model add nothing.
        batch_tokens: As :class:`~megatron_hydra.selection.scoring_run.ScoringRun`'s.
    """
    sizes = _Sizes.of(model)
    return sizes.weights + max(
        _batch_bytes(sizes, probe, scorer, batch_tokens)
        for probe in probes
        for scorer in ("gaps", *scorers)
    )


def check_memory(peak_bytes: int, device_bytes: int) -> None:
    """Refuse a run that the device cannot hold.

    Raises:
        UserError: If it cannot.
    """
    if peak_bytes > device_bytes:
        raise UserError(
            f"scoring needs about {peak_bytes / _GIB:.1f} GiB of the device's "
            f"{device_bytes / _GIB:.1f}: lower run.batch_tokens or probes.length, take model.dtype "
            "bf16, or raise model.tensor_model_parallel_size"
        )


def _batch_bytes(sizes: _Sizes, probe: Probe, scorer: str, batch_tokens: int) -> int:
    """What a batch of a probe needs beside the weights."""
    num_pairs = min(len(probe.pairs), max(1, batch_tokens // probe.length_tokens))
    num_answers = len(probe.pairs[0].clean.answer)
    length = probe.length_tokens - 1
    positions = num_pairs * length  # of one forward
    answers = num_pairs * num_answers
    variants = sizes.num_layers * sizes.num_heads
    layers = sizes.num_layers
    kept = streams = freed = 0
    rows = min(activations.MAX_POSITIONS, variants * answers)  # of all variants, run side by side
    if scorer == "path_patching":
        positions, answers = length, num_answers
        num_kept = length - min(map(_first_difference, probe.pairs))
        # Clean and corrupt head outputs, and the clean ones projected.
        kept = layers * num_kept * (2 * sizes.heads + sizes.stream)
        streams = variants * answers * sizes.stream
        freed = _streams(sizes, variants, num_kept)  # before logits are read
        rows = min(activations.MAX_POSITIONS, variants * num_kept)
    elif scorer in _AT_THE_ANSWER:
        kept = layers * answers * (2 * sizes.heads + sizes.stream)
        streams = _streams(sizes, variants, answers)
    elif scorer in _RESUMED:
        kept = (1 + (scorer != "zero_ablation")) * layers * positions * sizes.heads
        rows = max(positions, activations.MAX_POSITIONS)
        streams = rows * (sizes.heads + sizes.stream)
    else:
        variants = 1
    rows = max(positions, rows)
    logit_rows = min(max(answers, activations.MAX_LOGIT_ROWS), variants * answers)
    logits = sizes.logits + (probe.readout == "log_probability") * sizes.wide_logits
    return kept + streams + max(freed + rows * sizes.mlp, logit_rows * logits)


def _streams(sizes: _Sizes, variants: int, rows: int) -> int:
    """Residual streams of the variants of a wave and of the clean run."""
    whole = variants * rows * sizes.stream
    return min(whole, max(rows * sizes.stream, activations.MAX_STREAM_BYTES)) + rows * sizes.stream


def _first_difference(pair: tuple) -> int:
    tokens = zip(pair[0].tokens, pair[1].tokens, strict=True)
    return next(index for index, (clean, corrupt) in enumerate(tokens) if clean != corrupt)
