"""The exported model trains: the loss, its gradients, and new weights."""

from __future__ import annotations

import copy

import pytest
import torch

from megatron_hydra.cpu import install_if_needed

install_if_needed()

import torch.nn.functional as F  # noqa: E402
from kit.exported import twins  # noqa: E402
from kit.tiny import token_batch  # noqa: E402

from megatron_hydra.export.cache_hydra import HydraCache  # noqa: E402
from megatron_hydra.export.modeling_hydra import HydraForCausalLM  # noqa: E402


def _gradients(exported, tokens, mask=None):
    exported.zero_grad()
    loss = exported(tokens, mask, labels=tokens).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in exported.named_parameters()}


def test_gradients_are_megatrons():
    # Without norms per head, which would take a sink's effect off again.
    model, exported = twins(share_embeddings_and_output_weights=False, fusion="none")
    tokens, positions = token_batch(exported.config)
    loss, gradients = _gradients(exported.train(), tokens)
    logits = model.train()(tokens, positions, None)[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    expected.backward()
    assert abs(loss - expected.item()) < 1e-5
    for name, theirs in (
        ("model.embed_tokens.weight", model.embedding.word_embeddings.weight),
        ("model.layers.0.self_attn.la.A_log", _mixer(model, 0, "linear").A_log),
        ("model.layers.1.self_attn.kda.decay_up", _mixer(model, 1, "kimi_delta").decay_up),
        ("model.layers.1.self_attn.window.sink", _mixer(model, 1, "sliding_window").sink),
        ("model.layers.0.self_attn.fa.k_norm.weight", _mixer(model, 0, "full").k_layernorm.weight),
    ):
        scale = theirs.grad.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(gradients[name], theirs.grad, rtol=1e-4, atol=1e-4 * scale)


def _mixer(model, layer, name):
    return getattr(model.decoder.layers[layer].self_attention, f"{name}_attention")


def test_gradient_checkpointing_changes_nothing():
    _, exported = twins()
    tokens, _ = token_batch(exported.config, length=150)
    mask = torch.ones_like(tokens)
    mask[0, :30] = 0
    exported.train()
    expected = _gradients(exported, tokens, mask)
    calls = []
    exported.gradient_checkpointing_enable()
    mlp = exported.model.layers[0].mlp
    hook = mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    loss, gradients = _gradients(exported, tokens, mask)
    hook.remove()
    assert len(calls) == 2, "a layer runs again in the backward pass"
    assert loss == expected[0]
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-5, atol=1e-7)


def test_a_model_in_training_generates_while_it_checkpoints():
    """Without gradients no layer runs again; with them a cache would count its tokens twice."""
    _, exported = twins(fa_query_scale="none")  # which training alone leaves out else
    tokens, _ = token_batch(exported.config)
    options = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=9, do_sample=False)
    expected = exported.generate(tokens, **options)
    exported.train().gradient_checkpointing_enable()
    assert torch.equal(exported.generate(tokens, **options), expected)
    with pytest.raises(ValueError, match="runs each layer again, which a cache would count"):
        exported(tokens, past_key_values=HydraCache(exported.config))


def test_mixed_precision_by_autocast():
    """As transformers' Trainer computes with bf16=True: no further off than weights in bfloat16."""
    _, exported = twins()
    exported.train()
    tokens, _ = token_batch(exported.config, length=150)
    loss, expected = _gradients(exported, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        mixed_loss, mixed = _gradients(exported, tokens)
    half_loss, half = _gradients(copy.deepcopy(exported).bfloat16(), tokens)
    assert 0 < abs(mixed_loss - loss) < 0.01 * loss
    distances = [
        sum((found[name].float() - x).square().sum() for name, x in expected.items()).sqrt()
        for found in (mixed, half)
    ]
    assert 0 < distances[0] < distances[1]
    assert all(gradient.dtype == torch.float32 for gradient in mixed.values())


def test_new_weights_start_where_megatrons_do():
    config = twins()[1].config
    torch.manual_seed(0)
    layers = HydraForCausalLM(config).model.layers
    la, kda, window = layers[0].self_attn.la, layers[1].self_attn.kda, layers[1].self_attn.window
    for mixer in (la, kda):
        rate, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
        assert rate.min() >= 0.99 and rate.max() <= 16.01 and rate.std() > 0.1
        assert dt.min() >= 0.99e-3 and dt.max() <= 1.01e-1 and dt.std() > 1e-3
        taps = mixer.conv_weight
        assert (taps[:, -1] == 1).all() and (taps[:, :-1] == 0).all()
    assert kda.decay_up.std() > 0.01 and (window.sink == 0).all()
    assert (layers[0].self_attn.head_scale == 1).all() and la.q_proj.weight.std() > 0.01
