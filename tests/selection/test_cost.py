"""Tests of the costs: against counted tensors, parameters and FLOPs of models that are built."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from megatron_hydra import cpu
from megatron_hydra.errors import UserError

cpu.install_if_needed()

from kit.plans import all_fa  # noqa: E402
from kit.tiny import FA_HEADS, tiny_config, tiny_plan  # noqa: E402
from kit.tiny_qwen3 import TINY_SHAPE  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from megatron_hydra.head_plan import HeadPlan  # noqa: E402
from megatron_hydra.model.build import build_model  # noqa: E402
from megatron_hydra.schema import from_json  # noqa: E402
from megatron_hydra.selection.cost import (  # noqa: E402
    DEVICES,
    GIB,
    Device,
    ServeDtype,
    cache_bytes_per_token,
    costs_of,
    decode_bounds,
    decode_seconds,
    flops_of_sequence,
    flops_per_token,
    state_bytes,
    total_cache_bytes,
    training_step_seconds,
    weight_bytes,
    weight_bytes_read,
)
from megatron_hydra.selection.shape import ModelShape  # noqa: E402

QWEN3_1P7B = ModelShape(28, 16, 8, 128, 2048, 6144, 151936, True)

pytestmark = pytest.mark.usefixtures("one_rank_of_module")


def matrices(plan: HeadPlan | None, **fields: Any) -> dict[str, torch.Tensor]:
    """The weight matrices of a built model, shared ones once."""
    model = build_model(tiny_config(**fields), plan)
    found = {name: value for name, value in model.named_parameters() if value.dim() > 1}
    for index, layer in enumerate(model.decoder.layers if plan is not None else ()):
        # Rows that only fill up the projection are not reckoned with: 15 at most.
        name = f"decoder.layers.{index}.self_attention.in_proj.weight"
        found[name] = found[name][: layer.self_attention.layout.padding_rows.start]
    return found


def test_the_shape_follows_the_configuration() -> None:
    config = tiny_config(num_query_groups=2, la_conv_kernel_size=3)
    shape = ModelShape.from_config(config)
    assert shape == ModelShape(2, 8, 2, 8, 32, 48, 64, True, 3)
    data = json.loads(json.dumps(dataclasses.asdict(shape)))
    assert from_json(ModelShape, data, "shape") == shape
    earlier = {**data, "value_bytes": 4}
    assert from_json(ModelShape, earlier, "shape") == shape
    assert ModelShape.from_config(tiny_config(la_short_conv=False)).conv_kernel_size == 0
    half = tiny_config(params_dtype=torch.bfloat16, bf16=True, pipeline_dtype=torch.bfloat16)
    assert ModelShape.from_config(half) == ModelShape.from_config(tiny_config())
    assert (shape.total_heads, shape.total_groups, shape.heads_per_group) == (16, 4, 4)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("num_layers", 0, "num_layers is 0; it must be 1 or more"),
        ("head_dim", 2.0, "head_dim is 2.0; an integer is needed"),
        ("conv_kernel_size", -1, "conv_kernel_size is -1; it must be 0 or more"),
        ("tied_embeddings", 1, "tied_embeddings is 1; true or false is needed"),
        ("num_query_groups", 3, "16 heads are not divisible by 3 query groups"),
    ],
)
def test_bad_shapes_are_refused(field: str, value: object, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(QWEN3_1P7B, **{field: value})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("plan", [None, tiny_plan(), tiny_plan({1: (0,)})])
def test_weights_are_those_of_the_built_model(plan: HeadPlan | None, tied: bool) -> None:
    fields = {"share_embeddings_and_output_weights": tied}
    found = matrices(plan, **fields)
    nbytes = sum(value.nbytes for value in found.values())
    shape = ModelShape.from_config(tiny_config(**fields))
    assert weight_bytes(shape, "fp32").of(plan) == nbytes
    looked_up = 0 if tied else found["embedding.word_embeddings.weight"].nbytes
    assert weight_bytes_read(shape, "fp32").of(plan) == nbytes - looked_up


@pytest.mark.parametrize(
    ("dtype", "served"),
    [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)],
)
def test_cache_and_state_are_the_bytes_of_tensors_that_hold_them(
    dtype: ServeDtype, served: torch.dtype
) -> None:
    """Keys and values of the groups with an FA head; a matrix and past inputs of each LA head.

    The configuration is of float32 weights: what serves decides, but for the state's matrices.
    """
    length, d = 100, 8
    groups = [{head // 2 for head in heads} for heads in FA_HEADS.values()]
    cache = [torch.empty(2, length, d, dtype=served) for layer in groups for _ in layer]
    num_la_heads = 16 - sum(map(len, FA_HEADS.values()))
    state = [(torch.empty(d, d), torch.empty(3, d, 3, dtype=served)) for _ in range(num_la_heads)]
    shape = ModelShape.from_config(tiny_config())
    cache_bytes = sum(tensor.nbytes for tensor in cache)
    held = sum(tensor.nbytes for head in state for tensor in head)
    assert (cache_bytes_per_token(shape, dtype) * length).of(tiny_plan()) == cache_bytes
    assert state_bytes(shape, dtype).of(tiny_plan()) == held
    assert total_cache_bytes(shape, length, dtype).of(tiny_plan()) == cache_bytes + held
    assert state_bytes(shape, dtype).of(None) == 0
    costs = costs_of(shape, tiny_plan(), length, "h100", dtype)
    assert (costs.kv_cache_bytes, costs.state_bytes) == (cache_bytes, held)
    assert costs.serve_dtype == dtype


@pytest.mark.parametrize("tied", [True, False])
def test_teacher_flops_are_those_that_pytorch_counts(tied: bool) -> None:
    length = 48
    config = Qwen3Config(**{**TINY_SHAPE, "tie_word_embeddings": tied}, attn_implementation="eager")
    model = Qwen3ForCausalLM(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long))
    shape = ModelShape(2, 4, 2, 16, 32, 48, 264, tied)
    # The eager model multiplies the masked half of the square of positions, too.
    masked_half = 2 * 4 * 2 * length**2 * 16
    rotary_angles = 2 * length * 16 // 2
    counted = counter.get_total_flops() - masked_half - rotary_angles
    assert flops_of_sequence(shape, length).teacher == counted


@pytest.mark.parametrize("hidden_size", [32, 64])
def test_hybrid_flops_are_of_its_matrices_its_fa_square_and_its_la_rule(hidden_size: int) -> None:
    fields = {"hidden_size": hidden_size}
    shape, plan = ModelShape.from_config(tiny_config(**fields)), tiny_plan()
    lengths = [64, 128, 192]
    flops = [flops_of_sequence(shape, length).of(plan) for length in lengths]
    # 2 d T^2 per head, for QK^T and PV over half the square; all else grows with T.
    square = 2 * 8 * 64**2 * plan.num_fa_heads
    assert flops[2] - 2 * flops[1] + flops[0] == 2 * square
    num_values = sum(
        value.numel() for name, value in matrices(plan, **fields).items() if "conv" not in name
    )
    rule = (flops[0] - square) / 64 - 2 * num_values
    # The convolution's taps, five chunk-wide and three state-wide products and a triangular
    # system, whatever the hidden size: see placement's CostModel.
    assert rule == (16 - plan.num_fa_heads) * (6 * 4 * 8 + 10 * 64 * 8 + 6 * 8 * 8 + 64 * 64)
    assert flops_per_token(shape, 64).of(plan) == pytest.approx(flops[0] / 64)


def test_a_hybrid_with_fa_heads_alone_has_the_teachers_flops_and_gates() -> None:
    shape = ModelShape.from_config(tiny_config())
    gates = 64 * 2 * 32 * 8 * 16
    flops = flops_of_sequence(shape, 64)
    assert flops.of(all_fa(2, 8, 4)) == flops.of(None) + gates


def test_decoding_takes_as_long_as_its_bytes_take_to_move() -> None:
    length, device = 512, Device("slow memory", 1e3, 1e15, 80e9)
    plan, shape = tiny_plan(), ModelShape.from_config(tiny_config())
    weights = sum(value.nbytes for value in matrices(plan).values())
    cache = sum(2 * length * 8 * 4 for layer in range(2) for _ in plan.fa_groups(layer))
    state = (16 - plan.num_fa_heads) * (8 * 8 * 4 + 3 * 8 * 3 * 4)
    expected = (weights + cache + 2 * state) / 1e3
    found = decode_seconds(shape, plan, length, device, "fp32")
    assert found == pytest.approx(expected)


def test_decoding_takes_as_long_as_its_arithmetic_where_memory_is_fast() -> None:
    shape, length = ModelShape.from_config(tiny_config()), 512
    device = Device("slow arithmetic", 1e15, 1e3, 80e9)
    last_token = flops_of_sequence(shape, length + 1).of(None)
    last_token -= flops_of_sequence(shape, length).of(None)
    assert decode_seconds(shape, None, length, device) == pytest.approx(last_token / 1e3)
    memory, arithmetic = decode_bounds(shape, length, device)
    assert memory.of(None) < arithmetic.of(None)


def test_a_training_step_is_three_forward_passes_at_the_efficiency() -> None:
    device = DEVICES["h100"]
    step = training_step_seconds(QWEN3_1P7B, 4096, device)
    forward = flops_of_sequence(QWEN3_1P7B, 4096).teacher
    assert step.teacher == pytest.approx(3 * forward / (0.4 * 989e12))


def test_the_papers_model_has_the_papers_cache() -> None:
    """Qwen3-1.7B stores 112 KiB per token in bfloat16 and has 1.7 billion parameters."""
    assert cache_bytes_per_token(QWEN3_1P7B).teacher == 112 * 1024
    assert weight_bytes(QWEN3_1P7B).teacher / 2 == pytest.approx(1.72e9, rel=1e-3)
    plan = HeadPlan.from_fa_heads({i: range(4) for i in range(28)}, 28, 16, 8)
    costs = costs_of(QWEN3_1P7B, plan, 524288, "h200")
    assert costs.kv_cache_bytes / GIB == 14
    assert costs.cache_gib == (costs.kv_cache_bytes + costs.state_bytes) / GIB
    assert (costs.num_fa_heads, costs.num_groups) == (112, 56)
    teacher = costs_of(QWEN3_1P7B, None, 524288, "h200")
    assert (teacher.num_fa_heads, teacher.num_groups) == (448, 224)
    assert costs.decode_ms < teacher.decode_ms and not math.isclose(costs.decode_ms, 0)


def test_bad_context_and_device_are_refused() -> None:
    with pytest.raises(UserError, match="context is 0; it must be 1 or more"):
        costs_of(QWEN3_1P7B, None, 0, "h100")
    with pytest.raises(UserError, match="unknown device 'abacus': use one of h100, h200"):
        costs_of(QWEN3_1P7B, None, 10, "abacus")
