"""The exported model's logits are Megatron's, at every switch and for plans of every shape."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

import pytest
import torch

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from kit.exported import ALL_FA, NO_FA, SWITCHES, UNEVEN, megatron_logits, twins  # noqa: E402
from kit.tiny import token_batch  # noqa: E402

import megatron_hydra.export  # noqa: E402
from megatron_hydra.export import configuration_hydra, mixers_hydra  # noqa: E402
from megatron_hydra.export.config import NAMES, SAME  # noqa: E402
from megatron_hydra.model.mixers.kinds import KINDS  # noqa: E402
from megatron_hydra.teachers.config_json import SHAPE_FIELDS  # noqa: E402


def _expect_equal(plan, **overrides):
    model, exported = twins(plan, **overrides)
    tokens, _ = token_batch(exported.config, batch=2, length=70)
    expected = megatron_logits(model, tokens)
    assert expected.std() > 0.3, "logits too small for the comparison to mean something"
    with torch.no_grad():
        logits = exported(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("overrides", SWITCHES, ids=lambda switches: " ".join(switches) or "-")
def test_logits_at_every_switch(overrides):
    _expect_equal(UNEVEN, **overrides)


@pytest.mark.parametrize("plan", [NO_FA, ALL_FA], ids=["no FA head", "FA heads alone"])
def test_logits_of_plans_at_the_ends(plan):
    _expect_equal(plan)


@pytest.mark.parametrize("la_kind", ["kda", "sliding_window"])
def test_a_plan_leaves_the_kind_of_its_la_heads_to_the_model(la_kind):
    _expect_equal(UNEVEN, la_kind=la_kind)


def test_attention_implementations_are_equal():
    _, exported = twins()
    tokens, _ = token_batch(exported.config)
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    logits = {}
    for name in ("eager", "sdpa"):
        exported.set_attn_implementation(name)
        assert exported.model.config._attn_implementation == name
        with torch.no_grad():
            logits[name] = exported(tokens, mask).logits[mask.bool()]
    assert not torch.equal(*logits.values()), "one of them has not run"
    torch.testing.assert_close(*logits.values(), rtol=1e-5, atol=1e-5)


def test_queries_are_scaled_where_megatron_scales_them():
    model, exported = twins()
    tokens, _ = token_batch(exported.config)
    in_eval = exported(tokens).logits
    expected = megatron_logits(model.train(), tokens)
    logits = exported.train()(tokens).logits
    assert (logits - in_eval).abs().max() > 1e-3
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_every_field_of_a_checkpoint_has_a_place_in_the_exported_configuration():
    """An argument that it does not know it would keep all the same, and nobody would read it."""
    own = {"self", "head_kinds", "initializer_range", "use_cache", "kwargs"}
    known = inspect.signature(configuration_hydra.HydraHeadConfig.__init__).parameters.keys() - own
    assert {*NAMES.values(), *SAME} == known
    assert {*SHAPE_FIELDS} <= {*NAMES, *SAME}


def test_every_kind_of_head_is_exported_and_in_the_same_order():
    """The order decides where the fusion finds a head's output."""
    assert tuple(KINDS) == configuration_hydra.KINDS == tuple(mixers_hydra.MIXERS)


def test_model_code_stands_alone():
    """Nothing but PyTorch and transformers, fla where it is used, and its own files beside it."""
    folder = Path(megatron_hydra.export.__file__).parent
    files = sorted(folder.glob("*_hydra.py"))
    assert len(files) == 7
    for file in files:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level:
                assert (folder / f"{node.module}.py") in files
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            packages = {name.split(".")[0] for name in names}
            assert packages <= {"torch", "transformers", "fla", *sys.stdlib_module_names}, file
