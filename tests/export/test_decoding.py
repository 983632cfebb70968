"""Decoding with a cache: equal to one forward pass, and no byte more than the plan promises."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from kit.exported import (  # noqa: E402
    ALL_FA,
    HOLES,
    NO_FA,
    UNEVEN,
    WINDOW,
    in_pieces,
    megatron_logits,
    twins,
)
from kit.tiny import tiny_config, token_batch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from transformers import DynamicCache  # noqa: E402
from transformers.modeling_outputs import CausalLMOutputWithPast  # noqa: E402

from megatron_hydra.export.cache_hydra import HydraCache  # noqa: E402
from megatron_hydra.export.recording_hydra import RecordedSteps  # noqa: E402
from megatron_hydra.export.recurrence_hydra import PIECES  # noqa: E402
from megatron_hydra.export.stream_hydra import CACHE, padded_mask  # noqa: E402
from megatron_hydra.selection.cost import cache_bytes_per_token, state_bytes  # noqa: E402
from megatron_hydra.selection.shape import ModelShape  # noqa: E402

CACHES = pytest.param(None, id="dynamic"), pytest.param(150, id="static")
LENGTH = 150  # beyond the tiny model's 64, and beyond a block of the window's


@pytest.fixture(scope="module")
def hybrid():
    return twins(UNEVEN)


def _tokens(batch=2, length=LENGTH):
    return token_batch(tiny_config(), batch, length)[0]


@pytest.mark.parametrize(
    "sizes",
    [[1] * LENGTH, [60] + [1] * 90, [5, 64, 1, 3, 2, 70, 4, 1], [WINDOW, 1, WINDOW, 137]],
    ids=["token by token", "prefill and decode", "pieces", "windows"],
)
@pytest.mark.parametrize("max_length", CACHES)
def test_pieces_are_one_forward_pass(hybrid, sizes, max_length):
    model, exported = hybrid
    tokens = _tokens()
    logits, _ = in_pieces(exported, tokens, sizes, max_length=max_length)
    torch.testing.assert_close(logits, megatron_logits(model, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("plan", "overrides"),
    [
        (NO_FA, {}),
        (ALL_FA, {"fa_rope": True}),
        (UNEVEN, {"la_short_conv": False, "la_decay": False, "la_beta": False}),
        (UNEVEN, {"la_conv_kernel_size": 1, "sliding_window_tokens": 1, "fusion": "gate"}),
        (UNEVEN, {"qk_layernorm": False, "add_qkv_bias": True, "la_conv_kernel_size": 7}),
        (UNEVEN, {"fa_query_scale_start": 20, "rope_scaling_factor": 8.0, "fa_rope": True}),
    ],
)
@pytest.mark.parametrize("max_length", CACHES)
def test_pieces_of_other_hybrids(plan, overrides, max_length):
    model, exported = twins(plan, **overrides)
    tokens = _tokens(length=40)
    logits, _ = in_pieces(exported, tokens, [3, 20, 1, 1, 15], max_length=max_length)
    torch.testing.assert_close(logits, megatron_logits(model, tokens), rtol=1e-5, atol=1e-5)


def test_long_prompts_are_prepared_a_piece_at_a_time(hybrid, monkeypatch):
    """Equal bit by bit, with padding too, and no tensor in float32 is of the whole prompt."""
    exported = copy.deepcopy(hybrid[1]).bfloat16()
    tokens, mask = _tokens(2, 96), torch.ones(2, 96, dtype=torch.long)
    mask[0, :30] = mask[1, 70:80] = 0
    mixer = next(m for m in exported.modules() if getattr(m, "name", "") == "la")
    whole, _ = in_pieces(exported, tokens, [90, 6], mask)
    monkeypatch.setattr(sys.modules[type(mixer).__module__], "PIECE", 7)
    found, _ = in_pieces(exported, tokens, [90, 6], mask)
    assert torch.equal(found, whole)
    x, sizes = torch.randn(2, 500, exported.config.hidden_size).bfloat16(), []
    stream = SimpleNamespace(
        cos=torch.ones(2, 500, 1, 1).bfloat16(), sin=torch.zeros(2, 500, 1, 1).bfloat16(),
        is_padded=False,
    )  # fmt: skip

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(found) if t.dtype == torch.float32)
            return found

    with torch.no_grad(), Sizes():
        query, key, _ = mixer._prepared(x, stream, None)
    assert query.shape == key.shape == (2, 500, len(mixer.heads), exported.config.head_dim)
    assert 0 < max(sizes) <= 3 * query.numel() * (7 + 3) / 500


@pytest.mark.parametrize("sizes", [[40], [33, 1, 1, 1, 4], [10, 9, 2, 19], [1] * 40])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("max_length", CACHES)
def test_padding_anywhere_changes_nothing(hybrid, sizes, implementation, max_length):
    model, exported = hybrid
    exported.set_attn_implementation(implementation)
    tokens = _tokens(3, 40)
    logits, _ = in_pieces(exported, tokens, sizes, HOLES, max_length)
    for row, real in enumerate(HOLES.bool()):
        alone = megatron_logits(model, tokens[row : row + 1, real])
        torch.testing.assert_close(logits[row, real], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}],
    ids=["greedy", "beams", "chunked prefill"],
)
@pytest.mark.parametrize("kept", ["dynamic", "static"])
def test_a_batch_generates_what_each_row_does_alone(hybrid, options, kept):
    _, exported = hybrid
    tokens, lengths = _tokens(3, 20), (20, 13, 3)
    mask = torch.stack([(torch.arange(20) >= 20 - length).long() for length in lengths])
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, **options}
    together = exported.generate(tokens, attention_mask=mask, cache_implementation=kept, **options)
    for row, length in enumerate(lengths):
        prompt = tokens[row : row + 1, 20 - length :]
        alone = exported.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert together[row, 20:].tolist() == alone[0, length:].tolist()
    assert len(set(together[:, 20:].flatten().tolist())) > 5, "outputs too dull to tell a mix-up"


def test_greedy_generation_follows_the_whole_forward_pass(hybrid):
    model, exported = hybrid
    tokens = _tokens(2, 9)
    generated = exported.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=40, do_sample=False
    )
    expected = megatron_logits(model, generated)[:, 8:-1].argmax(-1)
    assert torch.equal(generated[:, 9:], expected)


def test_generation_goes_on_from_a_kept_cache(hybrid, tmp_path):
    _, exported = hybrid
    tokens = _tokens(2, 30)
    options = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=10, do_sample=False)
    expected = exported.generate(tokens, **options)
    _, cache = in_pieces(exported, tokens[:, :21], [21])
    for _ in range(2):  # a copy is not changed by who goes on from it
        kept = copy.deepcopy(cache)
        assert torch.equal(exported.generate(tokens, past_key_values=kept, **options), expected)
    torch.save(cache, tmp_path / "cache.pt")
    saved = torch.load(tmp_path / "cache.pt", weights_only=False)
    assert saved.num_bytes == cache.num_bytes
    assert torch.equal(exported.generate(tokens, past_key_values=saved, **options), expected)


@pytest.mark.parametrize("plan", [UNEVEN, NO_FA, ALL_FA], ids=["uneven", "no FA", "FA alone"])
@pytest.mark.parametrize("length", [1, 5, 90])
def test_bytes_are_what_the_plan_promises(plan, length):
    model, exported = twins(plan)
    shape = ModelShape.from_config(model.config)
    per_token = cache_bytes_per_token(shape, "fp32").of(plan)
    state = state_bytes(shape, "fp32").of(plan)
    for sizes in ([length], [1] * length):
        _, cache = in_pieces(exported, _tokens(3, length), sizes)
        assert cache.num_bytes == 3 * (length * per_token + state)


class _Recorded(TorchDispatchMode):
    """Each operation with its arguments' shapes."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self.calls.append((str(func), [tuple(x.shape) for x in tensors]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("plan", [NO_FA, ALL_FA], ids=["no FA", "all FA"])
def test_without_full_attention_a_step_is_the_same_at_any_context(plan):
    """So that no token takes longer than the one before; full attention, to compare, does."""
    _, exported = twins(plan)
    tokens, steps = _tokens(1, 141), []
    for length in (40, 140):
        _, cache = in_pieces(exported, tokens[:, :length], [length])
        with torch.no_grad(), _Recorded() as recorded:
            exported(tokens[:, length : length + 1], past_key_values=cache, use_cache=True)
        steps.append(recorded.calls)
    assert len(steps[0]) > 50 and (steps[0] == steps[1]) == (plan is NO_FA)


def test_bytes_in_bfloat16():
    """Recurrent states stay float32."""
    model, exported = twins(UNEVEN)
    shape = ModelShape.from_config(model.config)
    promised = 30 * cache_bytes_per_token(shape).of(UNEVEN) + state_bytes(shape).of(UNEVEN)
    _, cache = in_pieces(exported.to(torch.bfloat16), _tokens(1, 30), [20, *[1] * 10])
    assert cache.num_bytes == promised


def test_bytes_of_a_static_cache():
    """Of all tokens that it has room for, from the first one on."""
    model, exported = twins(UNEVEN)
    shape = ModelShape.from_config(model.config)
    per_token = cache_bytes_per_token(shape, "fp32").of(UNEVEN)
    promised = 3 * (512 * per_token + state_bytes(shape, "fp32").of(UNEVEN))
    for sizes in ([1], [100, 1, 20]):
        _, cache = in_pieces(exported, _tokens(3, sum(sizes)), sizes, max_length=150)
        assert cache.num_bytes == promised
    # Matrix products read at a fifth of the speed where a piece's rows do not begin at 16 bytes.
    assert cache.max_length // PIECES * torch.bfloat16.itemsize % 16 == 0


@pytest.mark.parametrize("max_length", CACHES)
def test_rows_of_a_cache_can_be_chosen_and_repeated(hybrid, max_length):
    _, exported = hybrid
    tokens = _tokens(3, 20)
    chosen = torch.tensor([2, 0])
    for change, rows in (
        (lambda cache: cache.reorder_cache(chosen), chosen),
        (lambda cache: cache.batch_select_indices(chosen), chosen),
        (lambda cache: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
    ):
        expected, _ = in_pieces(exported, tokens[rows], [15, 5])
        _, cache = in_pieces(exported, tokens[:, :15], [15], max_length=max_length)
        change(cache)
        with torch.no_grad():
            logits = exported(tokens[rows, 15:], past_key_values=cache).logits
        torch.testing.assert_close(logits, expected[:, 15:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_length", CACHES)
def test_crop_where_all_heads_are_fa(max_length):
    _, exported = twins(ALL_FA)
    tokens = _tokens(2, 20)
    expected, _ = in_pieces(exported, tokens, [12, 8])
    longer = torch.cat((tokens[:, :12], tokens[:, :6]), dim=1)
    _, cache = in_pieces(exported, longer, [18], max_length=max_length)
    cache.crop(-6)
    with torch.no_grad():
        logits = exported(tokens[:, 12:], past_key_values=cache).logits
    torch.testing.assert_close(logits, expected[:, 12:], rtol=1e-5, atol=1e-5)


def test_assisted_decoding_where_all_heads_are_fa():
    """It takes back what the model would not have written: greedily, it is the model's own."""
    (_, exported), (_, assistant) = twins(ALL_FA), twins(ALL_FA)
    tokens, options = _tokens(1, 12), dict(max_new_tokens=20, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        for parameter in assistant.parameters():  # guesses wrongly now and then
            parameter.add_(0.05 * torch.randn_like(parameter))
    expected = exported.generate(tokens, **options)
    assert not torch.equal(assistant.generate(tokens, **options), expected)
    assert torch.equal(exported.generate(tokens, assistant_model=assistant, **options), expected)


def test_what_a_state_cannot_do_is_said(hybrid):
    _, exported = hybrid
    tokens = _tokens(1, 12)
    _, cache = in_pieces(exported, tokens, [12])
    with pytest.raises(ValueError, match="cannot be cropped from 12 to 7 tokens: recurrent heads"):
        cache.crop(7)
    cache.crop(12)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        exported.generate(tokens, assistant_model=exported, max_new_tokens=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"past_key_values": DynamicCache()}, "is a DynamicCache; a hybrid needs its own"),
        ({"past_key_values": "of another"}, "made for another model"),
        ({"attention_mask": torch.ones(1, 5)}, r"attention_mask is \(1, 5\); a hybrid needs"),
        ({"attention_mask": torch.ones(1, 1, 12, 12)}, r"a hybrid needs \(1, 12\)"),
        ({"past_key_values": "padded"}, "has seen padding: attention_mask must say"),
    ],
)
def test_bad_calls_are_named(hybrid, options, message):
    _, exported = hybrid
    tokens = _tokens(1, 12)
    if options.get("past_key_values") == "of another":
        options = {"past_key_values": HydraCache(twins(NO_FA)[1].config)}
    if options.get("past_key_values") == "padded":
        mask = torch.ones_like(tokens)
        mask[:, :3] = 0
        options = {"past_key_values": in_pieces(exported, tokens, [12], mask)[1]}
    with pytest.raises(ValueError, match=message):
        exported(tokens, **options)


@pytest.mark.parametrize(
    ("batch", "mask"),
    [
        pytest.param(1, None, id="one", marks=pytest.mark.exhaustive),
        pytest.param(2, None, id="whole", marks=pytest.mark.exhaustive),
        pytest.param(2, HOLES[:2], id="padded"),
    ],
)
def test_steps_of_a_static_cache_are_compiled_once(hybrid, batch, mask):
    """In one graph, as CUDA graphs ask, that is right for every later step."""
    model, exported = hybrid
    tokens = _tokens(batch, 40)
    _, cache = in_pieces(
        exported, tokens[:, :34], [34], None if mask is None else mask[:, :34], max_length=40
    )
    torch.compiler.reset()
    step = torch.compile(exported.forward, backend="aot_eager", fullgraph=True)
    logits = []
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(34, 40):
            seen = None if mask is None else padded_mask(mask[:, : i + 1], cache.max_length)
            new = tokens[:, i : i + 1].clone()
            logits.append(step(new, seen, past_key_values=cache, use_cache=True).logits)
    found = torch.cat(logits, dim=1)
    for row, real in enumerate(torch.ones_like(tokens).bool() if mask is None else mask.bool()):
        alone = megatron_logits(model, tokens[row : row + 1, real])[0]
        expected = alone[int(real[:34].sum()) :]
        torch.testing.assert_close(found[row, real[34:]], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_recorded_steps_are_the_models(hybrid):
    """Of every cache and mask, though only what a first step was given is ever run again."""
    _, exported = hybrid
    assert not isinstance(exported.get_compiled_call(None), RecordedSteps), "no GPU, no record"
    tokens, num_records = _tokens(2, 40), 0

    def record(run):
        nonlocal num_records
        num_records += 1
        output = CausalLMOutputWithPast(logits=torch.empty(2, 1, exported.vocab_size))
        return (lambda: output.logits.copy_(run().logits)), output

    steps = RecordedSteps(exported, record)
    for mask, changes in ((None, False), (HOLES[:2], False), (HOLES[:2], True)):
        seen = [None if mask is None else mask[:, :i] for i in range(41)]
        expected, _ = in_pieces(exported, tokens, [30, *[1] * 10], mask, max_length=40)
        prompt, cache = in_pieces(exported, tokens[:, :30], [30], seen[30], max_length=40)
        logits, before = [prompt], num_records
        for i in range(30, 40):
            if changes and i == 35:  # to other places in memory
                earlier = [layer.tensors() for layer in cache.layers]  # not to be used again
                cache.batch_repeat_interleave(2)
                cache.batch_select_indices(torch.tensor([0, 2]))
                del earlier
            new = {"input_ids": tokens[:, i : i + 1].clone(), "use_cache": True, CACHE: cache}
            if mask is not None:
                new["attention_mask"] = padded_mask(seen[i + 1], cache.max_length)
            logits.append(steps(**new).logits)
        assert num_records == before + 1 + changes
        real = torch.ones_like(tokens).bool() if mask is None else mask.bool()
        assert torch.equal(torch.cat(logits, dim=1)[real], expected[real])
    found = [steps(**new, output_hidden_states=True) for _ in range(3)]
    assert all(len(each.hidden_states) == len(exported.model.layers) + 1 for each in found)
    steps(new.pop("input_ids"), **new)
    assert num_records == 4, "what returns more, or is called otherwise, is not recorded"


def test_what_a_static_cache_cannot_do_is_said(hybrid):
    _, exported = hybrid
    tokens = _tokens(1, 514)
    _, cache = in_pieces(exported, tokens[:, :512], [511, 1], max_length=60)
    for length in (1, 2):
        with pytest.raises(ValueError, match=rf"room for 512 tokens, not for {512 + length}$"):
            exported(tokens[:, 512 : 512 + length], past_key_values=cache)
    _, cache = in_pieces(exported, tokens[:, :10], [10], max_length=60)
    with pytest.raises(ValueError, match="needs a row per sequence and 11 to 512 columns"):
        exported(tokens[:, :1], torch.ones(1, 10), past_key_values=cache)
    with pytest.raises(ValueError, match="'offloaded'; a hybrid has a dynamic and a static cache"):
        exported.generate(tokens, cache_implementation="offloaded", max_new_tokens=2)
    with pytest.raises(ValueError, match="were both given; one of them decides"):
        exported.generate(
            tokens, past_key_values=cache, cache_implementation="static", max_new_tokens=2
        )
