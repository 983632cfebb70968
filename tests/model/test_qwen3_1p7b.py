"""The paper's model, built without memory: parameter count and heads of every rank."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.distributed import as_every_rank, run_distributed
from kit.published import CONFIGS, NUM_PARAMETERS
from uneven_plan import uneven_plan

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.shape import ModelShape
from megatron_hydra.training.memory import training_memory

pytestmark = pytest.mark.dist

TP_SIZE = 8
NUM_LAYERS, NUM_HEADS, NUM_GROUPS, HIDDEN, HEAD_DIM, FFN, VOCAB = 28, 16, 8, 2048, 128, 6144, 151936
QWEN3_1P7B = CONFIGS["qwen3_1p7b"]
# 112 of 448 heads keep full attention, four per layer, whose groups shift from layer to layer.
FA_HEADS = {
    layer: sorted((layer * 3 + step) % NUM_HEADS for step in (0, 1, 4, 7))
    for layer in range(NUM_LAYERS)
}


def test_parameters_and_heads_at_tp_8(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_1P7B))
    run_distributed(_build_every_rank, 1, tmp_path)
    found = json.loads((tmp_path / "counts.json").read_text())
    assert found["teacher"] == NUM_PARAMETERS["qwen3_1p7b"]
    assert found["hybrid"] == _expected_hybrid_parameters()
    for layer, ranks in enumerate(found["fa_heads"]):
        assert sorted(head for rank in ranks for head in rank) == FA_HEADS[layer]
        assert max(len(rank) for rank in ranks) <= 2


def _expected_hybrid_parameters() -> int:
    row = HEAD_DIM * HIDDEN
    total = VOCAB * HIDDEN + HIDDEN  # embedding, final norm
    for heads in FA_HEADS.values():
        num_fa, num_groups = len(heads), len({head // 2 for head in heads})
        num_la = NUM_HEADS - num_fa
        total += num_fa * 2 * row + num_groups * 2 * row  # q and gate; k and v
        total += num_la * (4 * row + 2 * HIDDEN)  # q, k, v, z; a and b
        total += num_la * (3 * HEAD_DIM * 4 + 2)  # convolution; A_log and dt_bias
        total += NUM_HEADS * row + NUM_HEADS  # output projection; head scales
        total += 5 * HEAD_DIM + 2 * HIDDEN + 3 * HIDDEN * FFN  # norms; MLP
    return total


@pytest.fixture(scope="module")
def ranks_of_plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, int]]]:
    """Parameters of each of two tensor-parallel ranks of each plan, matrices beside all."""
    folder = tmp_path_factory.mktemp("uneven")
    (folder / "config.json").write_text(json.dumps(QWEN3_1P7B))
    run_distributed(_count_uneven_ranks, 1, folder)
    return json.loads((folder / "counts.json").read_text())


@pytest.mark.parametrize("name", ["uneven", "pairs"])
def test_predicted_state_is_that_of_the_larger_of_uneven_ranks(ranks_of_plans, name: str):
    # Weights in bf16; gradients, main weights and Adam's two moments in float32.
    states = [count["all"] * (2 + 4 * 4) for count in ranks_of_plans[name]]
    shape = ModelShape(NUM_LAYERS, NUM_HEADS, NUM_GROUPS, HEAD_DIM, HIDDEN, FFN, VOCAB, True)
    memory = training_memory(shape, _plans()[name], "long_context", 4096, tp_size=2)
    assert memory.state == pytest.approx(max(states), rel=5e-4)
    if name == "pairs":
        assert sum(states) / 2 < (1 - 5e-3) * max(states)  # the mean would not do


def _plans() -> dict[str, HeadPlan]:
    """A plan as scores give it, and one whose FA heads (a group per layer) all lie on one rank."""
    pairs = HeadPlan.from_fa_heads(
        {i: (0, 1) for i in range(NUM_LAYERS)}, NUM_LAYERS, NUM_HEADS, NUM_GROUPS
    )
    return {"uneven": uneven_plan(112), "pairs": pairs}


def test_operations_that_the_benchmark_counts_of_an_uneven_plan(ranks_of_plans):
    path = Path(__file__).parents[2] / "tools/benchmarks/step_costs.py"
    spec = importlib.util.spec_from_file_location("step_costs", path)
    spec.loader.exec_module(step_costs := importlib.util.module_from_spec(spec))
    matrices = sum(count["matrices"] for count in ranks_of_plans["uneven"])
    found = step_costs.model_tflop("long_context", 4096, NUM_LAYERS, uneven_plan(112))
    # Of an LA head and token: the convolution's taps, and the recurrence in chunks of 64.
    rule = 6 * 4 * HEAD_DIM + 10 * 64 * HEAD_DIM + 6 * HEAD_DIM**2 + 64**2
    attention = 112 * 2 * HEAD_DIM * 4096**2 + 336 * rule * 4096
    expected = 3 * (2 * matrices * 4096 + attention) / 1e12
    assert found == pytest.approx(expected, rel=1e-3)


def _count_uneven_ranks(folder: Path) -> None:
    from megatron_hydra.model.build import build_model
    from megatron_hydra.teachers.loading import hydra_config

    fields = dict(tensor_model_parallel_size=2, seq_length=4096, placement="balanced")
    config = hydra_config(folder, perform_initialization=False, **fields)
    counts: dict[str, list[dict[str, int]]] = {name: [] for name in _plans()}
    for _ in as_every_rank(2):
        for name, plan in _plans().items():
            with torch.device("meta"):
                model = build_model(config, plan)
            counts[name].append(_num_parameters(model))
    (folder / "counts.json").write_text(json.dumps(counts))


def _num_parameters(model: Any) -> dict[str, int]:
    attentions = [layer.self_attention for layer in model.decoder.layers]
    padding = sum(x.layout.num_padding_rows for x in attentions) * HIDDEN
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.dim() == 2 and "conv" not in name]
    of_kinds = {"all": named.values(), "matrices": matrices}
    return {kind: sum(p.numel() for p in ps) - padding for kind, ps in of_kinds.items()}


def _build_every_rank(folder: Path) -> None:
    from megatron_hydra.model.build import build_model
    from megatron_hydra.teachers.loading import hydra_config

    config = hydra_config(
        folder,
        tensor_model_parallel_size=TP_SIZE,
        perform_initialization=False,
        params_dtype=torch.bfloat16,
    )
    plan = HeadPlan.from_fa_heads(FA_HEADS, NUM_LAYERS, NUM_HEADS, NUM_GROUPS)
    counts = {"teacher": 0, "hybrid": 0}
    fa_heads = None
    for rank in as_every_rank(TP_SIZE):
        for name, of_model in (("teacher", None), ("hybrid", plan)):
            with torch.device("meta"):
                model = build_model(config, of_model)
            assert all(p.is_meta for p in model.parameters())
            counts[name] += sum(
                p.numel()
                for key, p in model.named_parameters()
                if rank == 0 or "norm" not in key  # norms alone are replicated
            )
        layers = model.decoder.layers
        fa_heads = fa_heads or [[] for _ in layers]
        for ranks, layer in zip(fa_heads, layers, strict=True):
            attention = layer.self_attention
            rows, columns = attention.in_proj.weight.shape
            assert rows == attention.layout.num_rows
            counts["hybrid"] -= attention.layout.num_padding_rows * columns
            ranks.append(attention.full_attention.heads)
    (folder / "counts.json").write_text(json.dumps({**counts, "fa_heads": fa_heads}))
