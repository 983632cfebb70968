"""One process: locked, stopped, gone on with otherwise spelt, and made longer once complete."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kit.lives import BATCH, RUN_SECONDS_MAX, Run, order, paths, write_inputs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_hydra.training.config import load_config

pytestmark = [pytest.mark.dist, pytest.mark.slow]

ALONE = ["strategy.tensor_model_parallel_size=1", "trainer.max_steps=10"]
EX_TEMPFAIL = 75


def test_stopped_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stop with code 0 or without a checkpoint, two runs in a folder, and a run that
    must not go on because of what changes nothing, or does, with other samples or another rate."""
    inputs = write_inputs(tmp_path / "inputs")
    run = Run(inputs, tmp_path / "run", "distill", ALONE)
    early = run.start("imports:1:SIGINT", 0)
    assert early.wait(RUN_SECONDS_MAX) == EX_TEMPFAIL
    assert "megatron-hydra: SIGINT before a step was finished: nothing was saved;" in run.printed()
    assert not run.folder.exists()

    first = run.start("backward:5:SIGSTOP", 0)  # in the third step
    _wait_for(run, first)
    refused, seconds = _train(run)
    assert refused.returncode == 2 and seconds < 30, "before the slow imports"
    assert refused.stderr == (
        f"megatron-hydra: error: log.folder {run.folder} is in use by process {first.pid} on "
        f"{os.uname().nodename}: wait until that ends, or choose another\n"
    )
    first.send_signal(signal.SIGTERM)
    first.send_signal(signal.SIGCONT)
    assert first.wait(RUN_SECONDS_MAX) == EX_TEMPFAIL
    assert (
        f"megatron-hydra: SIGTERM: stopped after step 3 of 10, which is saved in {run.folder}/"
        "checkpoints; the same command goes on from there\n"
    ) in run.printed()
    assert not (run.folder / "hybrid").exists()

    monkeypatch.chdir(inputs)
    (inputs / "link").symlink_to("teacher")
    run.live(ranks=0, more=["transfer.init_from=./hybrid", "transfer.teacher=link",
                            "data.micro_batch_size=2", "data.num_workers=1"])  # fmt: skip
    assert "going on from" in run.printed() and "step_00000003" in run.printed()
    complete, _ = _train(run)
    assert complete.returncode == 0 and "is complete: the trained model is" in complete.stdout

    longer = run.live(ranks=0, more=["trainer.max_steps=12"])
    assert "trainer.max_steps is 12, and was 10: from here on the learning rate is that" in longer
    start, end = (
        json.loads((folder / "hybrid/model.json").read_text()) for folder in (inputs, run.folder)
    )
    assert end["provenance"]["max_steps"] == 12
    for key in ("teacher_weights_hash", "teacher_license"):
        assert end[key] == start[key] is not None
    # Each sample once, in the data's order, however many a micro-batch has.
    assert [sample for _, sample in order(run)] == _quiet_order(run)
    assert _recorded_losses(run.folder) == pytest.approx(_scalars(run.folder, "train/loss"))
    schedule = load_config(run.folder / "run_config.yaml").optim.learning_rate
    expected = {step + 1: schedule(step, 10 if step < 10 else 12) for step in range(12)}
    assert _scalars(run.folder, "train/lr") == pytest.approx(expected)


def _wait_for(run: Run, process: subprocess.Popen) -> None:
    """Until the process has stopped itself."""
    end = time.monotonic() + RUN_SECONDS_MAX
    while not run.kills()[1:]:
        assert process.poll() is None and time.monotonic() < end, run.printed()[-4000:]
        time.sleep(0.2)


def _train(run: Run) -> tuple[subprocess.CompletedProcess, float]:
    """The command as a user gives it, and how long it took."""
    start = time.monotonic()
    finished = subprocess.run(
        [sys.executable, "-m", "hydra_tools.cli", "train", *run.arguments],
        capture_output=True, text=True, timeout=RUN_SECONDS_MAX,
        env={**os.environ, "PYTHONPATH": paths()},
    )  # fmt: skip
    return finished, time.monotonic() - start


def _quiet_order(run: Run) -> list[int]:
    """The samples as Megatron's own index has them, one epoch."""
    import numpy as np

    shuffled = [np.load(file) for file in run.folder.glob("data_index/**/*-shuffle_index.npy")]
    assert shuffled and all(np.array_equal(index, shuffled[0]) for index in shuffled)
    return [int(sample) for sample in shuffled[0][: 12 * BATCH]]


def _scalars(folder: Path, tag: str) -> dict[int, float]:
    """A scalar at each step, by all event files."""
    found = {}
    for file in folder.glob("tensorboard/events*"):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        found.update({point.step: point.value for point in events.Scalars(tag)})
    return found


def _recorded_losses(folder: Path) -> dict[int, float]:
    """The same of the loss, by the file that programs read."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}
