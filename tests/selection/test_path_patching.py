"""Path patching: known circuits, the plain loop of two whole forwards, and the rounds."""

from __future__ import annotations

import pytest
import torch
from kit import circuits
from kit.circuits import (
    ANSWER,
    CARRIED,
    IS_DIGIT,
    IS_MARK,
    IS_QUESTION,
    MARKED,
    VALUE,
    Place,
)
from torch import Tensor, nn

from megatron_hydra.errors import UserError
from megatron_hydra.selection.scorers import activations
from megatron_hydra.selection.scorers.activation_patching import ActivationPatching
from megatron_hydra.selection.scorers.base import PairBatch
from megatron_hydra.selection.scorers.path_patching import PathPatching

# Bottom to top; each stands two layers below the one it feeds.
SENDERS_SENDER, DECOY, SENDER, RECEIVER = (0, 1), (1, 2), (2, 0), (4, 3)
NUM_LAYERS = 6

pytestmark = pytest.mark.usefixtures("one_rank_of_module")


def circuit() -> nn.Module:
    """Digit -> mark -> question -> answer; the decoy looks at the digit and writes nothing."""
    model = circuits.blank_model(NUM_LAYERS)
    circuits.wire(model, SENDERS_SENDER, query=IS_MARK, key=IS_DIGIT, reads=VALUE, writes=MARKED)
    circuits.wire(model, DECOY, key=IS_DIGIT, reads=VALUE, writes=None)
    circuits.wire(model, SENDER, key=IS_MARK, reads=MARKED, writes=CARRIED)
    circuits.wire(model, RECEIVER, key=IS_QUESTION, reads=CARRIED, writes=ANSWER)
    return model


def test_each_round_goes_one_step_further_back() -> None:
    """Catches: targets that do not hear one another, or that hear at the answer positions only
    (the mark is none), a head's own way to the logits counted, the effects of an old round kept.
    """
    model = circuit()
    batch = circuits.batch_with_gaps(model, circuits.digit_probe())
    done = {"activation_patching": {"digit": ActivationPatching().measure(model, batch)}}
    scorer = PathPatching()
    assert scorer.start_round(done)
    assert scorer.targets == {RECEIVER}
    first = scorer.measure(model, batch)
    expected = torch.zeros(3, NUM_LAYERS, 4, dtype=torch.float64)
    expected[:, SENDER[0], SENDER[1]] = 1.0
    torch.testing.assert_close(first, expected, atol=1e-6, rtol=0)

    assert scorer.start_round({**done, "path_patching": {"digit": first}})
    assert scorer.targets == {RECEIVER, SENDER}
    second = scorer.measure(model, batch)
    expected[:, SENDERS_SENDER[0], SENDERS_SENDER[1]] = 1.0
    torch.testing.assert_close(second, expected, atol=1e-6, rtol=0)
    assert not scorer.start_round({**done, "path_patching": {"digit": second}})


@torch.no_grad()
def plain_effect(
    model: nn.Module, batch: PairBatch, pair: int, sender: Place, targets: frozenset[Place]
) -> float:
    """One sender's effect on one pair, by two whole forwards with hooks."""
    _, clean = circuits.plain_run(model, batch.clean[pair].tolist())
    _, corrupt = circuits.plain_run(model, batch.corrupt[pair].tolist())

    def with_heads(base: Tensor, other: Tensor, heads: list[int]) -> Tensor:
        mixed = base.clone()
        for part in map(circuits.channels_of, heads):
            mixed[..., part] = other[..., part]
        return mixed

    def of_layer(index: int) -> list[int]:
        return [head for layer, head in targets if layer == index]

    def send(index: int, live: Tensor) -> Tensor:
        if index == sender[0]:
            return with_heads(clean[index], corrupt[index], [sender[1]])
        return with_heads(clean[index], live, of_layer(index))

    _, heard = circuits.plain_run(model, batch.clean[pair].tolist(), send)

    def repeat(index: int, live: Tensor) -> Tensor:
        noted = of_layer(index) if index > sender[0] else []
        return with_heads(clean[index], heard[index], noted)

    before, after = (
        circuits.plain_readout(model, batch, pair, batch.clean, change) for change in (None, repeat)
    )
    return (before - after) / float(batch.gaps[pair])


@pytest.mark.parametrize(
    ("heads", "groups", "at_once", "waves_of", "readout", "teacher"),
    [
        (4, 2, 16384, 100, "logit_difference", {}),
        (3, 3, 30, 5, "log_probability", {}),
        (5, 1, 1, 1, "logit_difference", {}),
        (4, 4, 7, 100, "logit_difference", {}),
        (4, 2, 16384, 100, "logit_difference", {"qk_layernorm": False, "add_qkv_bias": True}),
    ],
)
def test_equals_the_plain_loop(
    heads: int,
    groups: int,
    at_once: int,
    waves_of: int,
    readout: str,
    teacher: dict[str, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One sender, one pair, whole sequences; targets share layers and are senders themselves.

    Heads and rows are also divisible by no chunk, and a wave of senders ends within a layer.

    Catches: keys and values of the kept prefix misplaced or of the wrong group, positions turned
    by RoPE from 0, the sender still corrupt in the second run, MLPs frozen, pairs or senders
    swapped when batched, a prompt that starts to differ later than its neighbours, a sender that
    joins the others with a stream that has lost a layer, rows of a chunk or biases left out.
    """
    length, num_pairs = 11, 3
    monkeypatch.setattr(activations, "MAX_POSITIONS", at_once)
    row_bytes = circuits.HIDDEN * 8
    monkeypatch.setattr(activations, "MAX_STREAM_BYTES", waves_of * length * row_bytes)
    shape = {"num_attention_heads": heads, "num_query_groups": groups, **teacher}
    model = circuits.random_teacher(4, num_layers=4, **shape)
    probe = circuits.random_probe(num_pairs, length, readout=readout)
    batch = circuits.batch_with_gaps(model, probe)
    scorer = PathPatching()
    last = heads - 1
    scorer.targets = frozenset({(0, 2), (1, 0), (1, last), (2, 2), (3, 1), (3, 2)})
    found = scorer.measure(model, batch)
    sizes = torch.zeros(4)
    for pair, layer, head in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
        expected = plain_effect(model, batch, pair, (layer, head), scorer.targets)
        assert found[pair, layer, head].item() == pytest.approx(expected, abs=1e-9)
        sizes[layer] = max(sizes[layer], abs(expected))
    assert (sizes[:3] > 0.02).all() and sizes[3] == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("local", torch.float32, 1e-3),
        ("local", torch.float16, 0.015),
        ("transformer_engine", torch.float16, 0.015),
    ],
)
def test_equals_the_plain_loop_on_a_gpu(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    """Catches: a CUDA attention kernel that aligns the causal mask with the first key, the norm
    that Transformer Engine keeps in the in-projection left out.
    """
    if backend == "transformer_engine":
        pytest.importorskip("transformer_engine")
    model = circuits.random_teacher(4, torch.float32, num_layers=4, backend=backend)
    batch = circuits.batch_with_gaps(model, circuits.random_probe())
    scorer = PathPatching()
    scorer.targets = frozenset({(1, 0), (2, 2), (3, 1)})
    places = [(0, 2), (0, 3), (1, 1), (2, 0)]
    expected = [plain_effect(model, batch, 2, place, scorer.targets) for place in places]
    found = scorer.measure(model.to(dtype), batch)
    effects = [found[2][place].item() for place in places]
    assert effects == pytest.approx(expected, abs=tolerance, rel=0.02)
    assert max(map(abs, expected)) > 3 * tolerance


def test_a_prompt_that_differs_from_its_first_token_on() -> None:
    """Catches: an empty prefix mishandled."""
    model = circuits.random_teacher(5, num_layers=3)
    probe = circuits.random_probe(num_pairs=1)
    for sample in probe.pairs[0]:
        sample.tokens[0] = sample.answer[0]
    batch = circuits.batch_with_gaps(model, probe)
    assert (batch.clean != batch.corrupt)[0, 0]
    scorer = PathPatching()
    scorer.targets = frozenset({(2, 1)})
    found = scorer.measure(model, batch)
    expected = plain_effect(model, batch, 0, (0, 3), scorer.targets)
    assert abs(expected) > 1e-3
    assert found[0, 0, 3].item() == pytest.approx(expected, abs=1e-9)


def effects(**of_probe: list[list[list[float]]]) -> dict[str, Tensor]:
    """Sub-probe -> effects, written as [pair][layer][head]."""
    return {name: torch.tensor(values).double() for name, values in of_probe.items()}


def test_targets_are_heads_notable_on_some_sub_probe_and_only_grow() -> None:
    """Catches: signs that cancel over sub-probes, absolute values taken before the mean over pairs,
    a target forgotten in a later round, rounds that never end.
    """
    received = effects(
        a=[[[0.5, 0.0], [0.03, 0.0]], [[0.5, 0.0], [-0.03, 0.0]]], b=[[[-0.5, 0.0], [0.0, 0.021]]]
    )
    scorer = PathPatching(max_rounds=3)
    done = {"activation_patching": received}
    assert scorer.start_round(done)
    assert scorer.targets == {(0, 0), (1, 1)}
    assert scorer.start_round({**done, "path_patching": effects(a=[[[0.0, 1.0], [0.0, 0.0]]])})
    assert scorer.targets == {(0, 0), (1, 1), (0, 1)}
    assert not scorer.start_round({**done, "path_patching": effects(a=[[[0.0, 1.0], [0.0, 0.0]]])})

    once = PathPatching(max_rounds=1, min_effect=0.6)
    assert once.start_round({"activation_patching": effects(a=[[[0.7, 0.5]]])})
    assert once.targets == {(0, 0)}
    assert not once.start_round({**done, "path_patching": effects(a=[[[0.0, 1.0]]])})


def test_without_receivers_nobody_sends(caplog: pytest.LogCaptureFixture) -> None:
    """Catches: no effects at all (the file would lack a scorer), or a crash on an empty set."""
    model = circuits.random_teacher()
    batch = circuits.batch_with_gaps(model, circuits.random_probe())
    scorer = PathPatching()
    done = {"activation_patching": {"random": torch.zeros(3, 2, 4).double()}}
    assert scorer.start_round(done)
    assert "there are no senders" in caplog.text
    found = scorer.measure(model, batch)
    assert found.shape == (3, 2, 4) and not found.any()
    assert not scorer.start_round({**done, "path_patching": {"random": found}})


def test_the_lowest_layer_has_nobody_below() -> None:
    """Catches: a crash on an empty set of senders where every target is in the first layer."""
    model = circuits.random_teacher()
    batch = circuits.batch_with_gaps(model, circuits.random_probe())
    scorer = PathPatching()
    scorer.targets = frozenset({(0, 1), (0, 3)})
    assert not scorer.measure(model, batch).any()
    scorer.targets |= {(1, 0)}
    assert scorer.measure(model, batch)[:, 0].abs().min() > 0


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(UserError, match="run activation_patching before it"):
        PathPatching().start_round({"attention_score": {}})
    with pytest.raises(UserError, match="min_effect is 0; it must be above 0"):
        PathPatching(min_effect=0)
    with pytest.raises(UserError, match="max_rounds is 0; it must be 1 or more"):
        PathPatching(max_rounds=0)
