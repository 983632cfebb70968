"""A run folder that is removed while it is trained in: one sentence, and nothing in its place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from kit.distributed import run_distributed
from kit.tiny_models import PLAN
from test_training import write_inputs


@pytest.mark.dist
@pytest.mark.slow
def test_it_is_said_after_the_step_and_not_made_anew(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs", PLAN)
    run_distributed(_train, 1, inputs, tmp_path / "run")
    assert not (tmp_path / "run").exists() and (tmp_path / "moved/metrics.jsonl").is_file()


def _train(inputs: Path, folder: Path) -> None:
    from megatron_hydra.errors import UserError
    from megatron_hydra.nemo.training import TrainingRun
    from megatron_hydra.training.config import load_config

    overrides = [f"log.folder={folder}", "strategy.tensor_model_parallel_size=1"]
    run = TrainingRun(load_config(inputs / "run.yaml", overrides))
    run.folder.path.mkdir()
    run.folder.write_config()
    assert os.environ["RANK"] == "0"

    def remove(step: int, scalars: dict[str, float]) -> None:
        shutil.move(folder, folder.with_name("moved"))

    with pytest.raises(UserError, match="run is gone, which was there .* Step 2 was the last$"):
        run.run(remove)
