"""Runs at parallel layouts against the same runs on one rank, which `test_training.py` proves.

Catches: a teacher or student that gets the other's hidden states, losses of an earlier stage lost,
counted twice or under another layer's name, a gradient that does not cross a stage border or
crosses it where it must not, tied weights that drift apart, scalars that do not reach rank 0;
tokens that count on no or on two context-parallel ranks, padding that counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.distributed import run_distributed
from test_training import NUM_STEPS, write_inputs
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megatron_hydra.head_plan import HeadPlan

pytestmark = [pytest.mark.dist, pytest.mark.slow]

RUNS = {
    "align": ["transfer.stage=align"],
    "distill": ["transfer.kl_weight=0.7", "transfer.ce_weight=0.3", "model.recompute=selective"],
    "long_context": ["transfer.stage=long_context", "model.recompute=full"],
    "align_packed": ["transfer.stage=align", "data.reset_at_document_end=true"],
    "distill_packed": ["data.reset_at_document_end=true", "data.micro_batch_size=2"],
}
# Stages and their numbers of FA heads all differ.
PLAN = HeadPlan.from_fa_heads({0: [], 1: [2], 2: [0, 3], 3: [0, 1, 2, 3]}, 4, 4, 2)
TENSOR, PIPELINE = (f"strategy.{kind}_model_parallel_size" for kind in ("tensor", "pipeline"))
CONTEXT, SEQUENCE = "strategy.context_parallel_size", "strategy.sequence_parallel"
SHARED, OVERLAP = "strategy.use_distributed_optimizer", "strategy.overlap_grad_reduce"


@pytest.fixture(scope="module")
def inputs_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with inputs of four layers, output weights tied or not, and one rank's runs.

    Where they are `padded`, the vocabulary and the MLP's width are odd.
    """

    @cache
    def of_shape(name: str) -> Path:
        folder = tmp_path_factory.mktemp("inputs")
        shape: dict[str, Any] = {"tie_word_embeddings": name == "tied"}
        if name == "padded":
            shape |= {"vocab_size": 265, "intermediate_size": 49}
        write_inputs(folder, PLAN, num_hidden_layers=4, **shape)
        run_distributed(train, 1, folder, folder / "one", [])
        return folder

    return of_shape


def train(inputs: Path, folder: Path, overrides: list[str]) -> None:
    """Make all runs on these ranks; rank 0 writes what was shown after each step."""
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

    from megatron_hydra.nemo.training import TrainingRun
    from megatron_hydra.training.config import load_config

    for name, of_run in RUNS.items():
        shown: dict[int, dict[str, float]] = {}
        of_run = [*of_run, *overrides, f"log.folder={folder / name}"]
        TrainingRun(load_config(inputs / "run.yaml", of_run)).run(shown.__setitem__)
        unset_num_microbatches_calculator()  # NeMo keeps the first run's
        if torch.distributed.get_rank() == 0:
            (folder / name / "shown.json").write_text(json.dumps(shown))


def _layout(tied: str, world_size: int, *sizes: str, fast: bool = False) -> Any:
    marks = () if fast else pytest.mark.exhaustive
    name = "_".join(size.split(".")[1].replace("_parallel_size", "") for size in sizes)
    return pytest.param(
        tied, world_size, list(sizes), id=f"{tied}-{world_size}_ranks-{name}", marks=marks
    )


@pytest.mark.parametrize(
    ("shape", "world_size", "sizes"),
    [
        _layout("tied", 2, f"{PIPELINE}=2", fast=True),
        _layout("tied", 2, f"{CONTEXT}=2", f"{SHARED}=true", f"{OVERLAP}=true"),
        _layout("tied", 4, f"{PIPELINE}=2", f"{TENSOR}=2", f"{SEQUENCE}=true"),
        _layout("untied", 2, f"{CONTEXT}=2"),
        _layout("untied", 2, f"{PIPELINE}=2"),
        _layout("untied", 4, f"{PIPELINE}=4"),
        _layout("untied", 4, f"{PIPELINE}=2"),  # and two data-parallel ranks
        _layout("untied", 4, f"{PIPELINE}=2", f"{CONTEXT}=2"),
        _layout("untied", 4, f"{PIPELINE}=2", f"{TENSOR}=2"),
        _layout("untied", 4, f"{CONTEXT}=2", f"{TENSOR}=2", f"{SEQUENCE}=true"),
        _layout("untied", 4, f"{CONTEXT}=4"),
        _layout("untied", 4, f"{TENSOR}=2", f"{SHARED}=true", f"{OVERLAP}=true"),
        _layout("untied", 4, f"{PIPELINE}=2", f"{OVERLAP}=true"),
        _layout("padded", 2, f"{TENSOR}=2", f"{SEQUENCE}=true"),
    ],
)
def test_layout_changes_nothing(
    inputs_of: Callable[[str], Path],
    tmp_path: Path,
    shape: str,
    world_size: int,
    sizes: list[str],
) -> None:
    inputs = inputs_of(shape)
    run_distributed(train, world_size, inputs, tmp_path, sizes)
    for run in RUNS:
        expected, found = (_shown(folder / run) for folder in (inputs / "one", tmp_path))
        assert len(found) == NUM_STEPS
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
        expected, found = (_weights(folder / run) for folder in (inputs / "one", tmp_path))
        # AdamW moves a weight by about its rate whatever its gradient's size, so where that is near
        # zero rounding shows: single weights end up to 2.1e-6 apart (one that had moved a tenth of
        # the median as the worst of its tensor), a tensor's root mean square up to 2.9e-7.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=4e-6)
        for name, tensor in found.items():
            assert (tensor - expected[name]).square().mean().sqrt() < 5e-7, name
        start = _weights(inputs, "hybrid")
        assert any(not torch.equal(found[name], start[name]) for name in found)


def _shown(run: Path) -> dict[str, dict[str, float]]:
    """What rank 0 showed after each step, but for the speed."""
    shown = json.loads((run / "shown.json").read_text())
    for scalars in shown.values():
        assert scalars.pop("tokens_per_s") > 0 and scalars.pop("step_s") > 0
    return shown


def _weights(folder: Path, name: str = "hybrid") -> dict[str, torch.Tensor]:
    file = folder / f"{name}.pt"
    dcp_to_torch_save(folder / name / "weights", file)
    return torch.load(file)
