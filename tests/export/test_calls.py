"""What callers of transformers may ask of a model beyond logits, and how they may ask."""

from __future__ import annotations

import copy
import inspect
import weakref

import pytest
import torch

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from kit.exported import HOLES, UNEVEN, in_pieces, twins  # noqa: E402
from kit.tiny import tiny_config, token_batch  # noqa: E402
from transformers import cache_utils  # noqa: E402
from transformers.cache_utils import CacheLayerMixin  # noqa: E402

from megatron_hydra.export.cache_hydra import NUM_STATES, HydraCache  # noqa: E402
from megatron_hydra.export.stream_hydra import CACHE  # noqa: E402


@pytest.fixture(scope="module")
def hybrid():
    return twins()[1]


@pytest.fixture
def asked(hybrid):
    """With a configuration of its own."""
    return copy.deepcopy(hybrid)


def _tokens():
    return token_batch(tiny_config(), 3, 40)[0]


@torch.no_grad()
def test_hidden_states_by_call_and_by_configuration(hybrid, asked):
    found = []
    hook = hybrid.model.layers[1].register_forward_pre_hook(lambda _, args: found.append(args[0]))
    expected = hybrid(_tokens(), output_hidden_states=True).hidden_states
    hook.remove()
    assert hybrid(_tokens()).hidden_states is None
    asked.config.output_hidden_states = True
    for states in (expected, asked(_tokens()).hidden_states, asked.model(_tokens()).hidden_states):
        assert len(states) == 3 and all(map(torch.equal, states, expected))
    assert torch.equal(expected[1], found[0]) and not torch.equal(expected[0], expected[1])
    assert torch.equal(hybrid.lm_head(expected[-1]), hybrid(_tokens()).logits)
    assert asked(_tokens(), output_hidden_states=False).hidden_states is None


@torch.no_grad()
def test_a_tuple_by_call_and_by_configuration(hybrid, asked):
    expected = hybrid(_tokens()).logits
    asked.config.return_dict = False
    for found in (hybrid(_tokens(), return_dict=False), asked(_tokens())):
        assert isinstance(found, tuple) and torch.equal(found[0], expected)
    assert torch.equal(asked(_tokens(), return_dict=True).logits, expected)
    states = hybrid.model(_tokens(), return_dict=False)[0]
    assert torch.equal(hybrid.lm_head(states), expected)


def test_attention_weights_are_refused(hybrid, asked):
    with pytest.raises(ValueError, match="a hybrid returns no attention weights"):
        hybrid(_tokens(), output_attentions=True)
    asked.set_attn_implementation("eager")
    asked.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions is asked for"):
        asked(_tokens())
    assert asked(_tokens(), output_attentions=False).logits.shape == (3, 40, 64)


def test_shapes_without_storage(asked):
    assert asked.to("meta")(_tokens().to("meta")).logits.shape == (3, 40, 64)


@torch.no_grad()
def test_no_layers_input_outlives_it(hybrid):
    """All layers' together are gigabytes of a long prompt."""
    held = []
    hooks = [
        hybrid.model.embed_tokens.register_forward_hook(
            lambda *args: held.append(weakref.ref(args[2]))
        ),
        hybrid.model.norm.register_forward_pre_hook(lambda *args: held.append(held[0]())),
    ]
    hybrid(_tokens())
    for hook in hooks:
        hook.remove()
    assert len(held) == 2 and held[1] is None


@pytest.mark.parametrize("kept", ["dynamic", "static"])
def test_embeddings_generate_what_their_tokens_do(hybrid, kept):
    tokens, mask = _tokens(), HOLES
    options = dict(
        attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0,
        cache_implementation=kept,
    )  # fmt: skip
    expected = hybrid.generate(tokens, **options)[:, 40:]
    embeddings = hybrid.get_input_embeddings()(tokens)
    assert torch.equal(hybrid.generate(inputs_embeds=embeddings, **options), expected)
    assert len(expected.unique()) > 5, "too dull to compare"


def test_a_layers_cache_is_transformers_own_where_that_takes_several_states():
    own = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", None)
    if own is None or "number_of_states" not in inspect.signature(own.__init__).parameters:
        own = CacheLayerMixin
    _, cache = in_pieces(twins(UNEVEN)[1], _tokens(), [39, 1])
    seen = set()
    for layer in cache.layers:
        assert isinstance(layer, own)
        for index in range(NUM_STATES):
            state, inputs = layer.recurrent_states[index], layer.conv_states[index]
            assert (state is None) == (inputs is None)
            assert layer.states.get(f"recurrent_states[{index}]") is state
            assert layer.states.get(f"conv_states[{index}]") is inputs
            seen |= set() if state is None else {index}
    assert seen == {*range(NUM_STATES)}


def test_gradients_pass_a_cache_and_inference_mode_may_have_begun_it():
    exported, tokens = twins(UNEVEN)[1], _tokens()
    exported(tokens).logits[:, -1].square().sum().backward()
    expected = {name: x.grad.clone() for name, x in exported.named_parameters()}
    exported.zero_grad()
    cache = HydraCache(exported.config)
    for piece in tokens.split(7, dim=1):
        found = exported(piece, use_cache=True, **{CACHE: cache})
    found.logits[:, -1].square().sum().backward()
    for name, x in exported.named_parameters():
        assert (x.grad - expected[name]).norm() < 1e-3 * expected[name].norm() + 1e-5, name
    cache = HydraCache(exported.config)
    with torch.inference_mode():
        exported(tokens[:, :7], use_cache=True, **{CACHE: cache})
    with torch.no_grad():
        after = exported(tokens[:, 7:], use_cache=True, **{CACHE: cache}).logits
        torch.testing.assert_close(after, exported(tokens).logits[:, 7:], rtol=1e-5, atol=1e-5)
