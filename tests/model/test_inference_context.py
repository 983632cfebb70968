"""Decoding under Megatron's inference context: equal to one forward pass and to the export."""

from __future__ import annotations

import pytest
import torch

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from kit.exported import ALL_FA, NO_FA, UNEVEN, WINDOW, megatron_logits, twins  # noqa: E402
from kit.tiny import tiny_config, tiny_plan, token_batch  # noqa: E402
from megatron.core.inference.contexts import StaticInferenceContext  # noqa: E402

from megatron_hydra.errors import UserError  # noqa: E402
from megatron_hydra.model.generation import generate  # noqa: E402
from megatron_hydra.model.sequence import packed_sequence  # noqa: E402
from megatron_hydra.selection.cost import cache_bytes_per_token, state_bytes  # noqa: E402
from megatron_hydra.selection.shape import ModelShape  # noqa: E402

LENGTH = 150  # beyond the tiny model's 64, and beyond two chunks of the recurrence


@pytest.fixture(scope="module")
def hybrid():
    return twins(UNEVEN)[0]


def _tokens(batch=2, length=LENGTH, seed=0):
    return token_batch(tiny_config(), batch, length, seed)[0]


def _in_pieces(model, tokens, sizes, context=None):
    """Logits of all positions, and the context."""
    if context is None:
        context = StaticInferenceContext(len(tokens), tokens.shape[1])
    context.materialize_only_last_token_logits = False
    logits, start = [], 0
    for size in sizes:
        piece = tokens[:, start : start + size]
        with torch.no_grad():
            logits.append(
                model(piece, piece, None, inference_context=context, runtime_gather_output=True)
            )
        context.increment_sequence_len_offset(size)
        start += size
    assert start == tokens.shape[1]
    return torch.cat(logits, dim=1), context


def _expect_equal(model, tokens, sizes):
    logits, _ = _in_pieces(model, tokens, sizes)
    expected = megatron_logits(model, tokens)
    assert expected.std() > 0.3, "logits too small for the comparison to mean something"
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [[1] * LENGTH, [60] + [1] * 90, [5, 64, 1, 3, 2, 70, 4, 1], [WINDOW, 1, WINDOW, 137]],
    ids=["token by token", "prefill and decode", "pieces", "windows"],
)
def test_pieces_are_one_forward_pass(hybrid, sizes):
    _expect_equal(hybrid, _tokens(), sizes)


@pytest.mark.parametrize(
    ("plan", "overrides"),
    [
        (NO_FA, {}),
        (ALL_FA, {"fa_rope": True}),
        (UNEVEN, {"la_kind": "kda", "fa_query_scale": "always", "fa_query_scale_base": 20.0}),
        (UNEVEN, {"la_short_conv": False, "la_decay": False, "la_beta": False}),
        (UNEVEN, {"la_conv_kernel_size": 1, "sliding_window_tokens": 1, "fusion": "gate"}),
        (UNEVEN, {"qk_layernorm": False, "add_qkv_bias": True, "la_conv_kernel_size": 7}),
        (UNEVEN, {"fa_query_scale_start": 20, "rope_scaling_factor": 8.0, "fa_rope": True}),
        (UNEVEN, {"sliding_window_sink": False, "la_rope": False, "fusion": "none"}),
    ],
    ids=str,
)
def test_pieces_of_other_hybrids(plan, overrides):
    _expect_equal(twins(plan, **overrides)[0], _tokens(length=40), [3, 20, 1, 1, 15])


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_pieces_on_triton_kernels(short_strips):
    """As on a GPU but for the recurrence: preparation and fusion with a past."""
    plan = tiny_plan({0: (1, 2, 5), 1: (7,)}, {1: {"kda": (0, 3, 6), "sliding_window": (1, 5)}})
    model = twins(plan, fused_kernels="triton")[0]
    assert model.decoder.layers[0].self_attention.fusion.impl == "triton"
    _expect_equal(model, _tokens(length=12), [2, 6, 1, 1, 2])


@pytest.mark.parametrize("plan", [UNEVEN, NO_FA, ALL_FA], ids=["uneven", "no FA", "FA alone"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bytes_are_what_the_plan_promises(plan, dtype):
    """Recurrent states are float32 in either format."""
    model = twins(plan)[0]
    shape = ModelShape.from_config(model.config)
    per_token = cache_bytes_per_token(shape, dtype).of(plan)
    state = state_bytes(shape, dtype).of(plan)
    if dtype == "bf16":
        model = model.to(torch.bfloat16)
    _, context = _in_pieces(model, _tokens(3, 30), [20, *[1] * 10])
    layers = context.key_value_memory_dict
    assert sorted(layers) == [1, 2]
    assert sum(layer.num_bytes for layer in layers.values()) == 3 * (30 * per_token + state)


def test_a_context_begins_anew_and_holds_smaller_batches(hybrid):
    context = StaticInferenceContext(3, 60)
    for batch, length in ((3, 50), (2, 31)):
        tokens, sizes = _tokens(batch, length, seed=batch), [length - 7, *[1] * 7]
        logits, _ = _in_pieces(hybrid, tokens, sizes, context)
        assert torch.equal(logits, _in_pieces(hybrid, tokens, sizes)[0])
        context.reset()


def _context(rows=2, tokens=20, **changes):
    context = StaticInferenceContext(rows, tokens)
    for name, value in changes.items():
        setattr(context, name, value)
    return context


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (_context(tokens=11), "2 rows of 12 tokens do not fit the inference context, .* 2 of 11"),
        (_context(rows=1), "2 rows of 12 tokens do not fit the inference context, .* 1 of 20"),
        (_context(sequence_len_offset=4), "at token 4 of 2 rows, but layer 0 has seen 0 of 0"),
        (_context(batch_size_offset=1), "does not decode with batch_size_offset, parts of a batch"),
        (_context(is_static_batching=lambda: False), "with an inference context of type Static"),
    ],
)
def test_contexts_that_do_not_fit_are_named(hybrid, context, message):
    tokens = _tokens(2, 12)
    with torch.no_grad(), pytest.raises(UserError, match=message):
        hybrid(tokens, tokens, None, inference_context=context, runtime_gather_output=True)


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("context_parallel_size", 2, "context_parallel_size 2"),
        ("pipeline_model_parallel_size", 2, "pipeline_model_parallel_size 2"),
        ("fp8", "hybrid", "FP8"),
    ],
)
def test_what_decoding_does_not_know_is_named_before_the_first_token(
    hybrid, monkeypatch, name, value, what
):
    monkeypatch.setattr(hybrid.config, name, value)
    monkeypatch.setattr(hybrid, "forward", None)
    with pytest.raises(UserError, match=f"a model does not decode with {what}; it needs whole"):
        generate(hybrid, _tokens(2, 12), 3)


def test_a_context_of_ones_own_needs_all_tokens_on_every_rank(hybrid, monkeypatch):
    monkeypatch.setattr(hybrid.config, "sequence_parallel", True)
    attention, x = hybrid.decoder.layers[0].self_attention, torch.zeros(4, 2, 32)
    with torch.no_grad(), pytest.raises(UserError, match="does not decode with sequence_parallel"):
        attention(x, rotary_pos_emb=torch.zeros(20, 1, 1, 8), inference_context=_context())


def test_a_step_that_was_not_counted_is_named(hybrid):
    tokens, context = _tokens(2, 12), StaticInferenceContext(2, 30)
    options = dict(inference_context=context, runtime_gather_output=True)
    with torch.no_grad():
        hybrid(tokens, tokens, None, **options)
        context.increment_sequence_len_offset(11)
        with pytest.raises(UserError, match="at token 11 of 2 rows, but layer 0 has seen 12 of 2"):
            hybrid(tokens[:, :1], tokens[:, :1], None, **options)


def test_gradients_training_and_packed_rows_are_refused(hybrid):
    tokens, context = _tokens(1, 12), StaticInferenceContext(1, 30)
    options = dict(inference_context=context, runtime_gather_output=True)
    with pytest.raises(UserError, match="in evaluation mode and without gradients alone"):
        hybrid(tokens, tokens, None, **options)
    with pytest.raises(UserError, match="in evaluation mode and without gradients alone"):
        generate(hybrid.train(), tokens, 1)
    hybrid.eval()
    packing = packed_sequence(torch.tensor([0, 5, 12]))
    with torch.no_grad(), pytest.raises(UserError, match="does not decode with packed rows"):
        hybrid(tokens, tokens, None, packed_seq_params=packing, **options)
