"""Kernels compiled beforehand, and LA heads that no kernel takes, said before anything runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hydra_kernels import warm_up
from hydra_kernels.gated_delta_rule.compilation import Mode
from hydra_kernels.la_preparation import triton_la_preparation
from hydra_tools import cli
from kit.kernel_launches import call_in_process, recorded_launches, unknown
from kit.tiny import tiny_config, tiny_plan
from uneven_plan import PINNED_COUNTS, layers_by_count, uneven_plan

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.build import build_model, load_kernels
from megatron_hydra.model.kernel_choice import check_la_heads
from megatron_hydra.model.mixers import gated_delta_net
from megatron_hydra.model.sequence import packed_sequence
from megatron_hydra.parallel import initialize_model_parallel
from megatron_hydra.teachers.loading import megatron_fields


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--head-dim 320", "--head-dim: impl='fla' takes head dimensions up to 256, got 320"),
        ("--head-dim 128 33", "--head-dim is 33: must be even, 2 or more"),
        ("--head-dim 0", "--head-dim is 0: must be even, 2 or more"),
    ],
)
def test_wrong_dimensions_are_named(capsys: pytest.CaptureFixture[str], options: str, message: str):
    assert cli.main(["warm-up", *options.split()]) == 2
    assert capsys.readouterr().err == f"megatron-hydra: error: {message}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_machine_without_a_gpu_is_told(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["warm-up"]) == 2
    assert "PyTorch finds none" in capsys.readouterr().err


def _config(**fields) -> SimpleNamespace:
    defaults = dict(
        kv_channels=128, seq_length=2**17, context_parallel_size=1, fused_kernels="auto"
    )
    return SimpleNamespace(**(defaults | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_channels": 320}, r"^layer 4 has 13 LA heads .* dimensions up to 256, got 320$"),
        ({"seq_length": 2**24}, r"^layer 4 has 13 LA heads .* 16777216 tokens .* context parallel"),
        (
            {"kv_channels": 33, "fused_kernels": "triton"},
            r"^layer 4 has 13 LA heads of dimension 33, .* set fused_kernels to 'reference'$",
        ),
    ],
)
def test_heads_that_no_kernel_takes_are_named(
    monkeypatch: pytest.MonkeyPatch, fields: dict, message: str
):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match=message):
        check_la_heads(_config(**fields), "fla", 5, 13)
    check_la_heads(_config(**fields), "fla", 5, 0)  # a rank without LA heads
    check_la_heads(_config(**fields), "reference", 5, 13)


def test_ranks_of_a_context_share_a_long_sequence():
    check_la_heads(_config(seq_length=2**24, context_parallel_size=4), "fla", 1, 16)


def test_every_layer_loads_what_it_calls(monkeypatch: pytest.MonkeyPatch):
    """Of layers with different numbers of heads; FA heads and windows have nothing to load."""
    initialize_model_parallel()
    kinds = {0: {"kda": (0,), "sliding_window": (3,)}, 1: {}}
    model = build_model(tiny_config(seq_length=128), tiny_plan(other_kinds=kinds))
    loaded = []
    monkeypatch.setattr(gated_delta_net, "load", lambda *args: loaded.append(args))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    load_kernels(model, 2)
    assert loaded == []  # on the reference
    for mixer in model.modules():
        if isinstance(mixer, gated_delta_net.GatedDeltaNet):
            mixer.impl = "fla"
    load_kernels(model, 2)
    modes = [Mode(8, 8, torch.float32, False, of_channels) for of_channels in (False, True)]
    device = torch.device("cuda", 0)
    # Layer 0 has three heads of Gated DeltaNet and one of KDA, layer 1 four of Gated DeltaNet.
    assert sorted(loaded, key=repr) == sorted(
        [(modes[0], 6, 128, device), (modes[1], 2, 128, device), (modes[0], 8, 128, device)],
        key=repr,
    )


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_every_kernel_of_la_preparation_is_among_those_compiled(head_dim: int):
    """Whatever the number of heads and tokens; more than 16 heads have wider gates."""
    weight = torch.empty(1, 4)

    def kernels(num_heads: int, rows: int, num_tokens: int) -> set[tuple]:
        x = torch.empty(rows, num_tokens, 3 * num_heads * head_dim, device="meta")
        module = triton_la_preparation
        passes = (
            (module._HALF_TILE_FORWARD, module._LONGEST_FORWARD),
            (module._HALF_TILE_BACKWARD, module._LONGEST_BACKWARD),
        )
        launches = [module._launch(x, num_heads, weight, *sizes) for sizes in passes]
        assert all(strip % 16 == 0 for _, strip, _ in launches)  # for others Triton compiles anew
        return {(i, *sorted(sizes.items())) for i, (_, _, sizes) in enumerate(launches)}

    compiled = kernels(warm_up.NUM_HEADS, 1, 1024)
    for num_heads in range(1, 17):
        for rows in (1, 2, 4):
            for num_tokens in (1, 100, 1024, 3000, 4096, 8192, 20000, 2**17, 2**19):
                assert kernels(num_heads, rows, num_tokens) <= compiled


@pytest.mark.skipif(torch.cuda.is_available(), reason="records on a CPU what a GPU would run")
def test_a_training_step_launches_what_is_compiled(monkeypatch: pytest.MonkeyPatch):
    """In a process of its own, whose kernels are made for a GPU."""
    monkeypatch.delenv("TRITON_INTERPRET")
    torch.multiprocessing.spawn(call_in_process, (__name__, "_check_launches"))


def _check_launches() -> None:
    """Of a scored plan's layers, packed or not, batches of one and of several."""
    device, dtype = torch.device("cpu"), torch.bfloat16
    with recorded_launches() as compiled:
        warm_up.run_layer_operators(Mode(128, 128, dtype, False), device)
    layers = layers_by_count(uneven_plan(112))
    plan = HeadPlan(tuple(layers[count] for count in PINNED_COUNTS), 8)
    initialize_model_parallel()
    with recorded_launches() as launched:
        config = tiny_config(
            **{
                **megatron_fields(dtype), "num_layers": len(plan.layers),
                "num_attention_heads": 16, "num_query_groups": 8, "kv_channels": 128,
                "fused_kernels": "triton",
            }
        )  # fmt: skip
        model = build_model(config, plan).bfloat16()
        for batch, documents in ((1, None), (2, None), (1, [0, 1, 30, 64])):
            tokens = torch.randint(config.vocab_size, (batch, 64))
            positions = torch.arange(64).expand(batch, -1)
            packing = None if documents is None else packed_sequence(torch.tensor(documents))
            losses = model(tokens, positions, None, labels=tokens, packed_seq_params=packing)
            losses.float().sum().backward()
    assert launched
    assert unknown(launched, compiled) == []


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("with_state, of_channels", [(False, False), (True, False), (True, True)])
def test_operators_run_as_a_layer_calls_them(
    with_state: bool, of_channels: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(warm_up, "NUM_HEADS", 2)  # the interpreter takes seconds per head
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mode = Mode(8, 8, torch.float32, with_state, of_channels)
    warm_up.run_layer_operators(mode, device, num_tokens=4)
