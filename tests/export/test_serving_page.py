"""What docs/serving.md says of shapes and bytes, held to the cache and to the costs."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from kit.exported import UNEVEN, WINDOW, twins  # noqa: E402

from megatron_hydra.export import modeling_hydra, recurrence_hydra  # noqa: E402
from megatron_hydra.export.cache_hydra import HydraCache  # noqa: E402
from megatron_hydra.model.mixers.costs import COSTS, CostModel  # noqa: E402

PAGE = (Path(__file__).parents[2] / "docs/serving.md").read_text("utf-8")
ROWS, TOKENS = 2, 9


def test_every_kept_tensor_has_the_shape_of_the_page():
    _, model = twins(UNEVEN)
    config, cache = model.config, HydraCache(model.config)
    with torch.no_grad():
        model(torch.zeros(ROWS, TOKENS, dtype=torch.long), past_key_values=cache)
    d, past = config.head_dim, config.la_conv_kernel_size - 1
    kinds = "gated_delta_net", "kda"
    seen = set()
    for layer, kept in enumerate(cache.layers):
        groups = len(config.stored_groups(layer))
        assert kept.keys.shape == kept.values.shape == (ROWS, groups, TOKENS, d)
        for name, state in kept.states.items():
            what, index = name.rstrip("]").split("[")
            kind = "sliding_window" if what == "window" else kinds[int(index)]
            n = len(config.heads_of(layer, kind))
            shapes = {"recurrent_states": (n, d, d), "conv_states": (3 * n * d, past)}
            shape = shapes.get(what, (WINDOW, n, d))
            assert state.shape == (ROWS, *shape), name
            assert state.dtype == torch.float32
            assert f"`{name}`" in PAGE
            seen.add(name)
    assert seen == {f"{what}[{index}]" for what in ("recurrent_states", "conv_states", "window")
                    for index in (0, 1)}  # fmt: skip


def test_the_bytes_are_those_of_the_costs():
    model = CostModel(2048, 128, la_conv_kernel_size=4, sliding_window_tokens=512)
    group = 2 * 128 * 2
    state = COSTS["gated_delta_net"].state_bytes(model, 2)
    assert COSTS["kda"].state_bytes(model, 2) == state
    window = COSTS["sliding_window"].state_bytes(model, 2)
    for words, value in (("query group", group), ("Kimi head", state), ("-window head", window)):
        (line,) = (line for line in PAGE.splitlines() if f"{words}, per" in line)
        assert line.endswith(f"| {value:,.0f} |")
    assert f"values of {2 * state / group:.0f} tokens" in PAGE.replace("\n", " ")


def test_the_names_that_the_page_gives_are_there():
    assert all(f"`{name}`" in PAGE for name in modeling_hydra.FLOAT32)
    source = inspect.getsource(recurrence_hydra)
    for name in ("chunk_gated_delta_rule", "chunk_kda"):
        assert name in source and f"`{name}`" in PAGE
