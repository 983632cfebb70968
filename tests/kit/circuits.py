"""Transformers wired by hand, random teachers, their probes, and plain forwards as the oracle.

In a wired model tokens are embedded by what they are, and nothing happens but what its wired heads
do: they attend from one kind of token to another and copy digits from channels to channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megatron_hydra.model.build import build_model
from megatron_hydra.model.config import HydraConfig
from megatron_hydra.selection.scorers.activations import removed_after
from megatron_hydra.selection.scorers.base import PairBatch, Scorer, collate
from megatron_hydra.tasks.needles import CounterfactualPair, Sample
from megatron_hydra.tasks.probes import Probe, Readout
from megatron_hydra.teachers.loading import megatron_fields

# Vocabulary: the digits 0 to 9, a question mark, filler, a mark before the question.
QUESTION, FILLER, MARK, VOCAB = 10, 11, 12, 16
# Channels of the residual stream.
VALUE = range(0, 10)  # which digit
IS_DIGIT, IS_QUESTION, IS_FILLER, IS_MARK = 10, 11, 12, 13
CARRIED = range(16, 26)  # a digit that a head brought here
ANSWER = range(26, 36)  # read by the output layer
MARKED = range(36, 46)  # a digit that a head brought to the mark
HIDDEN, HEAD_DIM, NUM_HEADS = 48, 16, 4
_SLOWEST = HEAD_DIM - 1  # the head channel that RoPE turns least: not at all at a huge base
_LENGTH = 12

Place = tuple[int, int]
"""Layer and head."""
Change = Callable[[int, Tensor], Tensor]
"""Maps a layer's number and its head outputs [s, b, channels] to what is used instead."""


def random_teacher(
    seed: int = 0, dtype: torch.dtype = torch.float64, **fields: object
) -> nn.Module:
    """A teacher of four heads in two groups, its weights drawn so that every head matters.

    It is the same model whatever the tensor-parallel size.
    """
    shape = dict(
        num_layers=2, hidden_size=HIDDEN, ffn_hidden_size=64, num_attention_heads=NUM_HEADS,
        num_query_groups=2, kv_channels=HEAD_DIM, vocab_size=VOCAB, rotary_base=1e4,
    )  # fmt: skip
    model = build_model(
        HydraConfig(**{**megatron_fields(), "qk_layernorm": True, **shape, **fields}), None
    )
    generator = torch.Generator().manual_seed(seed)
    group = model.pg_collection.tp
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            split = getattr(parameter, "tensor_model_parallel", False) and parameter.partition_dim
            shape = list(parameter.shape)
            if split is not False:
                shape[split] *= group.size()
            noise = torch.randn(shape, generator=generator)
            whole = noise * shape[1] ** -0.5 if len(shape) == 2 else 1 + 0.2 * noise
            if split is not False:  # an MLP's gate and up projection are dealt to ranks apart
                parts = whole.chunk(2 if "linear_fc1" in name else 1, split)
                whole = torch.cat(
                    [x.chunk(group.size(), split)[group.rank()] for x in parts], split
                )
            parameter.copy_(whole)
    return model.to(dtype).eval()


@torch.no_grad()
def blank_model(num_layers: int = 2) -> nn.Module:
    """Tokens are embedded by what they are, the answer channels are read out, nothing else."""
    model = random_teacher(dtype=torch.float32, num_layers=num_layers, rotary_base=1e12)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if "norm" in name else 0.0)
    embedding = model.embedding.word_embeddings.weight
    for digit in range(10):
        embedding[digit, VALUE[digit]] = embedding[digit, IS_DIGIT] = 1.0
        model.output_layer.weight[digit, ANSWER[digit]] = 5.0
    embedding[QUESTION, IS_QUESTION] = embedding[MARK, IS_MARK] = embedding[FILLER, IS_FILLER] = 1.0
    return model


@torch.no_grad()
def wire(
    model: nn.Module,
    place: Place,
    *,
    query: int = IS_QUESTION,
    key: int,
    reads: range,
    writes: range | None,
) -> None:
    """Let a head attend from tokens with channel ``query`` to those with ``key``, and copy a digit.

    Elsewhere the head attends to everything alike. Heads of one group share key and reads.
    """
    layer, head = place
    attention = model.decoder.layers[layer].self_attention
    rows = attention.linear_qkv.weight.view(2, 4, HEAD_DIM, HIDDEN)  # [group, q q k v, d, h]
    group, position = divmod(head, 2)
    rows[group, position, _SLOWEST, query] = 1.0
    rows[group, 2, _SLOWEST, key] = 1.0
    for channel, source in enumerate(reads):
        rows[group, 3, channel, source] = 1.0
    for norm in (attention.q_layernorm, attention.k_layernorm):
        norm.weight.fill_(4.0)  # sharpens: the wanted token gets e^64 of the others' weight
    for channel, target in enumerate(writes or ()):
        attention.linear_proj.weight[target, head * HEAD_DIM + channel] = 1.0


def digit_sample(digit: int | None, answer: int, position: int = 3) -> Sample:
    """Filler with a digit (or none) somewhere, a mark and a question; the digit is the answer."""
    tokens = [FILLER] * (_LENGTH - 2) + [MARK, QUESTION]
    if digit is not None:
        tokens[position] = digit
    return Sample(tokens, [answer], (position,))


def digit_probe() -> Probe:
    """Three pairs; the digit stands elsewhere in each."""
    pairs = [
        CounterfactualPair(digit_sample(a, a, position), digit_sample(b, b, position))
        for a, b, position in ((1, 7, 1), (2, 3, 4), (9, 0, 9))
    ]
    return Probe("digit", "retrieval", pairs, _LENGTH + 1, 0)


def random_probe(
    num_pairs: int = 3,
    length: int = 11,
    num_answer_tokens: int = 3,
    readout: Readout = "logit_difference",
) -> Probe:
    """Random tokens; each pair's prompts differ in a span that stands elsewhere in each pair."""
    generator = torch.Generator().manual_seed(5)
    pairs = []
    for number in range(num_pairs):
        tokens = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        answer = torch.randint(0, VOCAB, (num_answer_tokens,), generator=generator).tolist()
        other = [(token + 5) % VOCAB for token in answer]
        start = 2 + number
        span = tuple(range(start, start + num_answer_tokens))
        prompts = [[*tokens[:start], *x, *tokens[span[-1] + 1 :]] for x in (answer, other)]
        twin = answer if readout == "log_probability" else other
        pairs.append(
            CounterfactualPair(Sample(prompts[0], answer, span), Sample(prompts[1], twin, span))
        )
    return Probe("random", "retrieval", pairs, length + num_answer_tokens, 5, readout)


def measure(scorer: Scorer, model: nn.Module, probe: Probe) -> Tensor:
    """A scorer's effects on all pairs of a probe in one batch, [b, l, n]."""
    batch = batch_with_gaps(model, probe)
    assert scorer.accepts(probe)
    return scorer.measure(model, batch)


def batch_with_gaps(model: nn.Module, probe: Probe) -> PairBatch:
    """All pairs of a probe; their gaps by plain runs, whichever sign they have."""
    pairs = range(len(probe.pairs))
    batch = collate(probe, pairs)
    clean, corrupt = (
        [plain_readout(model, batch, pair, tokens) for pair in pairs]
        for tokens in (batch.clean, batch.corrupt)
    )
    return collate(probe, pairs, [ours - theirs for ours, theirs in zip(clean, corrupt)])


@torch.no_grad()
def plain_run(
    model: nn.Module, tokens: Sequence[int], change: Change | None = None
) -> tuple[Tensor, list[Tensor]]:
    """One whole forward of one sequence: logits [s, v] and each layer's head outputs as used."""
    used: list[Tensor] = []

    def replace(module: nn.Module, args: tuple) -> tuple:
        outputs = args[0] if change is None else change(len(used), args[0].clone())
        used.append(outputs.clone())
        return (outputs,)

    hooks = [
        layer.self_attention.linear_proj.register_forward_pre_hook(replace)
        for layer in model.decoder.layers
    ]
    row = torch.tensor([list(tokens)], device=next(model.parameters()).device)
    positions = torch.arange(row.shape[1], device=row.device)[None]
    with removed_after(hooks):
        logits = model(row, positions, None)
    return logits[0], used


def plain_readout(
    model: nn.Module, batch: PairBatch, pair: int, tokens: Tensor, change: Change | None = None
) -> float:
    """m of one pair's whole forward on ``tokens[pair]``, written out as a sum."""
    logits, _ = plain_run(model, tokens[pair].tolist(), change)
    right, wrong = batch.right[pair].tolist(), batch.wrong[pair].tolist()
    logits = logits[-len(right) :]
    if batch.readout == "log_probability":
        return sum(float(logits[j].log_softmax(0)[a]) for j, a in enumerate(right)) / len(right)
    weights = [0.9**j for j in range(len(right))]
    terms = [
        w * float(logits[j, a] - logits[j, b])
        for j, (w, a, b) in enumerate(zip(weights, right, wrong, strict=True))
    ]
    return sum(terms) / sum(weights)


def channels_of(head: int) -> slice:
    """A head's channels in the output projection's input, on one rank."""
    return slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
