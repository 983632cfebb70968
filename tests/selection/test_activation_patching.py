"""Activation patching: known circuits, the plain loop as oracle, transformers' own activations."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kit import circuits
from kit.circuits import ANSWER, CARRIED, IS_DIGIT, IS_QUESTION, VALUE
from kit.tiny_qwen3 import write_tiny_qwen3
from torch import Tensor, nn

from megatron_hydra.errors import UserError
from megatron_hydra.selection.scorers import activations
from megatron_hydra.selection.scorers.activation_patching import ActivationPatching, patch_heads
from megatron_hydra.selection.scorers.activations import head_channels, run_with_activations
from megatron_hydra.selection.scorers.base import PairBatch
from megatron_hydra.tasks.readout import log_probability, logit_difference
from megatron_hydra.teachers.loading import load_teacher

RECEIVER, DECOY, SENDER = (1, 3), (1, 2), (0, 1)

pytestmark = pytest.mark.usefixtures("one_rank_of_module")


@torch.no_grad()
def plain_effect(
    model: nn.Module, batch: PairBatch, pair: int, place: circuits.Place, freeze: bool = True
) -> float:
    """Indirect effect of one head on one pair by whole forwards, patched at every position."""
    _, clean = circuits.plain_run(model, batch.clean[pair].tolist())
    _, corrupt = circuits.plain_run(model, batch.corrupt[pair].tolist())
    layer, head = place

    def patch(index: int, outputs: Tensor) -> Tensor:
        if index == layer:
            part = circuits.channels_of(head)
            outputs[..., part] = corrupt[index][..., part]
        return clean[index] if freeze and index > layer else outputs

    before, after = (
        circuits.plain_readout(model, batch, pair, batch.clean, change) for change in (None, patch)
    )
    return (before - after) / float(batch.gaps[pair])


def test_the_head_that_writes_the_answer_has_effect_1_and_a_decoy_0() -> None:
    """Catches: heads mixed up, a sign, a quotient upside down."""
    model = circuits.blank_model()
    circuits.wire(model, RECEIVER, key=IS_DIGIT, reads=VALUE, writes=ANSWER)
    circuits.wire(model, DECOY, key=IS_DIGIT, reads=VALUE, writes=None)
    found = circuits.measure(ActivationPatching(), model, circuits.digit_probe())
    expected = torch.zeros(3, 2, 4, dtype=torch.float64)
    expected[:, RECEIVER[0], RECEIVER[1]] = 1.0
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_head_that_only_feeds_another_gets_no_share() -> None:
    """Catches: attention above the patch that is not frozen."""
    model = circuits.blank_model()
    circuits.wire(model, SENDER, key=IS_DIGIT, reads=VALUE, writes=CARRIED)
    circuits.wire(model, RECEIVER, key=IS_QUESTION, reads=CARRIED, writes=ANSWER)
    batch = circuits.batch_with_gaps(model, circuits.digit_probe())
    effects = ActivationPatching().measure(model, batch)
    assert effects[:, RECEIVER[0], RECEIVER[1]].tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    assert effects[:, SENDER[0], SENDER[1]].tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    # Without the freeze the same patch takes the whole answer away, so the 0 is the freeze's.
    assert plain_effect(model, batch, 0, SENDER, freeze=False) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("readout", ["logit_difference", "log_probability"])
@pytest.mark.parametrize(("tied", "rows"), [(False, 4096), (True, 1), (False, 20)])
def test_equals_the_plain_loop(
    tied: bool, rows: int, readout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One head, one pair, one whole forward, all positions patched.

    A pair has 9 rows, so that 20 are no whole number of pairs; of heads, 5 are run in a wave.

    Catches: variants or pairs swapped when batched, a patch at some positions only, a residual
    stream that lost a layer, the embedding not used as the tied output weight.
    """
    monkeypatch.setattr(activations, "MAX_LOGIT_ROWS", rows)
    monkeypatch.setattr(activations, "MAX_POSITIONS", rows)
    if rows == 20:
        monkeypatch.setattr(activations, "MAX_STREAM_BYTES", 5 * 9 * circuits.HIDDEN * 8)
    model = circuits.random_teacher(3, share_embeddings_and_output_weights=tied, num_layers=3)
    batch = circuits.batch_with_gaps(model, circuits.random_probe(readout=readout))
    found = ActivationPatching().measure(model, batch)
    for pair, layer, head in torch.cartesian_prod(
        torch.arange(3), torch.arange(3), torch.arange(4)
    ):
        expected = plain_effect(model, batch, int(pair), (int(layer), int(head)))
        assert found[pair, layer, head].item() == pytest.approx(expected, abs=1e-9)
    assert found.abs().amax(dim=(0, 2)).min() > 0.05, "some layer's heads all do nothing"


def test_only_the_wanted_heads_are_patched() -> None:
    """Catches: effects written to another head's place when some are left out."""
    model = circuits.random_teacher(3)
    batch = circuits.batch_with_gaps(model, circuits.random_probe())
    runs = [run_with_activations(model, tokens, 3) for tokens in (batch.clean, batch.corrupt)]
    found = patch_heads(model, batch, *runs, {1: [3, 0]})
    everything = ActivationPatching().measure(model, batch)
    assert found[:, 0].isnan().all() and found[:, 1, 1:3].isnan().all()
    torch.testing.assert_close(found[:, 1, [0, 3]], everything[:, 1, [0, 3]])


def test_readout_weighs_answer_tokens_by_powers_of_lambda() -> None:
    logits = torch.zeros(1, 2, 4)
    logits[0, 0, 1], logits[0, 1, 2] = 3.0, 5.0
    found = logit_difference(logits, torch.tensor([[1, 2]]), torch.tensor([[0, 3]]))
    assert found.item() == pytest.approx((3.0 + 0.9 * 5.0) / 1.9)


def test_log_probability_is_summed_in_32_bits() -> None:
    """Catches: a log-sum-exp in the logits' own 16 bits, where a value near 20 is off by 0.03."""
    logits = (torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(0)) + 20).bfloat16()
    right = torch.arange(10).view(2, 5)
    expected = logits.double().log_softmax(-1).gather(-1, right[..., None]).mean(dim=(1, 2))
    torch.testing.assert_close(log_probability(logits, right), expected, atol=1e-5, rtol=0)


def test_activations_equal_transformers(tmp_path: Path) -> None:
    """Catches: the last positions cut wrongly, a layer's heads taken after the projection."""
    from transformers import Qwen3ForCausalLM

    folder = write_tiny_qwen3(tmp_path / "teacher")
    reference = Qwen3ForCausalLM.from_pretrained(folder).eval()
    tokens = torch.randint(0, 256, (2, 19), generator=torch.Generator().manual_seed(1))
    inputs: list[Tensor] = []
    for layer in reference.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda module, args: inputs.append(args[0])
        )
    with torch.no_grad():
        expected = reference(tokens, output_hidden_states=True)

    found = run_with_activations(load_teacher(folder).eval(), tokens, 4, num_kept=6)
    assert len(found.head_outputs) == len(inputs) == 2
    for ours, theirs in zip(found.head_outputs, inputs, strict=True):
        torch.testing.assert_close(ours.transpose(0, 1), theirs[:, -6:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.embedding.transpose(0, 1), expected.hidden_states[0][:, -6:])
    torch.testing.assert_close(found.logits, expected.logits[:, -4:], atol=1e-4, rtol=1e-4)


def test_logits_that_are_not_finite_are_refused() -> None:
    model = circuits.blank_model()
    batch = circuits.batch_with_gaps(model, circuits.digit_probe())
    with torch.no_grad():
        model.output_layer.weight[3, 0] = float("nan")
    with pytest.raises(UserError, match="logits on probe 'digit' are not finite"):
        ActivationPatching().measure(model, batch)


def test_heads_of_all_ranks_cover_the_channels_once() -> None:
    config = SimpleNamespace(num_attention_heads=8, kv_channels=4)
    for tp in (1, 2, 4):
        seen = []
        for rank in range(tp):
            group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda tp=tp: tp)
            model = SimpleNamespace(config=config, pg_collection=SimpleNamespace(tp=group))
            found = [head_channels(model, head) for head in range(8)]
            local = range(rank * 8 // tp, (rank + 1) * 8 // tp)
            assert [head for head, part in enumerate(found) if part is not None] == list(local)
            seen += [rank * 32 // tp + i for part in found if part for i in range(32)[part]]
        assert seen == list(range(32))
