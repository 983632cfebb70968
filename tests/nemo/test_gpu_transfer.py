"""The example's three stages in NeMo's loop on GPUs: Transformer Engine, fla, our kernels.

Catches: a stage that does not learn or does not take what the one before it wrote, FP8 that trains
elsewhere than bf16, weights that are damaged before the first step on a busy GPU, CUDA graphs that
replay something else or do not go on from a checkpoint, tensor- and context-parallel ranks over
NCCL that differ from one, kernels that take some numbers of heads alone. Two ranks share a GPU
where there is but one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.distributed import run_distributed
from kit.tiny_models import write_models
from uneven_plan import layers_by_count, uneven_plan

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.placement import place_heads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EXAMPLE = Path(__file__).parents[2] / "examples/qwen3_1p7b"
STAGES = ("stage1_align", "stage2_distill", "stage3_long_context")
# Qwen3-1.7B's widths; its other layers and most of its vocabulary only cost time.
SHAPE: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 4,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 4096,
    "max_position_embeddings": 4096,
}  # fmt: skip
NUM_STEPS, LENGTH = 6, 1024
GRAPHS = ["model.cuda_graphs=true", "model.recompute=none"]


def plan(num_layers: int) -> HeadPlan:
    """A quarter of the heads FA, all query groups among them."""
    return HeadPlan.from_fa_heads(
        {i: range(i % 4, 16, 4) for i in range(num_layers)}, num_layers, 16, 8
    )


def four_uneven_layers() -> HeadPlan:
    """Layers of a scored plan's kind with 0, 3, 9 and all 16 FA heads, so 16, 13, 7 and no LA."""
    layers = layers_by_count(uneven_plan(112))
    return HeadPlan(tuple(layers[count] for count in (0, 3, 9, 16)), 8)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `write_inputs`, with one GPU's run in bf16 in `bf16`."""
    return _inputs_with_a_run(tmp_path_factory.mktemp("inputs"), plan(SHAPE["num_hidden_layers"]))


@pytest.fixture(scope="module")
def uneven_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `inputs`, of layers that differ in their numbers of FA heads."""
    return _inputs_with_a_run(tmp_path_factory.mktemp("uneven"), four_uneven_layers())


def _inputs_with_a_run(folder: Path, head_plan: HeadPlan) -> Path:
    write_inputs(folder, head_plan, **SHAPE)
    run_distributed(transfer, 1, folder, folder / "bf16", [])
    return folder


def write_inputs(folder: Path, head_plan: HeadPlan, **qwen3_fields: Any) -> None:
    """Write `teacher`, `hybrid` and `data`."""
    from megatron_hydra.training.indexed_dataset import write_indexed_dataset

    write_models(folder, head_plan, **qwen3_fields)
    # The same sample wherever one begins: a loss falls by what is learnt alone.
    tokens = torch.randint(256, (LENGTH,), generator=torch.Generator().manual_seed(0)).repeat(2)
    write_indexed_dataset(folder / "data", [tokens.tolist()], 257, {})


def transfer(inputs: Path, folder: Path, overrides: list[str], before: Path | None = None) -> None:
    """Run the stages, each from what the one before it wrote, here or in the run `before`.

    Rank 0 writes each step's loss, and the number of CUDA graphs replayed, to `losses.json`.
    """
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

    from megatron_hydra.nemo.training import TrainingRun
    from megatron_hydra.training.config import load_config

    replay, losses, num_replayed = torch.cuda.CUDAGraph.replay, {}, 0

    def count(graph: torch.cuda.CUDAGraph) -> None:
        nonlocal num_replayed
        num_replayed += 1
        replay(graph)

    torch.cuda.CUDAGraph.replay = count
    previous = inputs / "hybrid"
    for stage in STAGES:
        shown: list[float] = []
        of_run = _options(stage, inputs, previous, folder / stage)
        of_run += [x for x in overrides if stage != STAGES[0] or x not in GRAPHS]
        run = TrainingRun(load_config(EXAMPLE / f"{stage}.yaml", of_run))
        run.run(lambda step, scalars, shown=shown: shown.append(scalars["loss"]))
        if torch.distributed.get_rank() == 0:
            run.folder.write_config()
        unset_num_microbatches_calculator()  # NeMo keeps the first run's
        losses[stage], previous = shown, (before or folder) / stage / "hybrid"
    if torch.distributed.get_rank() == 0:
        found = {"losses": losses, "num_replayed": num_replayed}
        (folder / "losses.json").write_text(json.dumps(found))


def _options(stage: str, inputs: Path, init_from: Path, folder: Path) -> list[str]:
    """Of a stage's run on one rank."""
    of_run = [
        f"data.paths=[{inputs}/data]", f"data.seq_length={LENGTH}", "data.num_workers=0",
        "data.micro_batch_size=2", "data.global_batch_size=4", f"log.folder={folder}",
        f"trainer.max_steps={NUM_STEPS}", "optim.warmup_steps=1", "log.every_n_steps=1",
        "strategy.tensor_model_parallel_size=1", "strategy.sequence_parallel=false",
        f"transfer.init_from={init_from}", "optim.lr=2e-4", "optim.min_lr=2e-4",
    ]  # fmt: skip
    if stage != "stage3_long_context":
        of_run.append(f"transfer.teacher={inputs}/teacher")
    return of_run


def _losses(folder: Path) -> dict[str, torch.Tensor]:
    losses = json.loads((folder / "losses.json").read_text())["losses"]
    return {stage: torch.tensor(losses[stage], dtype=torch.float64) for stage in STAGES}


def _assert_starts_as(folder: Path, expected_folder: Path) -> None:
    losses = _losses(folder)
    for stage, expected in _losses(expected_folder).items():
        found = losses[stage]
        # Before, after one and after two updates from the same weights: the forward and backward
        # passes and the optimizer. Then a loss that swings makes more of the runs' rounding.
        error = ((found - expected).abs() / expected[0])[:3].max()
        assert error <= 2**-6, f"{stage}: {found}, expected {expected}"


def _assert_learns_in_fp8(folder: Path, expected_folder: Path) -> None:
    losses = _losses(folder)
    for stage, expected in _losses(expected_folder).items():
        found = losses[stage]
        assert not torch.equal(found, expected), "nothing ran in FP8"
        fallen, expected_fall = (1 - x[-1] / x[0] for x in (found, expected))
        assert fallen >= expected_fall / 2, f"{stage}: {found}, bf16 {expected}"
        if stage == STAGES[0]:  # the same weights: half a step of E4M3 is 2^-4 of a number
            assert (found[0] / expected[0] - 1).abs() <= 2**-4


@pytest.mark.parametrize("of_plan", ["inputs", "uneven_inputs"])
def test_every_stage_learns(request: pytest.FixtureRequest, of_plan: str) -> None:
    folder = request.getfixturevalue(of_plan)
    for stage, losses in _losses(folder / "bf16").items():
        assert len(losses) == NUM_STEPS
        assert losses[-1] < 0.9 * losses[0], f"{stage}: {losses}"


def train_with_late_buffers(inputs: Path, out: Path) -> None:
    """A step of stage 2; what of the weights differs once the optimizer is made goes to `out`.

    Megatron's buffers are made half a second late on their stream, as on a GPU that others use.
    """
    import megatron.core.distributed.param_and_grad_buffer as buffers
    from nemo.lightning.megatron_parallel import MegatronParallel

    from megatron_hydra.nemo.optimizer import HydraOptimizerModule
    from megatron_hydra.nemo.training import TrainingRun
    from megatron_hydra.training.config import load_config

    make_buffer = buffers._ParamAndGradBuffer.__init__
    init_ddp, optimizers = MegatronParallel.init_ddp, HydraOptimizerModule.optimizers
    loaded: list[tuple[str, torch.nn.Parameter, torch.Tensor]] = []
    found: dict[str, Any] = {"late": 0, "looked_at": 0, "changed": []}

    def make_late(buffer: Any, *args: Any, **kwargs: Any) -> None:
        torch.cuda._sleep(10**9)
        found["late"] += 1
        make_buffer(buffer, *args, **kwargs)

    def keep(parallel: Any) -> None:
        for name, parameter in torch.nn.Module.named_parameters(parallel):
            if parameter.requires_grad:
                loaded.append((name, parameter, parameter.detach().cpu()))
        init_ddp(parallel)

    def look(module: Any, model: Any) -> Any:
        made = optimizers(module, model)
        torch.cuda.synchronize()
        for name, parameter, value in loaded:
            if not torch.equal(parameter.detach().cpu(), value):
                found["changed"].append(name)
            main = getattr(parameter, "main_param", None)  # none of float32 parameters
            if main is None:
                continue
            found["looked_at"] += 1
            if not torch.equal(main.detach().cpu(), value.float().flatten()):
                found["changed"].append(f"{name}, in float32")
        return made

    buffers._ParamAndGradBuffer.__init__ = make_late
    MegatronParallel.init_ddp, HydraOptimizerModule.optimizers = keep, look
    stage = STAGES[1]
    options = _options(stage, inputs, inputs / "hybrid", out.with_suffix(".run"))
    config = load_config(EXAMPLE / f"{stage}.yaml", [*options, "trainer.max_steps=1"])
    TrainingRun(config).run(lambda step, scalars: None)
    out.write_text(json.dumps(found))


def test_weights_are_whole_where_the_gpu_is_slow(tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64, "vocab_size": 1024}
    write_inputs(tmp_path, four_uneven_layers(), **{**SHAPE, **shape})
    run_distributed(train_with_late_buffers, 1, tmp_path, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["late"] and found["looked_at"] > 40
    assert not found["changed"]


def test_fp8_learns_as_bf16_does(inputs: Path, tmp_path: Path) -> None:
    run_distributed(
        transfer, 1, inputs, tmp_path, ["trainer.precision=fp8", "model.recompute=full"]
    )
    _assert_learns_in_fp8(tmp_path, inputs / "bf16")


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_cuda_graphs_change_nothing(inputs: Path, tmp_path: Path, precision: str) -> None:
    overrides = [
        *GRAPHS,
        f"trainer.precision={precision}",
        f"resume.save_every_n_steps={NUM_STEPS // 2}",
    ]
    run_distributed(transfer, 1, inputs, tmp_path, overrides, inputs / "bf16")
    _assert_replayed(tmp_path)
    if precision == "fp8":
        _assert_learns_in_fp8(tmp_path, inputs / "bf16")
    else:
        _assert_starts_as(tmp_path, inputs / "bf16")
    run_distributed(go_on_from_half, 1, tmp_path)
    went_on = torch.tensor(json.loads((tmp_path / "went_on.json").read_text()))
    expected = _losses(tmp_path)["stage2_distill"]
    error = ((went_on - expected[NUM_STEPS // 2 :]).abs() / expected[0]).max()
    assert error <= 2**-6, f"{went_on}, without a break {expected}"


def go_on_from_half(folder: Path) -> None:
    """Train the second half of stage 2 again; each step's loss goes to `went_on.json`."""
    from megatron_hydra.nemo.training import TrainingRun
    from megatron_hydra.training.config import load_config

    stage = folder / "stage2_distill"
    shutil.rmtree(stage / "hybrid")
    shutil.rmtree(stage / f"checkpoints/step_{NUM_STEPS:08}")
    losses: list[float] = []
    run = TrainingRun(load_config(stage / "run_config.yaml"))
    run.run(lambda step, scalars: losses.append(scalars["loss"]))
    (folder / "went_on.json").write_text(json.dumps(losses))


def _assert_replayed(folder: Path) -> None:
    num_replayed = json.loads((folder / "losses.json").read_text())["num_replayed"]
    # Two stages, steps after the first, micro-batches, layers, forward and backward.
    assert num_replayed == 2 * (NUM_STEPS - 1) * 2 * SHAPE["num_hidden_layers"] * 2


TENSOR, CONTEXT = "strategy.tensor_model_parallel_size=2", "strategy.context_parallel_size=2"
LAYOUTS = {
    "tensor parallel": [TENSOR],
    "sequence parallel": [TENSOR, "strategy.sequence_parallel=true"],
    "sequence parallel, graphs": [TENSOR, "strategy.sequence_parallel=true", *GRAPHS],
    "context parallel, ring": [CONTEXT],
    "context parallel, all-to-all": [CONTEXT, "strategy.cp_comm_type=a2a"],
    "context parallel, gathered": [CONTEXT, "strategy.cp_comm_type=all_gather"],
    "data parallel, gradients sent early": [
        "strategy.overlap_grad_reduce=true", "strategy.use_distributed_optimizer=true",
    ],
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_equal_one(inputs: Path, tmp_path: Path, layout: str) -> None:
    run_distributed(transfer, 2, inputs, tmp_path, LAYOUTS[layout], inputs / "bf16")
    _assert_starts_as(tmp_path, inputs / "bf16")
    if "graphs" in layout:
        _assert_replayed(tmp_path)


def test_two_tensor_parallel_ranks_of_uneven_layers_equal_one(
    uneven_inputs: Path, tmp_path: Path
) -> None:
    on_ranks = [
        [len(placed.fa_heads(rank)) for rank in range(2)]
        for layer in four_uneven_layers().layers
        for placed in [place_heads(layer, 8, 2, "balanced", LENGTH)]
    ]
    assert on_ranks == [[0, 0], [2, 1], [5, 4], [8, 8]]
    layout = [*LAYOUTS["sequence parallel"], "model.placement=balanced"]
    run_distributed(transfer, 2, uneven_inputs, tmp_path, layout, uneven_inputs / "bf16")
    _assert_starts_as(tmp_path, uneven_inputs / "bf16")


@pytest.mark.exhaustive
def test_whole_model_learns_on_two_tensor_parallel_ranks(tmp_path: Path) -> None:
    """Qwen3-1.7B's layers and vocabulary; about 120 GB of checkpoints on the way."""
    whole = {"num_hidden_layers": 28, "vocab_size": 151936, "dtype": torch.bfloat16}
    write_inputs(tmp_path, plan(28), **{**SHAPE, **whole})
    layout = [TENSOR, "strategy.sequence_parallel=true"]
    run_distributed(transfer, 2, tmp_path, tmp_path / "run", layout)
    for stage, losses in _losses(tmp_path / "run").items():
        assert losses[-1] < 0.95 * losses[0], f"{stage}: {losses}"


def certify(out: Path) -> None:
    """The command's certificate of the example, of its heads but narrow."""
    from hydra_tools import cli

    command = [
        "certify", "--config", f"{EXAMPLE}/certify.yaml", "model.hidden_size=512",
        "model.ffn_hidden_size=1024", "model.vocab_size=1024", "--layers", "2",
        "--length", "256", "--steps", "2", "--tp", "2", "--cp", "2", "--out", str(out),
    ]  # fmt: skip
    assert cli.main(command) == 0


def test_certificate_of_two_ranks(tmp_path: Path) -> None:
    run_distributed(certify, 2, tmp_path / "certificate.json")
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    assert certificate["passed"] and certificate["backend"] == "transformer_engine"
    layouts = " ".join(row["layout"] for row in certificate["rows"])
    assert "tp2" in layouts and "cp2" in layouts
