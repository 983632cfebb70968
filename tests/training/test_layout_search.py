"""The fastest layout: legal, within the memory, and never slower where there are more GPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_hydra.errors import UserError
from megatron_hydra.selection.cost import DEVICES
from megatron_hydra.selection.shape import ModelShape, even_plan
from megatron_hydra.training.config import RunConfig, load_config
from megatron_hydra.training.config_checks import check, check_ranks
from megatron_hydra.training.layout_search import Cluster, as_written, fastest, with_layout
from megatron_hydra.training.memory import training_memory
from megatron_hydra.training.step_time import Layout, Work, step_time

EXAMPLES = Path(__file__).parents[2] / "examples/qwen3_1p7b"
SMALL = ModelShape(28, 16, 8, 128, 2048, 6144, 151936, tied_embeddings=True)
LARGE = ModelShape(36, 32, 8, 128, 4096, 12288, 151936, tied_embeddings=False)
H100 = DEVICES["h100"]


def _config(stage: str, *overrides: str) -> RunConfig:
    name = {"align": "stage1_align", "distill": "stage2_distill"}.get(stage, "stage3_long_context")
    return load_config(EXAMPLES / f"{name}.yaml", overrides)


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["1.7B", "8B"])
@pytest.mark.parametrize("stage", ["align", "distill", "long_context"])
@pytest.mark.parametrize("num_gpus", [8, 12, 4096])
def test_it_is_legal_and_fits(stage: str, shape: ModelShape, num_gpus: int) -> None:
    plan = even_plan(shape, 0.25)
    config = _config(stage)
    found = fastest(config, shape, plan, Cluster(H100, num_gpus))
    assert found is not None
    check(found.config)
    check_ranks(found.config, found.layout.num_gpus)
    layout, data = found.layout, found.config.data
    shape.parallel_sizes.check("the model", layout.tensor, layout.pipeline)
    assert num_gpus % layout.num_gpus == 0 and layout.tensor <= 8
    assert data.seq_length % (2 * layout.context) == 0 or layout.context == 1
    assert data.global_batch_size == config.data.global_batch_size
    # By the formula itself, from the layout alone.
    memory = training_memory(
        shape,
        plan,
        config.transfer.stage,
        layout.micro_batch * data.seq_length,
        "full" if layout.recomputed_layers else "none",
        dp_size=layout.data,
        recompute_layers=layout.recomputed_layers // layout.pipeline or None,
        tp_size=layout.tensor,
        cp_size=layout.context,
        seq_length=data.seq_length,
        pp_size=layout.pipeline,
        num_micro_batches=data.global_batch_size // layout.data // layout.micro_batch,
    )
    assert memory == found.memory and memory.peak <= 80e9


@pytest.mark.parametrize(
    ("stage", "shape"), [("align", SMALL), ("distill", LARGE), ("long_context", SMALL)]
)
def test_twice_the_gpus_are_never_slower(stage: str, shape: ModelShape) -> None:
    plan, config = even_plan(shape, 0.25), _config(stage)
    runs = [fastest(config, shape, plan, Cluster(H100, 2**n)) for n in range(3, 13)]
    seconds = [found.time.seconds for found in runs if found is not None]
    assert len(seconds) == 10
    assert all(more <= less for less, more in zip(seconds, seconds[1:], strict=False))


def test_nothing_legal_that_fits_is_faster() -> None:
    """Against every layout of eight GPUs without a pipeline, one by one."""
    config = _config("long_context", "data.global_batch_size=16", "data.seq_length=32768")
    plan = even_plan(LARGE, 0.25)
    found = fastest(config, LARGE, plan, Cluster(H100, 8))
    assert found is not None
    work = Work.of(LARGE, plan, "long_context", 32768)
    seconds = []
    sizes = (1, 2, 4, 8)
    for tensor, context, micro_batch in ((t, c, m) for t in sizes for c in sizes for m in sizes):
        for recomputed in (0, 9, 18, 27, 36):
            if 8 % (tensor * context) or 16 % (micro_batch * (8 // tensor // context)):
                continue
            data = 8 // tensor // context
            memory = training_memory(
                LARGE, plan, "long_context", micro_batch * 32768,
                "full" if recomputed else "none", dp_size=data,
                recompute_layers=recomputed or None, tp_size=tensor, cp_size=context,
                seq_length=32768,
            )  # fmt: skip
            if memory.peak <= 80e9:
                layout = Layout(tensor, 1, context, data, micro_batch, recomputed)
                seconds.append(step_time(work, 16, layout, H100).seconds)
    assert len(seconds) > 10
    assert found.time.seconds <= min(seconds) * (1 + 1e-9)
    assert found.time.seconds < max(seconds)


def test_a_pipeline_is_taken_where_nothing_else_fits() -> None:
    small = replace(H100, memory_bytes=40e9)
    config = _config("distill", "data.global_batch_size=1", "data.micro_batch_size=1")
    # Odd numbers of groups keep tensor parallelism out.
    shape = replace(LARGE, num_heads=7, num_query_groups=7, num_layers=32)
    found = fastest(config, shape, even_plan(shape, 0.25), Cluster(small, 8))
    assert found is not None and found.layout.pipeline > 1 and found.layout.tensor == 1
    assert found.memory is not None and found.memory.peak <= 40e9


def test_none_where_nothing_fits_or_the_memory_is_not_known() -> None:
    tiny = replace(H100, memory_bytes=1e9)
    plan = even_plan(SMALL, 0.25)
    assert fastest(_config("distill"), SMALL, plan, Cluster(tiny, 8)) is None
    assert fastest(_config("distill", "trainer.precision=fp32"), SMALL, plan, Cluster(H100, 8)) is (
        None
    )


def test_what_the_configuration_forbids_is_not_chosen() -> None:
    config = _config("long_context", "model.cuda_graphs=true", "model.recompute=none")
    found = fastest(config, SMALL, even_plan(SMALL, 0.25), Cluster(H100, 512))
    assert found is not None and found.layout.cuda_graphs
    assert (found.layout.context, found.layout.pipeline, found.layout.recomputed_layers) == (
        1,
        1,
        0,
    )


def test_a_layout_goes_there_and_back() -> None:
    layout = Layout(2, 2, 2, 2, 4, recomputed_layers=14)
    config = with_layout(_config("long_context"), layout)
    found = as_written(config, SMALL, even_plan(SMALL, 0.25), Cluster(H100, 16))
    assert found.layout == layout and found.config.model.recompute_layers == 7


@pytest.mark.parametrize(
    ("overrides", "num_gpus", "sentence"),
    [
        (["strategy.tensor_model_parallel_size=3"], 6, "tensor_model_parallel_size 3 does not fit"),
        (["strategy.pipeline_model_parallel_size=3"], 6, "the 28 layers are not divisible by 3"),
        ([], 12, "global_batch_size 128 is not divisible by data.micro_batch_size 1 x 12"),
        (
            ["strategy.cp_comm_type=a2a", "strategy.context_parallel_size=16",
             "transfer.teacher=t", "data.global_batch_size=16"],
            16,
            "the 8 query groups of the teacher on a tensor-parallel rank are not divisible by",
        ),
    ],
)  # fmt: skip
def test_a_layout_that_does_not_fit_is_one_sentence(
    overrides: list[str], num_gpus: int, sentence: str
) -> None:
    config = _config("long_context", *overrides)
    with pytest.raises(UserError, match=sentence):
        as_written(config, SMALL, even_plan(SMALL, 0.25), Cluster(H100, num_gpus))
