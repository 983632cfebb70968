"""The attention score: fooled by a decoy, and equal to a count on transformers' own attention."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from kit import circuits
from kit.circuits import ANSWER, CARRIED, IS_DIGIT, IS_QUESTION, VALUE
from kit.tiny_qwen3 import write_tiny_qwen3

from megatron_hydra.errors import UserError
from megatron_hydra.selection.scorers.attention_score import AttentionScore
from megatron_hydra.selection.scorers.base import collate
from megatron_hydra.tasks.needles import CounterfactualPair, Sample
from megatron_hydra.tasks.probes import Probe
from megatron_hydra.teachers.loading import load_teacher

pytestmark = pytest.mark.usefixtures("one_rank_of_module")


def test_a_decoy_fools_it_and_a_receiver_that_looks_elsewhere_is_missed() -> None:
    """What theory says: it sees where heads look, not what they do. Catches: heads mixed up."""
    model = circuits.blank_model()
    circuits.wire(model, (0, 1), key=IS_DIGIT, reads=VALUE, writes=CARRIED)
    circuits.wire(model, (1, 0), key=IS_DIGIT, reads=VALUE, writes=None)
    circuits.wire(model, (1, 3), key=IS_QUESTION, reads=CARRIED, writes=ANSWER)
    found = circuits.measure(AttentionScore(), model, circuits.digit_probe())
    assert found[:, 0, 1].tolist() == found[:, 1, 0].tolist() == [1.0] * 3
    assert found[:, 1, 3].tolist() == [0.0] * 3


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_equals_a_count_on_transformers_attention(num_groups: int, tmp_path: Path) -> None:
    """Catches: RoPE or norms left out, keys of the wrong group, the token before or after the copy,
    a copy at the right token but outside the needle, an answer position off by one.
    """
    from transformers import Qwen3ForCausalLM

    folder = write_tiny_qwen3(tmp_path / "teacher", seed=2, num_key_value_heads=num_groups)
    reference = Qwen3ForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    # Few different tokens in few places, and a copy that fills half the prompt: many are found.
    rng = torch.Generator().manual_seed(7)
    pairs = []
    for start in (0, 2, 4):
        tokens = torch.randint(10, 13, (12,), generator=rng).tolist()
        span = tuple(range(start, start + 6))
        clean = Sample(tokens, [tokens[i] for i in span], span)
        other = [token + 5 for token in clean.answer]
        corrupt = Sample([*tokens[:start], *other, *tokens[start + 6 :]], other, span)
        pairs.append(CounterfactualPair(clean, corrupt))
    probe = Probe("random", "retrieval", pairs, 18, 7)
    found = AttentionScore().measure(load_teacher(folder).eval(), collate(probe, range(3)))

    for number, (clean, _) in enumerate(pairs):
        with torch.no_grad():
            run = reference(torch.tensor([clean.tokens + clean.answer]), output_attentions=True)
        for layer, weights in enumerate(run.attentions):
            for head in range(4):
                hits = 0
                for j, token in enumerate(clean.answer):
                    # The weights with which the token before predicts answer token j.
                    place = int(weights[0, head, len(clean.tokens) + j - 1].argmax())
                    at_copy = place in clean.answer_positions
                    hits += at_copy and clean.tokens[place] == token
                assert found[number, layer, head].item() == pytest.approx(hits / 6)
    assert len(found.unique()) > 2, "too little was found for this test to tell"


def test_reads_only_probes_whose_prompts_hold_the_answer() -> None:
    probe = circuits.random_probe()
    assert AttentionScore().accepts(probe)
    first = probe.pairs[0]
    without = CounterfactualPair(dataclasses.replace(first.clean, answer_positions=()), first[1])
    mixed = dataclasses.replace(probe, pairs=[*probe.pairs, without])
    assert not AttentionScore().accepts(mixed)


def test_a_model_that_is_not_finite_is_refused() -> None:
    """Catches: a score read off a broken model."""
    model = circuits.blank_model()
    with torch.no_grad():
        model.output_layer.weight[3, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        AttentionScore().measure(model, collate(circuits.digit_probe(), range(3)))
