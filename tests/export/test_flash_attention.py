"""`attn_implementation="flash_attention_2"` of an exported model, over a stand-in for flash-attn.

`eager`, which other tests hold to Megatron, is the truth.
"""

from __future__ import annotations

import pytest
import torch

from megatron_hydra.cpu import install_if_needed

install_if_needed()

import torch.nn.functional as F  # noqa: E402
from kit.exported import ALL_FA, HOLES, UNEVEN, in_pieces, twins  # noqa: E402
from kit.flash_attention_stand_in import install  # noqa: E402
from kit.tiny import tiny_config, tiny_plan, token_batch  # noqa: E402

from megatron_hydra.export.modeling_hydra import HydraForCausalLM  # noqa: E402

ONE_FA = tiny_plan({0: (6,), 1: ()})
LEFT = (torch.arange(40) >= torch.tensor([[0], [7], [16]])).long()
FLASH = "flash_attention_2"


@pytest.fixture(
    scope="module", params=[UNEVEN, ALL_FA, ONE_FA], ids=["uneven", "FA alone", "one FA head"]
)
def hybrid(request):
    return twins(request.param)[1]


@pytest.fixture
def calls(monkeypatch):
    return install(monkeypatch)


def _tokens(length=40):
    return token_batch(tiny_config(), 3, length)[0]


@pytest.mark.parametrize("mask", [None, LEFT, HOLES], ids=["whole", "left", "holes"])
@pytest.mark.parametrize("sizes", [[40], [33, 1, 1, 1, 4], [10, 9, 2, 19], [1] * 40], ids=str)
@pytest.mark.parametrize("max_length", [None, 40], ids=["dynamic", "static"])
def test_logits_are_those_of_eager(calls, hybrid, mask, sizes, max_length):
    hybrid.set_attn_implementation("eager")
    expected, _ = in_pieces(hybrid, _tokens(), [40], mask)
    hybrid.set_attn_implementation(FLASH)
    found, _ = in_pieces(hybrid, _tokens(), sizes, mask, max_length)
    real = torch.ones(3, 40).bool() if mask is None else mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-4)
    assert expected[real].std() > 0.5, "logits too small to compare"
    assert ("flash_attn_varlen_func" if mask is not None else "flash_attn_func") in calls


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}],
    ids=["greedy", "beams", "chunked prefill"],
)
@pytest.mark.parametrize("kept", ["dynamic", "static"])
def test_a_padded_batch_generates_what_eager_does(calls, hybrid, options, kept):
    tokens, mask = _tokens(20), LEFT[:, :20]
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, **options}
    hybrid.set_attn_implementation("eager")
    expected = hybrid.generate(tokens, attention_mask=mask, **options)
    assert len(expected[:, 20:].unique()) > 5, "too dull to compare"
    hybrid.set_attn_implementation(FLASH)
    found = hybrid.generate(tokens, attention_mask=mask, cache_implementation=kept, **options)
    assert torch.equal(found, expected) and calls


def test_gradients_are_those_of_eager(calls):
    hybrid = twins(UNEVEN)[1]
    hybrid.train()
    tokens, gradients = _tokens(), []
    # Padding writes no real token.
    is_predicted = HOLES & F.pad(HOLES, (1, 0))[:, :-1]
    labels = tokens.masked_fill(is_predicted == 0, -100)
    for implementation in ("eager", FLASH):
        hybrid.set_attn_implementation(implementation)
        hybrid.zero_grad()
        hybrid(tokens, HOLES, labels=labels).loss.backward()
        gradients.append([p.grad.clone() for p in hybrid.parameters()])
    assert calls
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_folder_in_half_precision(calls, tmp_path):
    """flash-attn has no other; what stays float32 must not reach it."""
    hybrid = twins(UNEVEN)[1]
    hybrid.save_pretrained(tmp_path)
    expected, _ = in_pieces(hybrid, _tokens(), [40], HOLES)
    errors = []
    for implementation in ("sdpa", FLASH):
        model = HydraForCausalLM.from_pretrained(
            tmp_path, dtype=torch.bfloat16, attn_implementation=implementation
        )
        found, _ = in_pieces(model, _tokens(), [33, 1, 6], HOLES)
        errors.append((found.float() - expected)[HOLES.bool()].square().mean().sqrt())
    assert 0 < errors[1] < 1.2 * errors[0]
