"""NeMo-Run: the example's stages one after the other, and a task that NeMo's plugin takes.

Catches: paths from NeMo-Run's own folders, a list that its quoting breaks, a task that
PreemptionPlugin passes over or has end with code 0, and a signal that loses steps.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kit.lives import paths
from kit.optional import optional_program
from kit.tiny_models import PLAN
from test_training import write_inputs

# Each test launches NeMo anew two to six times, which takes minutes on a busy machine.
pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

ROOT = Path(__file__).parents[2]


def test_two_stages_train_from_a_folder_that_is_not_nemo_runs(tmp_path: Path) -> None:
    write_inputs(tmp_path, PLAN)
    (tmp_path / "configs").mkdir()
    for name, init_from in (("stage1_align", "hybrid"), ("stage2_distill", "first/hybrid")):
        (tmp_path / f"configs/{name}.yaml").write_text(
            f"defaults: ../run.yaml\n"
            f"transfer: {{stage: {name[7:]}, init_from: {init_from}, teacher: teacher}}\n"
        )
    # A list, which NeMo-Run's local executor hands over in quotes.
    overrides = ["data.paths=[data]", "stage1_align.log.folder=first"]
    done = subprocess.run(
        [
            sys.executable, ROOT / "examples/nemo_run/local.py", "--ranks", "2",
            "--configs", "configs", "--stages", "stage1_align", "stage2_distill", "--",
            *overrides, "stage2_distill.log.folder=second",
        ],
        cwd=tmp_path, env=_environment(tmp_path), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for folder in ("first", "second"):
        assert (tmp_path / folder / "hybrid/model.json").is_file(), done.stdout + done.stderr


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "NEMORUN_HOME": str(folder / "nemo_run"), "PYTHONPATH": paths()}


# A stage as a function, with NeMo's plugin: as Slurm would get it, or on this machine.
PARTIAL = """
import os
import sys
import nemo_run as run
from hydra_tools.train import train_stage
from nemo.lightning.run.plugins import PreemptionPlugin

where, *overrides = sys.argv[1:]
tunnel = run.LocalTunnel(job_dir=run.config.get_nemorun_home())
slurm = run.SlurmExecutor(account="a", partition="p", time="1:00:00", tunnel=tunnel,
                          packager=run.Packager(), torchrun_nproc_per_node=1)
executor = slurm if where == "slurm" else run.LocalExecutor(ntasks_per_node=1)
executor.launcher = "torchrun"
with run.Experiment("partial") as experiment:
    task = run.Partial(train_stage, config="run.yaml", overrides=overrides, chdir=os.getcwd())
    experiment.add(task, executor, name="stage", plugins=[PreemptionPlugin(preempt_time=300)])
    if where == "slurm":
        experiment.dryrun()
    else:
        experiment.run(tail_logs=True)
"""


def test_a_stage_as_a_function_takes_nemos_preemption_plugin(tmp_path: Path) -> None:
    """Its signal is in the job, and the training that gets it saves, stops and goes on."""
    write_inputs(tmp_path, PLAN)
    overrides = ["log.folder=run", "data.paths=[data]", "transfer.init_from=hybrid",
                 "transfer.teacher=teacher", "strategy.tensor_model_parallel_size=1"]  # fmt: skip
    command = [sys.executable, "-c", PARTIAL]

    def start(where: str, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, where, *overrides, *more], cwd=tmp_path, env=_environment(tmp_path),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    said = start("slurm").communicate()[0]
    assert "#SBATCH --signal=15@300" in said and "no effect" not in said
    first = start("local", "trainer.max_steps=100000")
    metrics, end = tmp_path / "run/metrics.jsonl", time.monotonic() + 600
    while not metrics.exists():
        assert first.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    os.kill(_rank(tmp_path), signal.SIGTERM)
    said = first.communicate()[0]
    assert "SIGTERM: stopped after step" in said, said
    steps = len(metrics.read_text().splitlines())
    said = start("local", f"trainer.max_steps={steps + 1}").communicate()[0]
    assert f"going on from run/checkpoints/step_{steps:08d}" in said, said
    assert len(metrics.read_text().splitlines()) == steps + 1
    assert (tmp_path / "run/hybrid/model.json").is_file(), said


# As `examples/nemo_run/slurm.py` says, on this machine.
FAULT_TOLERANT = """
import os
import sys
import nemo_run as run

executor = run.LocalExecutor(ntasks_per_node=1, launcher=run.FaultTolerance(max_restarts=1))
arguments = ["--chdir", os.getcwd(), "--config", "run.yaml", *sys.argv[1:]]
task = run.Script(path="hydra_tools.train", m=True, entrypoint="python", args=arguments)
with run.Experiment("heartbeats") as experiment:
    experiment.add(task, executor, name="stage")
    experiment.run(tail_logs=True)
"""


def test_the_fault_tolerant_launcher_starts_a_stage_with_heartbeats(tmp_path: Path) -> None:
    python = optional_program("python")
    write_inputs(tmp_path, PLAN)
    environment = _environment(tmp_path)
    environment["PATH"] = os.pathsep.join([str(Path(python).parent), environment["PATH"]])
    overrides = ["log.folder=run", "transfer.init_from=hybrid", "transfer.teacher=teacher",
                 "strategy.tensor_model_parallel_size=1"]  # fmt: skip
    done = subprocess.run(
        [python, "-c", FAULT_TOLERANT, *overrides, "strategy.heartbeat_seconds=300"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert (tmp_path / "run/hybrid/model.json").is_file(), done.stdout + done.stderr


def _rank(folder: Path) -> int:
    """The process of the one rank that NeMo-Run has started for a folder."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
        except OSError:  # ended, or another user's
            continue
        home = f"NEMORUN_HOME={folder / 'nemo_run'}".encode()
        if home in variables and b"LOCAL_RANK=0" in variables:
            return int(path.parent.name)
    raise AssertionError("no rank")
