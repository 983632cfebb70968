"""Zero, mean and window ablation: known circuits and the plain loop of whole forwards."""

from __future__ import annotations

import pytest
import torch
from kit import circuits
from kit.circuits import ANSWER, CARRIED, IS_DIGIT, IS_QUESTION, VALUE
from torch import Tensor, nn

from megatron_hydra.selection.scorers import activations
from megatron_hydra.selection.scorers.ablation import MeanAblation, WindowAblation, ZeroAblation
from megatron_hydra.selection.scorers.base import PairBatch

SENDER, DECOY, RECEIVER = (0, 1), (1, 2), (2, 3)
SCORERS = [ZeroAblation, MeanAblation]

pytestmark = pytest.mark.usefixtures("one_rank_of_module")


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_head_on_the_way_to_the_answer_counts_and_a_decoy_does_not(
    scorer: type[ZeroAblation] | type[MeanAblation],
) -> None:
    """Without the digit m is 0, half way to the corrupt run's -m: 0.5 for sender and receiver.

    Catches: attention above that keeps its clean output (the sender would get 0), the wrong gap,
    a mean that still says the answer.
    """
    model = circuits.blank_model(3)
    circuits.wire(model, SENDER, key=IS_DIGIT, reads=VALUE, writes=CARRIED)
    circuits.wire(model, DECOY, key=IS_DIGIT, reads=VALUE, writes=None)
    circuits.wire(model, RECEIVER, key=IS_QUESTION, reads=CARRIED, writes=ANSWER)
    found = circuits.measure(scorer(), model, circuits.digit_probe())
    expected = torch.zeros(3, 3, 4, dtype=torch.float64)
    for layer, head in (SENDER, RECEIVER):
        expected[:, layer, head] = 0.5
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def plain_effect(
    model: nn.Module, batch: PairBatch, pair: int, place: circuits.Place, to_mean: bool
) -> float:
    """One head's effect on one pair by a whole forward, its output replaced at every position."""
    runs = [circuits.plain_run(model, x[pair].tolist())[1] for x in (batch.clean, batch.corrupt)]

    def ablate(index: int, outputs: Tensor) -> Tensor:
        part = circuits.channels_of(place[1])
        if index == place[0]:
            every = torch.cat([run[index][..., part] for run in runs])  # [both runs' s, 1, d]
            outputs[..., part] = every.sum(dim=0) / len(every) if to_mean else 0.0
        return outputs

    before, after = (
        circuits.plain_readout(model, batch, pair, batch.clean, change) for change in (None, ablate)
    )
    return (before - after) / float(batch.gaps[pair])


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize(
    ("tied", "at_once", "readout"),
    [(False, 16384, "logit_difference"), (True, 1, "log_probability")],
)
def test_equals_the_plain_loop(
    scorer: type[ZeroAblation] | type[MeanAblation],
    tied: bool,
    at_once: int,
    readout: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches: a run resumed at the wrong layer or without RoPE, a mean over pairs or over the
    wrong dimension or of one run alone, heads or pairs swapped when batched.
    """
    monkeypatch.setattr(activations, "MAX_POSITIONS", at_once)
    model = circuits.random_teacher(6, num_layers=3, share_embeddings_and_output_weights=tied)
    batch = circuits.batch_with_gaps(model, circuits.random_probe(readout=readout))
    found = scorer().measure(model, batch)
    for pair, layer, head in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
        expected = plain_effect(model, batch, pair, (layer, head), scorer is MeanAblation)
        assert found[pair, layer, head].item() == pytest.approx(expected, abs=1e-9)
    assert found.abs().amax(dim=(0, 2)).min() > 0.05, "some layer's heads all do nothing"


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_pair_s_effect_does_not_depend_on_the_pairs_beside_it(
    scorer: type[ZeroAblation] | type[MeanAblation],
) -> None:
    """Catches: a stand-in averaged over the batch, which would make batch size and ranks matter."""
    model = circuits.random_teacher(6)
    probe = circuits.random_probe()
    together = circuits.measure(scorer(), model, probe)
    for number, pair in enumerate(probe.pairs):
        alone = circuits.Probe("alone", "retrieval", [pair], probe.length_tokens, 0)
        found = circuits.measure(scorer(), model, alone)
        torch.testing.assert_close(found[0], together[number], atol=1e-9, rtol=0)


@pytest.mark.parametrize("window", [1, 5])
def test_a_window_is_an_attention_masked_by_hand(window: int) -> None:
    """Catches: keys of another group, another position's window, layers above that stay clean."""
    model = circuits.random_teacher(6, num_layers=3)
    batch = circuits.batch_with_gaps(model, circuits.random_probe())
    found = WindowAblation(window).measure(model, batch)
    for pair in range(batch.num_pairs):
        tokens = batch.clean[pair].tolist()
        for layer in range(3):
            core = model.decoder.layers[layer].self_attention.core_attention
            hook = core.register_forward_hook(lambda core, args, _: _masked(args, window))
            windowed = circuits.plain_run(model, tokens)[1][layer]
            hook.remove()
            for head in range(found.shape[2]):
                part = circuits.channels_of(head)

                def ablate(index: int, outputs: Tensor) -> Tensor:
                    if index == layer:  # noqa: B023
                        outputs[..., part] = windowed[..., part]  # noqa: B023
                    return outputs

                before, after = (
                    circuits.plain_readout(model, batch, pair, batch.clean, change)
                    for change in (None, ablate)
                )
                expected = (before - after) / float(batch.gaps[pair])
                assert found[pair, layer, head].item() == pytest.approx(expected, abs=1e-9)
    assert found.abs().amax(dim=(0, 2)).min() > 0.05, "some layer's heads all do nothing"


def _masked(args: tuple, window: int) -> Tensor:
    """Attention of `[s, 1, heads, d]` and `[s, 1, groups, d]` by a matrix of who sees whom."""
    query, key, value = (part[:, 0] for part in args[:3])
    place = torch.arange(len(query))
    distance = place[:, None] - place
    outputs = []
    for head in range(query.shape[1]):
        group = head * key.shape[1] // query.shape[1]
        scores = query[:, head] @ key[:, group].T / query.shape[-1] ** 0.5
        scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
        outputs.append(scores.softmax(-1) @ value[:, group])
    return torch.cat(outputs, dim=-1)[:, None]


def test_a_window_over_all_tokens_takes_nothing_away() -> None:
    model = circuits.random_teacher(6, num_layers=3)
    batch = circuits.batch_with_gaps(model, circuits.random_probe())
    found = WindowAblation(batch.clean.shape[1]).measure(model, batch)
    torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-9, rtol=0)
