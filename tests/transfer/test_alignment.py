"""Stage 1: the target is the teacher's own attention, layer by layer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kit.plans import all_fa
from kit.teachers import by_head
from kit.tiny import tiny_config, tiny_plan, token_batch

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.build import build_model
from megatron_hydra.model.config import recompute_fields
from megatron_hydra.model.sequence import packed_sequence
from megatron_hydra.parallel import initialize_model_parallel
from megatron_hydra.teachers.weight_reuse import reuse_teacher_weights
from megatron_hydra.transfer.alignment import Alignment

IDENTITY = dict(fa_rope=True, fusion="none", fa_output_gate=False, fa_query_scale="none")


def _pair(plan: HeadPlan, **overrides):
    """A teacher and a hybrid that carries its weights."""
    initialize_model_parallel()
    config = tiny_config(init_method_std=0.2, **overrides)
    teacher = build_model(dataclasses.replace(config), None)
    student = build_model(config, plan)
    reuse_teacher_weights(student, by_head(teacher))
    return teacher, student


def test_identity_student_has_no_loss():
    teacher, student = _pair(all_fa(2, 8, 4), **IDENTITY)
    losses = Alignment(student, teacher).forward(*token_batch(student.config))
    assert list(losses) == ["layer_00", "layer_01"]
    assert max(losses.values()) < 1e-12


def test_target_is_the_teachers_attention_output_and_layers_are_independent():
    teacher, student = _pair(tiny_plan())
    tokens, positions = token_batch(student.config)
    outputs, inputs = [], []

    def keep(module, args, output):
        inputs.append(args[0])
        outputs.append(output[0])

    hooks = [layer.self_attention.register_forward_hook(keep) for layer in teacher.decoder.layers]
    with torch.no_grad():
        teacher(tokens, positions, None)
    for hook in hooks:
        hook.remove()
    rotary = teacher.rotary_pos_emb(tokens.shape[1])
    expected = [
        (layer.self_attention(x, rotary_pos_emb=rotary)[0] - y).square().mean(-1).sum()
        for layer, x, y in zip(student.decoder.layers, inputs, outputs, strict=True)
    ]
    alignment = Alignment(student, teacher)
    found = alignment.forward(tokens, positions)
    torch.testing.assert_close(list(found.values()), expected)

    found["layer_00"].backward()
    of_layer = [list(layer.self_attention.parameters()) for layer in student.decoder.layers]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in of_layer[0])
    assert all(p.grad is None for p in of_layer[1])


@pytest.mark.parametrize("packed", [False, True])
def test_full_recomputation_is_bit_equal_and_keeps_less(packed: bool) -> None:
    results, kept = [], []
    for recompute in (("none",), ("full",), ("full", 1)):
        teacher, student = _pair(tiny_plan(), **recompute_fields(*recompute))
        tokens, positions = token_batch(student.config)
        weights, packing = None, None
        if packed:
            tokens, positions = tokens.flatten()[None], positions.flatten()[None]
            weights = (positions != 5).float()
            packing = packed_sequence(torch.tensor([0, 7, 24, 48]))
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: saved.append(x) or x, lambda x: x
        ):
            losses = Alignment(student, teacher).forward(tokens, positions, packing, weights)
        torch.stack(list(losses.values())).sum().backward()
        gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        results.append({**losses, **gradients})
        storages = [x.untyped_storage() for x in saved]
        kept.append(sum({each.data_ptr(): each.nbytes() for each in storages}.values()))
    assert results[0].keys() == results[1].keys() and len(results[0]) > 4
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name
        assert torch.equal(results[2][name], value), name
    assert kept[1] < kept[0] / 10
    assert kept[0] * 0.2 < kept[2] < kept[0] * 0.8  # one of two layers


def test_only_attention_trains_and_training_lowers_the_loss():
    teacher, student = _pair(tiny_plan())
    alignment = Alignment(student, teacher)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trained and all(".self_attention." in name for name in trained)
    assert not any(p.requires_grad for p in teacher.parameters())
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    optimizer = torch.optim.Adam((p for p in student.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = torch.stack(list(alignment.forward(*token_batch(student.config)).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())


def test_a_student_of_another_teacher_is_refused():
    teacher, student = _pair(tiny_plan())
    with torch.no_grad():
        student.decoder.layers[1].mlp.linear_fc2.weight.add_(1e-3)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.linear_fc2\.weight differs"):
        Alignment(student, teacher)
