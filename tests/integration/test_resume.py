"""Kill -9 at a random step, then the same command: the trained weights are those of a quiet run.

Catches a run that starts anew, whatever a checkpoint forgets (optimizer steps and moments, the
learning rate's place, the data's place), and half-written checkpoints that are taken for whole
ones.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from hydra_tools import cli
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.nemo.config import load_config
from megatron_hydra.testing.tiny_qwen3 import write_tiny_qwen3

pytestmark = [pytest.mark.dist, pytest.mark.slow]

NUM_STEPS, SAVE_EVERY = 40, 4
ROOT = Path(__file__).parents[2]
RUN_SECONDS_MAX = 300


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `teacher`, `hybrid`, `data` and `run.yaml`."""
    folder = tmp_path_factory.mktemp("inputs")
    source = str(write_tiny_qwen3(folder / "qwen3"))
    plan = HeadPlan.from_fa_heads({0: [1], 1: [0, 3]}, 2, 4, 2)
    plan.save(folder / "plan.json")
    (folder / "text.txt").write_text("".join(random.Random(0).choices("abcdefgh .", k=3000)))
    for arguments in (
        ["convert", "--teacher", source, "--out", f"{folder}/teacher"],
        ["convert", "--teacher", source, "--out", f"{folder}/hybrid", "--plan",
         f"{folder}/plan.json", "--calibration-tokens", "256"],
        ["preprocess", "--tokenizer", source, "--input", f"{folder}/text.txt", "--out",
         f"{folder}/data"],
    ):  # fmt: skip
        assert cli.main(arguments) == 0
    config = {
        "data": {
            "paths": [f"{folder}/data"],
            "seq_length": 16,
            "micro_batch_size": 1,
            "global_batch_size": 2,
        },
        "trainer": {"max_steps": NUM_STEPS, "num_threads": 1},
        "strategy": {"tensor_model_parallel_size": 2},
        "optim": {"lr": 1e-3, "warmup_steps": 5},
        "transfer": {
            "stage": "align",
            "init_from": f"{folder}/hybrid",
            "teacher": f"{folder}/teacher",
        },
        "log": {"folder": "given by the test"},
        "resume": {"save_every_n_steps": SAVE_EVERY},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.parametrize("stage", ["align", "distill", "long_context"])
def test_killed_run_ends_bit_equal(inputs: Path, tmp_path: Path, stage: str) -> None:
    def command(name: str) -> list[str]:
        overrides = [f"transfer.stage={stage}", f"log.folder={tmp_path / name}"]
        return ["--config", f"{inputs}/run.yaml", *overrides]

    _train(command("quiet"), tmp_path / "quiet.log")
    killed_run, kill_at = tmp_path / "killed", random.randint(1, NUM_STEPS - 5)
    _train(
        command("killed"),
        tmp_path / "killed.log",
        lambda step: step >= kill_at and _checkpoint_step(killed_run) > 0,
    )
    assert not (killed_run / "hybrid").exists(), f"not killed in time, at step {kill_at}"
    saved_step = _checkpoint_step(killed_run)
    assert saved_step >= SAVE_EVERY

    again = _train(command("killed"), tmp_path / "again.log")
    # A run that starts anew would end bit-equal too.
    assert _steps_of_newest_log(killed_run) == list(range(saved_step + 1, NUM_STEPS + 1)), again
    assert f"going on from {killed_run}/checkpoints/step_{saved_step:08d}" in again
    quiet, killed = _weights(tmp_path / "quiet/hybrid"), _weights(killed_run / "hybrid")
    start = _weights(inputs / "hybrid")
    assert quiet.keys() == killed.keys() == start.keys()
    differing = [name for name in quiet if not torch.equal(quiet[name], killed[name])]
    assert not differing, f"killed at step {kill_at}: {differing}\n{again}"
    assert any(not torch.equal(quiet[name], start[name]) for name in quiet)

    written = load_config(killed_run / "config.yaml")  # with nothing left open
    chosen = (written.trainer.accelerator, written.model.backend, written.model.la_kernel)
    assert chosen == ("cpu", "local", "reference")
    # The heads are placed for the 16 tokens of the run, though the hybrid reaches 128.
    assert "placement balanced at 16 tokens" in again
    assert "is complete" in _train(command("killed"), tmp_path / "complete.log")


def _checkpoint_step(run: Path) -> int:
    """Finished steps of the newest whole checkpoint; 0 if there is none."""
    unfinished = {path.name.removesuffix("-unfinished") for path in run.glob("checkpoints/*-unf*")}
    names = {path.name for path in run.glob("checkpoints/step_*") if path.is_dir()} - unfinished
    return max((int(name.removeprefix("step_")) for name in names), default=0)


def _steps_of_newest_log(run: Path) -> list[int]:
    """The steps that the run's last process has recorded."""
    newest = max(run.glob("tensorboard/events*"), key=lambda path: path.stat().st_mtime)
    events = EventAccumulator(str(newest), size_guidance={"scalars": 0})
    events.Reload()
    return [point.step for point in events.Scalars("train/loss")]


def _train(arguments: list[str], log: Path, kill_when: Callable[[int], bool] | None = None) -> str:
    """Run torchrun to its end, or kill all of it -9 when the progress line says so."""
    process = _start(arguments, log)
    end = time.monotonic() + RUN_SECONDS_MAX
    try:
        while process.poll() is None and time.monotonic() < end:
            if kill_when is not None and kill_when(_last_step(log)):
                break
            time.sleep(0.01)
    finally:
        if process.poll() is None:
            _kill(process.pid)
    code = process.wait()
    assert code == (0 if kill_when is None else -signal.SIGKILL), log.read_text()[-4000:]
    return log.read_text()


def _start(arguments: list[str], log: Path) -> subprocess.Popen:
    """Start torchrun with two ranks, which write to ``log``."""
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tools"))
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
             "2", "-m", "hydra_tools.train", *arguments],
            stdout=stream, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def _kill(pid: int) -> None:
    agent = psutil.Process(pid)
    for victim in (agent, *agent.children(recursive=True)):
        victim.kill()


def _last_step(log: Path) -> int:
    steps = re.findall(rf"(\d+)/{NUM_STEPS} ", log.read_text(errors="replace"))
    return int(steps[-1]) if steps else 0


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    file = checkpoint.parent / f"{checkpoint.name}.pt"
    dcp_to_torch_save(checkpoint / "weights", file)
    return torch.load(file)


def test_bad_input_is_one_sentence_on_every_rank(inputs: Path, tmp_path: Path) -> None:
    """torchrun itself prints a traceback of its own and exits with 1; nothing of ours does."""
    overrides = [f"log.folder={tmp_path / 'run'}", "transfer.init_from=nowhere"]
    process = _start(["--config", f"{inputs}/run.yaml", *overrides], tmp_path / "log")
    assert process.wait(RUN_SECONDS_MAX) == 1
    log = (tmp_path / "log").read_text()
    sentence = "megatron-hydra: error: nowhere is not a checkpoint folder: it has no model.json"
    assert f"\n{sentence}\n" in f"\n{log}"
    # ... and again in the summary that ends what torchrun prints.
    *_, summary = log.partition("Root Cause")
    assert re.search(r"exitcode +: 2 ", summary) and f"traceback : {sentence}" in summary
    assert "most recent call first" not in log, "a stack of faulthandler"
    assert not re.search(r'File ".*(megatron_hydra|hydra_tools)', log)
    assert not (tmp_path / "run").exists()
