"""Killed or stopped at a named point, then the same command: it ends as a quiet one, in each bit.

Catches a run that starts anew, whatever a checkpoint forgets (optimizer steps and moments, the
learning rate's place, the data's place, random states), samples that are trained on twice or
never, half-written and half-removed checkpoints that are taken for whole ones, and a stage that
starts from a half-written hybrid. With other layouts in between: samples in another order.
"""

from __future__ import annotations

import logging
import os
import random
import re
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from hydra_tools import cli
from kit import recorded_train
from kit.distributed import run_distributed
from kit.lives import (
    BATCH,
    LENGTH,
    NUM_STEPS,
    RUN_SECONDS_MAX,
    Run,
    checkpoint_step,
    differences,
    order,
    paths,
    read_tensors,
    torchrun,
    write_inputs,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_hydra.training.config import load_config

pytestmark = [pytest.mark.dist, pytest.mark.slow]

STAGES = ("align", "distill", "long_context")
FEW_STEPS = 8  # enough for the kills that `make test` has
# In a life, what can be killed at the n-th call, and the largest n; a step calls the first three
# twice, the others once, and a save comes every other step.
PHASES = {"data": 6, "forward": 6, "backward": 6, "optimizer": 3, "optimizer_done": 3,
          "save_begin": 2, "save_files": 2, "save_metadata": 2, "save_config": 2, "save_mark": 2,
          "remove": 1, "start": 1, "load": 1}  # fmt: skip
AT_THE_END = ("hybrid_move", "hybrid_moved")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the runs read."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def short_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for runs of few steps."""
    return write_inputs(tmp_path_factory.mktemp("short_inputs"), FEW_STEPS)


def test_killed_chain_ends_bit_equal(short_inputs: Path, tmp_path: Path) -> None:
    """A kill per stage: in the backward pass, in a save in the background, and at the switch.

    Before that a signal to one rank of two, and torchrun killed alone: both save, at one step.
    """
    kills = {
        "align": ["backward:5:SIGUSR1", "backward:7"],
        "distill": ["save_files:2"],
        "long_context": ["backward:5:launcher", "hybrid_move:1"],
    }
    quiet = _quiet_chain(short_inputs, tmp_path, FEW_STEPS)
    killed = _chain(short_inputs, tmp_path / "killed", FEW_STEPS)
    _kill_chain(killed, kills, ["resume.async_save=true"])
    _compare(quiet, killed, num_kills=5)

    run = killed[0]
    written = load_config(run.folder / "run_config.yaml")  # with nothing left open
    chosen = (written.trainer.accelerator, written.model.backend, written.model.la_kernel)
    assert chosen == ("cpu", "local", "reference")
    assert "is complete" in run.live()


@pytest.mark.exhaustive
def test_thirty_kills_end_bit_equal(inputs: Path, tmp_path: Path) -> None:
    """Five kills per stage, in each way of saving; what is killed where is drawn from a seed."""
    seed = int(os.environ.get("HYDRA_KILL_SEED", random.SystemRandom().randrange(2**32)))
    logging.getLogger(__name__).warning("HYDRA_KILL_SEED=%d", seed)  # shown on failure
    dice = random.Random(seed)
    names = [name for _ in range(2) for name in dice.sample(sorted(PHASES), len(PHASES))]
    quiet = _quiet_chain(inputs, tmp_path)
    for index, more in enumerate(([], ["resume.async_save=true"])):
        kills = {}
        for stage in STAGES:
            phases = [names.pop() for _ in range(4)]
            kills[stage] = [f"{phase}:{dice.randint(1, PHASES[phase])}" for phase in phases]
            kills[stage].append(f"{dice.choice(AT_THE_END)}:1")
        # Nothing is removed or loaded in a first life without checkpoints.
        killed = _chain(inputs, tmp_path / f"killed_{index}")
        _kill_chain(killed, kills, more, is_fresh=True)
        _compare(quiet, killed, num_kills=15)


@pytest.mark.exhaustive
@pytest.mark.parametrize("fusion", ["scale", "none"])
def test_layout_changes_between_lives(inputs: Path, tmp_path: Path, fusion: str) -> None:
    """TP 2, then DP 2, then one rank: the same samples in the same order, values to rounding."""
    convert = ["convert", "--teacher", f"{inputs}/qwen3", "--plan", f"{inputs}/plan.json"]
    calibrated = [] if fusion == "none" else ["--calibration-tokens", "256"]
    hybrid = ["--out", f"{tmp_path}/hybrid", f"model.fusion={fusion}"]
    assert cli.main([*convert, *calibrated, *hybrid]) == 0
    init_from = [f"transfer.init_from={tmp_path}/hybrid"]
    quiet = Run(inputs, tmp_path / "quiet", "distill", init_from)
    quiet.live()
    moved = Run(inputs, tmp_path / "moved", "distill", init_from)
    one = "strategy.tensor_model_parallel_size=1"
    moved.live("backward:9")
    printed = moved.live("optimizer:5", more=[one])
    assert "random states start from the seed" in printed and "going on from" in printed
    moved.live(ranks=1, more=[one])
    assert order(moved) == order(quiet)
    tensors, common = moved.checkpoint()
    expected, expected_common = quiet.checkpoint()
    for name, value in expected.items():
        if fusion == "scale" and name.endswith(".sink"):
            continue  # its norm takes the sink's effect away, and Adam follows rounding alone
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            scale = float(value.abs().max())
            # Gradients may cancel in a first moment, a sink's of 2e-3 to 1e-6, and leave their
            # rounding; Adam divides it by the root of the second.
            if ".exp_avg." in name:
                second = expected[name.replace(".exp_avg.", ".exp_avg_sq.")]
                scale = max(scale, float(second.abs().max().sqrt()))
            torch.testing.assert_close(
                tensors[name], value, rtol=0, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
            )
    for part in ("lr_schedulers", "PreTrainingDataModule", "global_step"):
        assert common[part] == expected_common[part]


def _quiet_chain(inputs: Path, folder: Path, num_steps: int = NUM_STEPS) -> list[Run]:
    """On one pair of ranks that fork with NeMo imported, which takes most of a life."""
    runs = _chain(inputs, folder / "quiet", num_steps)
    stages = [(run.arguments, run.environment(), run.log) for run in runs]
    run_distributed(recorded_train.run_stages, 2, stages)
    return runs


def _kill_chain(
    runs: Sequence[Run], kills: dict[str, list[str]], more: Sequence[str], is_fresh: bool = False
) -> None:
    """Each stage killed so often, always by the same command, then run to its end.

    With ``is_fresh``, lives are new Python processes, as a user's are, and no forks.
    """
    for run in runs:
        run.is_fresh |= is_fresh
        for kill in kills[run.stage]:
            _live_on(run, _reachable(run, kill), more)
            if kill.count(":") == 2:
                _check_stopped(run)
            assert not (run.folder / "hybrid/model.json").exists() or kill == "hybrid_moved:1"
        saved_step = checkpoint_step(run.folder)
        if kills[run.stage][-1] == "hybrid_moved:1":
            assert "is complete" in run.live(more=more)
            continue
        printed = _live_on(run, "", more)
        assert f"placement balanced at {LENGTH} tokens" in printed  # not at the hybrid's 128
        if saved_step < run.num_steps:
            steps = list(range(saved_step + 1, run.num_steps + 1))
            assert _steps_of_newest_log(run.folder) == steps


def _check_stopped(run: Run) -> None:
    """All ranks have ended, some moments after torchrun, and have saved the step they were in."""
    end = time.monotonic() + 60
    while _ranks(run) and time.monotonic() < end:
        time.sleep(0.2)
    assert _ranks(run) == [], "orphans"
    step = checkpoint_step(run.folder)
    assert step in (3, 4)  # two backward passes each; a launcher's end takes a moment to be known
    printed = run.printed()
    sentence = (
        f": stopped after step {step} of {run.num_steps}, which is saved in "
        f"{run.folder}/checkpoints; the same command goes on from there"
    )
    assert sentence in printed, printed[-4000:]


def _ranks(run: Run) -> list[int]:
    """Processes of the last life: torchrun gives each rank a session, and so what that starts."""
    own = [x for x in run.records() if "pid" in x and x["life"] == run.num_lives]
    assert len(own) == 2
    return [pid for pid in psutil.pids() if _session(pid) in {entry["pid"] for entry in own}]


def _session(pid: int) -> int | None:
    """None of a process that has ended, if only just, or that nobody has waited for."""
    with suppress(ProcessLookupError, psutil.NoSuchProcess):
        if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            return os.getsid(pid)
    return None


def _live_on(run: Run, kill: str, more: Sequence[str]) -> str:
    """One life, from the newest checkpoint: a run that starts anew would end bit-equal too."""
    saved_step = checkpoint_step(run.folder)
    printed = run.live(kill, more=more)
    start = f"going on from {run.folder}/checkpoints/step_{saved_step:08d}"
    assert (start if saved_step else "starting at step 0") in printed, printed
    return printed


def _reachable(run: Run, kill: str) -> str:
    """The kill, or one while data is read where nothing is there to be loaded or removed."""
    needs_checkpoint = kill.partition(":")[0] in ("load", "remove")
    return kill if checkpoint_step(run.folder) or not needs_checkpoint else "data:5"


def _chain(inputs: Path, folder: Path, num_steps: int = NUM_STEPS) -> list[Run]:
    """The three stages, each from the one before."""
    folder.mkdir()
    runs, init_from = [], inputs / "hybrid"
    for stage in STAGES:
        run = Run(inputs, folder / stage, stage, [f"transfer.init_from={init_from}"])
        runs.append(replace(run, num_steps=num_steps))
        init_from = folder / stage / "hybrid"
    return runs


def _compare(quiet: list[Run], killed: list[Run], num_kills: int) -> None:
    assert sum(len(set(run.kills())) > 0 for run in killed) == len(STAGES)
    assert sum(len(run.kills()) for run in killed) >= num_kills
    start = read_tensors(quiet[0].inputs / "hybrid/weights")
    for expected, found in zip(quiet, killed, strict=True):
        what = f"{found.stage} after {found.kills()}"
        samples = [sample for _, sample in order(found)]
        assert sorted(samples) == list(range(found.num_steps * BATCH)), (
            f"{what}: not each sample once"
        )
        assert found.consumed() == expected.consumed(), what
        common = found.checkpoint()[1]
        assert common["PreTrainingDataModule"]["consumed_samples"] == found.num_steps * BATCH, what
        for one, other in zip(found.checkpoint(), expected.checkpoint(), strict=True):
            assert not (different := differences(one, other)), f"{what}: {different}"
        ends = [read_tensors(run.folder / "hybrid/weights") for run in (found, expected)]
        assert not (different := differences(*ends)), f"{what}: {different}"
        assert differences(ends[0], start), f"{what}: nothing was trained"


def _steps_of_newest_log(run: Path) -> list[int]:
    """The steps that the run's last process has recorded."""
    newest = max(run.glob("tensorboard/events*"), key=lambda path: path.stat().st_mtime)
    events = EventAccumulator(str(newest), size_guidance={"scalars": 0})
    events.Reload()
    return [point.step for point in events.Scalars("train/loss")]


def test_bad_input_is_one_sentence_on_every_rank(short_inputs: Path, tmp_path: Path) -> None:
    """torchrun itself prints a traceback of its own and exits with 1; nothing of ours does."""
    overrides = [f"log.folder={tmp_path / 'run'}", "transfer.init_from=nowhere"]
    arguments = ["-m", "hydra_tools.train", "--config", f"{short_inputs}/run.yaml", *overrides]
    finished = subprocess.run(
        [*torchrun(2), *arguments, "transfer.stage=align"],
        capture_output=True, text=True, timeout=RUN_SECONDS_MAX,
        env={**os.environ, "PYTHONPATH": paths(), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert finished.returncode == 1
    log = finished.stdout + finished.stderr
    sentence = "megatron-hydra: error: nowhere is not a checkpoint folder: it has no model.json"
    assert f"\n{sentence}\n" in f"\n{log}"
    # ... and again in the summary that ends what torchrun prints.
    *_, summary = log.partition("Root Cause")
    assert re.search(r"exitcode +: 2 ", summary) and f"traceback : {sentence}" in summary
    assert "most recent call first" not in log, "a stack of faulthandler"
    assert not re.search(r'File ".*(megatron_hydra|hydra_tools)', log)
    assert not (tmp_path / "run").exists()
