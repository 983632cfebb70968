"""Attribution patching: finite differences through whole forwards, and the exact re-check."""

from __future__ import annotations

import pytest
import torch
from kit import circuits
from kit.circuits import ANSWER, CARRIED, IS_DIGIT, IS_QUESTION, VALUE
from torch import Tensor, nn

from megatron_hydra.errors import UserError
from megatron_hydra.selection.scorers.activation_patching import ActivationPatching
from megatron_hydra.selection.scorers.attribution_patching import AttributionPatching
from megatron_hydra.selection.scorers.base import PairBatch

SENDER, DECOY, RECEIVER = (0, 1), (1, 2), (2, 3)

pytestmark = pytest.mark.usefixtures("one_rank_of_module")


def test_the_final_norm_misleads_the_estimate_and_the_recheck_puts_it_right() -> None:
    """To first order the norm answers to a change of the sender's share of the stream too.

    Catches: a re-check that is not run, or of other heads than the foremost.
    """
    model = circuits.blank_model(3)
    circuits.wire(model, SENDER, key=IS_DIGIT, reads=VALUE, writes=CARRIED)
    circuits.wire(model, DECOY, key=IS_DIGIT, reads=VALUE, writes=None)
    circuits.wire(model, RECEIVER, key=IS_QUESTION, reads=CARRIED, writes=ANSWER)
    batch = circuits.batch_with_gaps(model, circuits.digit_probe())
    scorer = AttributionPatching(num_rechecked=2)
    assert scorer.start_round({})
    found = scorer.measure(model, batch)
    assert (found[:, 2, 3] > 0.5).all() and (found[:, 2, 3] < 0.95).all()
    assert (found[:, 0, 1].abs() > 0.05).all() and not found[:, 1, 2].any()

    assert scorer.start_round({"attribution_patching": {"digit": found}})
    expected = torch.zeros(3, 3, 4, dtype=torch.float64)
    expected[:, RECEIVER[0], RECEIVER[1]] = 1.0
    torch.testing.assert_close(scorer.measure(model, batch), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def plain_slope(model: nn.Module, batch: PairBatch, pair: int, place: circuits.Place) -> float:
    """Symmetric finite difference of Eq 10 along corrupt - clean, by two whole forwards."""
    _, clean = circuits.plain_run(model, batch.clean[pair].tolist())
    _, corrupt = circuits.plain_run(model, batch.corrupt[pair].tolist())
    step = 1e-5

    def readout(share: float) -> float:
        def patch(index: int, outputs: Tensor) -> Tensor:
            outputs = clean[index].clone()
            if index == place[0]:
                part = circuits.channels_of(place[1])
                outputs[..., part] += share * (corrupt[index] - clean[index])[..., part]
            return outputs

        return circuits.plain_readout(model, batch, pair, batch.clean, patch)

    return (readout(-step) - readout(step)) / (2 * step) / float(batch.gaps[pair])


@pytest.mark.parametrize(
    ("tied", "readout"), [(False, "logit_difference"), (True, "log_probability")]
)
def test_estimates_equal_finite_differences(tied: bool, readout: str) -> None:
    """Catches: a sign, answer positions left out of the sum, the gradient of all pairs' mean, MLPs
    or norms cut from the graph, heads swapped.
    """
    model = circuits.random_teacher(8, num_layers=3, share_embeddings_and_output_weights=tied)
    batch = circuits.batch_with_gaps(model, circuits.random_probe(readout=readout))
    scorer = AttributionPatching()
    assert scorer.start_round({})
    found = scorer.measure(model, batch)
    for pair, layer, head in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
        expected = plain_slope(model, batch, pair, (layer, head))
        assert found[pair, layer, head].item() == pytest.approx(expected, abs=1e-7)
    assert found.abs().amax(dim=(0, 2)).min() > 0.05, "some layer's heads all do nothing"
    exact = ActivationPatching().measure(model, batch)
    assert (found - exact).abs().max() > 0.01, "estimate and exact must differ for these tests"


def test_the_largest_estimates_are_measured_exactly_and_the_others_kept() -> None:
    """Catches: the smallest re-checked, sub-probes or signs ignored in the choice, an estimate left
    where an exact value stands, more rounds than two.
    """
    model = circuits.random_teacher(8)
    batch = circuits.batch_with_gaps(model, circuits.random_probe())
    scorer = AttributionPatching(num_rechecked=3)
    assert scorer.start_round({})
    estimates = scorer.measure(model, batch)
    exact = ActivationPatching().measure(model, batch)
    size = torch.zeros(2, 2, 4, dtype=torch.float64)
    size[0, 1, 2], size[0, 0, 0], size[1, 0, 3], size[1, 1, 1] = -5.0, 2.0, 3.0, 1.0
    done = {"attribution_patching": {"a": size[:1], "b": size[1:]}}
    assert scorer.start_round(done)
    found = scorer.measure(model, batch)
    rechecked = torch.zeros(2, 4, dtype=torch.bool)
    rechecked[1, 2] = rechecked[0, 0] = rechecked[0, 3] = True
    # float64: some processors add in another order where fewer heads are patched at once.
    expected = torch.where(rechecked, exact, estimates)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    assert (exact - estimates).abs().min() > 1e-6, "any one could stand for the other"
    assert not scorer.start_round(done)


def test_without_a_recheck_there_is_one_round() -> None:
    scorer = AttributionPatching(num_rechecked=0)
    assert scorer.start_round({})
    assert not scorer.start_round({"attribution_patching": {"a": torch.ones(1, 2, 4)}})
    with pytest.raises(UserError, match="num_rechecked is -1; it must be 0 or more"):
        AttributionPatching(num_rechecked=-1)


def test_the_model_is_left_as_it_was() -> None:
    """Catches: weights that stay frozen, or gradients left on them."""
    model = circuits.random_teacher(8)
    frozen = next(iter(model.parameters())).requires_grad_(False)
    scorer = AttributionPatching()
    scorer.start_round({})
    circuits.measure(scorer, model, circuits.random_probe())
    parameters = list(model.parameters())
    assert [p for p in parameters if not p.requires_grad] == [frozen]
    assert all(p.grad is None for p in parameters)
