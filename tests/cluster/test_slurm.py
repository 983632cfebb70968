"""`examples/slurm/transfer.sbatch` on a real Slurm: how it ends, goes on, and that nothing is lost.

Catches: work thrown away at a time limit, a next stage on a stopped one, a crash that ends the job
for good or requeues it for ever, another result than that of an undisturbed job.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kit.cluster import HOSTS, Job, call, kill_rank, until
from kit.lives import differences, read_tensors, write_inputs

from megatron_hydra.api.status import status_of
from megatron_hydra.training.config import RunConfig, load_config

pytestmark = [pytest.mark.cluster]

ROOT = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tools"))

STAGES = {
    "stage1_align": "align",
    "stage2_distill": "distill",
    "stage3_long_context": "long_context",
}
# So many that a signal comes before the last, also on a fast machine.
STEPS = {"stage1_align": 200, "stage2_distill": 120, "stage3_long_context": 3}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def _configs(folder: Path, inputs: Path) -> Path:
    """The three stages' YAML files, one rank on each host, and their run folders."""
    folder.mkdir()
    previous = inputs / "hybrid"
    for name, stage in STAGES.items():
        config = yaml.safe_load((inputs / "run.yaml").read_text())
        config["transfer"] |= {"stage": stage, "init_from": str(previous)}
        config["trainer"]["max_steps"] = STEPS[name]
        config["resume"]["save_every_n_steps"] = 20
        config["log"]["folder"] = f"{folder}/{name}"
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        previous = folder / name / "hybrid"
    return folder


def _config(folder: Path, stage: str) -> RunConfig:
    return load_config(folder / f"{stage}.yaml")


def _wait_for_step(folder: Path, stage: str, step: int, saved: int = 0) -> None:
    def is_there() -> bool:
        found = status_of(_config(folder, stage))
        return found.step >= step and found.saved_step >= saved

    until(is_there, 480, f"step {step} of {stage} in {folder}")


def test_whatever_ends_a_job_it_goes_on_to_the_same_models(tmp_path: Path, inputs: Path) -> None:
    quiet = _configs(tmp_path / "quiet", inputs)
    assert Job(quiet).wait_for_end() == ("COMPLETED", "0:0")

    hurt = _configs(tmp_path / "hurt", inputs)
    job = Job(hurt)
    _wait_for_step(hurt, "stage1_align", 5)
    call("scancel", "--batch", "--signal=USR1", job.number)
    _check_is_requeued(job, hurt)
    stopped = status_of(_config(hurt, "stage1_align"))

    next_save = stopped.saved_step // 20 * 20 + 20
    _wait_for_step(hurt, "stage1_align", next_save + 1, saved=next_save)
    kill_rank(HOSTS[1])
    job.wait_for_restart(2)
    assert "failed with code 1, but steps were saved since this start" in job.said()

    _wait_for_step(hurt, "stage2_distill", 5)
    call("scancel", "--batch", "--signal=TERM", job.number)
    assert job.wait_for_end() == ("FAILED", "75:0")
    assert "stage2_distill was asked to stop; the same sbatch command goes on" in job.said()
    stopped = status_of(_config(hurt, "stage2_distill"))
    assert 5 <= stopped.saved_step == stopped.step < STEPS["stage2_distill"]
    assert not (hurt / "stage3_long_context").exists()

    assert Job(hurt).wait_for_end() == ("COMPLETED", "0:0")
    for stage in STAGES:
        weights = [read_tensors(run / stage / "hybrid/weights") for run in (quiet, hurt)]
        assert differences(*weights) == []


def test_the_time_limit_throws_no_step_away(tmp_path: Path, inputs: Path) -> None:
    folder = _configs(tmp_path / "long", inputs)
    more = ["stage1_align.trainer.max_steps=100000", "resume.save_every_n_steps=100000"]
    job = Job(folder, ["--signal=B:USR1@60", "--time=3"], more)
    _check_is_requeued(job, folder, 100000)
    call("scancel", job.number)


def _check_is_requeued(job: Job, folder: Path, max_steps: int = STEPS["stage1_align"]) -> None:
    """After all steps of stage 1 are saved, and before another stage."""
    job.wait_for_restart(1)
    assert "requeued: stage1_align was asked to stop" in job.said()
    stopped = status_of(_config(folder, "stage1_align"))
    assert 0 < stopped.saved_step == stopped.step < max_steps
    assert not (folder / "stage2_distill").exists()


def test_what_cannot_go_on_is_not_started_again(tmp_path: Path, inputs: Path) -> None:
    folder = _configs(tmp_path / "bad", inputs)
    job = Job(folder, more=["stage1_align.optim.lrr=1"])
    assert job.wait_for_end(300) == ("FAILED", "1:0")
    sentence = "megatron-hydra: error: unknown config key optim.lrr: did you mean optim.lr?"
    assert f"[rank 0] {sentence}" in job.said()
    (own,) = (folder / "logs").glob("*/stage1_align/node_0/*/attempt_0/0/stderr.log")
    assert sentence in own.read_text()
    assert "no step was saved since this start: not requeued" in job.said()
    assert job.record("Restarts") == "0"


def test_a_second_job_at_once_is_refused(tmp_path: Path, inputs: Path) -> None:
    """And not queued again because the first one gets on; from a folder of the user's own."""
    folder = _configs(tmp_path / "two", inputs)
    more = ["stage1_align.trainer.max_steps=100000", "resume.save_every_n_steps=5"]
    first = Job(folder, ["--nodes=1"], more, cwd=tmp_path, GPUS_PER_NODE="2")
    _wait_for_step(folder, "stage1_align", 5)
    second = Job(folder, ["--nodes=1"], more, cwd=tmp_path, GPUS_PER_NODE="2")
    assert second.wait_for_end(240) == ("FAILED", "1:0"), second.said()
    assert "stage1_align is in use by process" in second.said()
    assert "as another process works in its folder: not requeued" in second.said()
    call("scancel", "--batch", "--signal=TERM", first.number)
    assert first.wait_for_end(120) == ("FAILED", "75:0"), first.said()


def test_nemo_run_goes_on_after_a_signal_and_chains_the_stages(
    tmp_path: Path, inputs: Path
) -> None:
    folder = _configs(tmp_path / "stages", inputs)  # NeMo-Run takes /nemo_run for its own
    launcher = subprocess.Popen(
        [
            sys.executable, ROOT / "examples/nemo_run/slurm.py", "--account", "root",
            "--partition", "main", "--nodes", "2", "--gpus-per-node", "1", "--time", "00:20:00",
            "--configs", folder, "--stages", "stage1_align", "stage2_distill",
        ],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "NEMORUN_HOME": str(tmp_path / "home"), "PYTHONPATH": PYTHONPATH},
    )  # fmt: skip
    try:
        _wait_for_step(folder, "stage1_align", 5)
        number = call("squeue", "--noheader", "--states=RUNNING", "--format=%A").split()[0]
        call("scancel", "--signal=TERM", number)  # as at the time limit: to the steps
        until(lambda: "Restarts=1" in call("scontrol", "show", "job", number), 120, "requeued")
        stopped = status_of(_config(folder, "stage1_align"))
        assert 5 <= stopped.saved_step < STEPS["stage1_align"]
        until(lambda: status_of(_config(folder, "stage2_distill")).is_complete, 600, "trained")
    finally:
        launcher.kill()
        said = launcher.communicate()[0]
    assert status_of(_config(folder, "stage1_align")).is_complete, said
