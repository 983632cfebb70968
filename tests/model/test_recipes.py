"""Each recipe of examples/: its model is built without memory, and its stages fit eight H100s."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit.distributed import as_every_rank, run_distributed
from kit.published import CONFIGS, NUM_PARAMETERS

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.scoring_config import load_scoring_config
from megatron_hydra.selection.shape import ModelShape
from megatron_hydra.teachers.config_json import read_config, shape_fields
from megatron_hydra.training.config import RunConfig, load_config
from megatron_hydra.training.config_checks import check_model, check_ranks
from megatron_hydra.training.memory import memory_of_run, training_memory

pytestmark = pytest.mark.dist

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(path.parent.name for path in EXAMPLES.glob("*/score.yaml"))
RECIPES.remove("quickstart")
STAGES = ("stage1_align", "stage2_distill", "stage3_long_context")
NUM_GPUS, H100_BYTES = 8, 80e9


def _plan(shape: ModelShape) -> HeadPlan:
    """A quarter of the heads, as uneven as scores make it: layers of all heads and of none too."""
    generator = np.random.default_rng(0)
    scores = generator.lognormal(sigma=1.0, size=(shape.num_layers, 1))
    scores = scores * generator.lognormal(sigma=1.0, size=(shape.num_layers, shape.num_heads))
    scores[3], scores[5] = 1e9, 0
    fa_heads: dict[int, list[int]] = {}
    for index in np.argsort(-scores, axis=None)[: shape.total_heads // 4]:
        layer, head = divmod(int(index), shape.num_heads)
        fa_heads.setdefault(layer, []).append(head)
    plan = HeadPlan.from_fa_heads(
        fa_heads, shape.num_layers, shape.num_heads, shape.num_query_groups
    )
    counts = {len(layer.fa_heads) for layer in plan.layers}
    assert {0, shape.num_heads} < counts and len(counts) > 4
    return plan


@pytest.fixture
def shape(recipe: str, tmp_path: Path) -> ModelShape:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[recipe]))
    return ModelShape.from_fields(shape_fields(read_config(tmp_path)))


def _stages(recipe: str) -> list[RunConfig]:
    return [load_config(EXAMPLES / recipe / f"{stage}.yaml") for stage in STAGES]


def test_all_models_have_a_recipe() -> None:
    assert RECIPES == sorted(CONFIGS) == sorted(NUM_PARAMETERS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_its_stages_fit_eight_gpus(recipe: str, shape: ModelShape) -> None:
    for config in _stages(recipe):
        check_model(config, shape.parallel_sizes)
        check_ranks(config, NUM_GPUS)
        check_ranks(config, 2 * NUM_GPUS)  # the Slurm script's two nodes
        memory, _ = memory_of_run(config, shape, _plan(shape), NUM_GPUS)
        assert memory is not None and 1e9 < memory.peak < H100_BYTES


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_shares_a_replica_only_where_one_gpu_is_not_enough(
    recipe: str, shape: ModelShape
) -> None:
    for config in _stages(recipe):
        if config.strategy.tensor_model_parallel_size > 1:
            config.strategy.tensor_model_parallel_size = 1
            memory, _ = memory_of_run(config, shape, _plan(shape), NUM_GPUS)
            assert memory is not None and memory.peak > 0.9 * H100_BYTES


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_step_reads_what_the_one_before_has_written(recipe: str) -> None:
    """Catches a folder of another recipe, as files that are made from one another have them."""
    runs = f"runs/{recipe}"
    align, distill, long_context = _stages(recipe)
    assert align.transfer.init_from == f"{runs}/converted"
    assert distill.transfer.init_from == f"{align.log.folder}/hybrid"
    assert long_context.transfer.init_from == f"{distill.log.folder}/hybrid"
    assert [c.log.folder for c in (align, distill, long_context)] == [
        f"{runs}/{stage}" for stage in STAGES
    ]
    scoring = load_scoring_config(EXAMPLES / recipe / "score.yaml")
    teachers = {align.transfer.teacher, distill.transfer.teacher, scoring.model.teacher}
    assert teachers == {f"{runs}/teacher"} and long_context.transfer.teacher is None
    assert scoring.run.out == f"{runs}/scores.json"
    # Token ids are of one tokenizer's family.
    is_llama = recipe.startswith("llama")
    paths = [path for config in (align, distill, long_context) for path in config.data.paths]
    assert all(("llama3" in path) is is_llama for path in paths)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_model_is_the_published_one_and_the_formulas(
    recipe: str, shape: ModelShape, tmp_path: Path
) -> None:
    """On each tensor-parallel rank of the stages; the plan's heads lie on them once each."""
    config = max(_stages(recipe), key=lambda each: each.strategy.tensor_model_parallel_size)
    tp_size = config.strategy.tensor_model_parallel_size
    plan = _plan(shape)
    run_distributed(_build, 1, tmp_path, plan, tp_size)
    found = json.loads((tmp_path / "counts.json").read_text())
    assert found["teacher"] == NUM_PARAMETERS[recipe]
    for layer, ranks in zip(plan.layers, found["fa_heads"], strict=True):
        assert len(ranks) == tp_size
        assert sorted(head for rank in ranks for head in rank) == list(layer.fa_heads)
    # bf16 weights; gradients, main weights and Adam's moments in float32.
    memory = training_memory(shape, plan, "long_context", 4096, tp_size=tp_size, seq_length=16384)
    assert memory.state == pytest.approx(18 * max(found["hybrid"]), rel=2e-3)


def _build(folder: Path, plan: HeadPlan, tp_size: int) -> None:
    from megatron_hydra.model.build import build_model
    from megatron_hydra.teachers.loading import hydra_config

    config = hydra_config(
        folder,
        tensor_model_parallel_size=tp_size,
        perform_initialization=False,
        params_dtype=torch.bfloat16,
        placement="balanced",
        seq_length=16384,
    )
    counts: dict[str, Any] = {"teacher": 0, "hybrid": []}
    fa_heads: list[list[tuple[int, ...]]] = [[] for _ in plan.layers]
    for rank in as_every_rank(tp_size):
        with torch.device("meta"):
            teacher, hybrid = build_model(config, None), build_model(config, plan)
        counts["teacher"] += sum(
            parameter.numel()
            for name, parameter in teacher.named_parameters()
            if rank == 0 or "norm" not in name  # norms alone are replicated
        )
        attentions = [layer.self_attention for layer in hybrid.decoder.layers]
        padding = sum(each.layout.num_padding_rows for each in attentions) * config.hidden_size
        total = sum(parameter.numel() for parameter in hybrid.parameters())
        counts["hybrid"].append(total - padding)
        for ranks, attention in zip(fa_heads, attentions, strict=True):
            ranks.append(tuple(attention.placement.fa_heads(rank)))
    (folder / "counts.json").write_text(json.dumps({**counts, "fa_heads": fa_heads}))
