"""Runs at pipeline layouts against the same runs on one rank, which `test_training.py` proves.

Catches: a teacher or student that gets the other's hidden states, losses of an earlier stage lost,
counted twice or under another layer's name, a gradient that does not cross a stage border or
crosses it where it must not, tied weights that drift apart, scalars that do not reach rank 0.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_training import NUM_STEPS, write_inputs
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.testing import run_distributed

pytestmark = [pytest.mark.dist, pytest.mark.slow]

STAGES = {
    "align": ["transfer.stage=align"],
    "distill": ["transfer.kl_weight=0.7", "transfer.ce_weight=0.3"],
    "long_context": ["transfer.stage=long_context"],
}
# By whether embedding and output weights are tied: stages and head counts all differ.
PLAN = HeadPlan.from_fa_heads({0: [], 1: [2], 2: [0, 3], 3: [0, 1, 2, 3]}, 4, 4, 2)
TENSOR, PIPELINE = (f"strategy.{kind}_model_parallel_size" for kind in ("tensor", "pipeline"))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with inputs of four layers, and each stage's run on one rank under `one`."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, PLAN, num_hidden_layers=4, tie_word_embeddings=request.param)
    run_distributed(run_stages, 1, folder, folder / "one", [])
    return folder


def run_stages(inputs: Path, folder: Path, overrides: list[str]) -> None:
    """Train all stages on these ranks; rank 0 writes what was shown after each step."""
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

    from megatron_hydra.nemo.config import load_config
    from megatron_hydra.nemo.training import TrainingRun

    for stage, of_stage in STAGES.items():
        shown: dict[int, dict[str, float]] = {}
        overrides_of_run = [*of_stage, *overrides, f"log.folder={folder / stage}"]
        TrainingRun(load_config(inputs / "run.yaml", overrides_of_run)).run(shown.__setitem__)
        unset_num_microbatches_calculator()  # NeMo keeps the first run's
        if torch.distributed.get_rank() == 0:
            (folder / stage / "shown.json").write_text(json.dumps(shown))


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        pytest.param(2, [f"{PIPELINE}=2"], id="pp2"),
        pytest.param(4, [f"{PIPELINE}=4"], id="pp4", marks=pytest.mark.exhaustive),
        pytest.param(4, [f"{PIPELINE}=2"], id="pp2_dp2", marks=pytest.mark.exhaustive),
        pytest.param(
            4, [f"{PIPELINE}=2", f"{TENSOR}=2"], id="pp2_tp2", marks=pytest.mark.exhaustive
        ),
        pytest.param(
            4,
            [f"{PIPELINE}=2", f"{TENSOR}=2", "strategy.sequence_parallel=true"],
            id="pp2_tp2_sp",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_layout_changes_nothing(
    inputs: Path, tmp_path: Path, world_size: int, overrides: list[str]
) -> None:
    run_distributed(run_stages, world_size, inputs, tmp_path, overrides)
    for stage in STAGES:
        expected, found = (_shown(folder / stage) for folder in (inputs / "one", tmp_path))
        assert len(found) == NUM_STEPS
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
        expected, found = (_weights(folder / stage) for folder in (inputs / "one", tmp_path))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        start = _weights(inputs, "hybrid")
        assert any(not torch.equal(found[name], start[name]) for name in found)


def _shown(run: Path) -> dict[str, dict[str, float]]:
    """What rank 0 showed after each step, but for the speed."""
    shown = json.loads((run / "shown.json").read_text())
    for scalars in shown.values():
        assert scalars.pop("tokens_per_s") > 0
    return shown


def _weights(folder: Path, name: str = "hybrid") -> dict[str, torch.Tensor]:
    file = folder / f"{name}.pt"
    dcp_to_torch_save(folder / name / "weights", file)
    return torch.load(file)
