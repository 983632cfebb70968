"""A whole transfer by `examples/slurm/transfer.sbatch` over two nodes, whatever befalls them.

Catches: steps that do not run under Slurm, or not from a user's own folder; a preempted job, or one
whose node lost its power, that ends for good or at another result; two jobs in one run folder.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import yaml
from kit.cluster import HERE, HOSTS, ROOT, Job, call, until
from kit.lives import differences, read_tensors

from megatron_hydra.api.preprocess import Retrieval, preprocess
from megatron_hydra.api.status import Status, status
from megatron_hydra.errors import UserError
from megatron_hydra.selection.scores import HeadScores

pytestmark = [pytest.mark.cluster]

STEPS = ("convert_teacher", "score", "plan", "convert", "stage1_align", "stage2_distill",
         "stage3_long_context", "export", "evaluate", "report")  # fmt: skip
MAX_STEPS = {"stage1_align": 160, "stage2_distill": 60, "stage3_long_context": 60}

# The other node runs the script and, but for the ranks, all steps.
POWER_CUTS = {"stage2_distill": HOSTS[1], "stage3_long_context": HOSTS[0]}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: teacher, text, data and YAML files, named from there."""
    home = tmp_path_factory.mktemp("home") / "my work"
    shutil.copytree(ROOT / "examples/quickstart/teacher", home / "teacher")
    (home / "text.txt").write_text((ROOT / "docs/method.md").read_text() * 2)
    preprocess(home / "teacher", home / "data", retrieval=Retrieval(0.5, 128, 64))
    (home / "my configs").mkdir()
    for path in (ROOT / "examples/quickstart").glob("s*.yaml"):
        shutil.copy(path, home / "my configs")
    (home / "my configs/transfer.yaml").write_text(yaml.safe_dump(_transfer()))
    return home


def _transfer() -> dict:
    """Small, in all steps; the launcher of another place is not to be used."""
    stages = {
        stage: {
            "data": {"paths": ["data"], "seq_length": 64, "micro_batch_size": 1,
                     "global_batch_size": 1},
            "trainer": {"max_steps": steps},
            "resume": {"save_every_n_steps": 20},
        }
        for stage, steps in MAX_STEPS.items()
    }  # fmt: skip
    return {
        "run": {"folder": "runs/first run", "teacher": "teacher", "launcher": "torchrun"},
        "score": {
            "probes": {"names": ["niah_single_1"], "pairs": 2, "pairs_of": {}, "text": "text.txt"},
            "scorers": {"names": ["activation_patching"]},
        },
        "plan": {"fa_ratio": "1/4", "serve_dtype": "fp32"},
        "convert": {"calibration_text": "text.txt", "calibration_length": 128,
                    "calibration_tokens": 256},
        **stages,
        "evaluate": {"text": ["text.txt"], "lengths": 128, "tasks": "niah_single_2",
                     "num_samples": 5, "wording": "short", "perplexity_tokens": 256,
                     "serve_dtype": "fp32"},
    }  # fmt: skip


def _submit(home: Path, run: str, *options: str, ranks: int = 1) -> Job:
    more = ["my configs/transfer.yaml", f"run.folder=runs/{run}"]
    return Job(home, options, more, cwd=home, GPUS_PER_NODE=str(ranks))


def _verdicts(job: Job) -> list[tuple[str, str]]:
    """What the job's last start said of each step."""
    said = [line[3:].split(": ", 1) for line in job.said().splitlines() if line.startswith("== ")]
    return [(name, verdict) for name, verdict in said[-len(STEPS) :]]


def _status(run: Path, stage: str) -> Status | None:
    try:
        return status(run / stage)
    except UserError:  # it has not begun
        return None


def _wait_for_save(run: Path, stage: str, number: int) -> None:
    def is_saved() -> bool:
        found = _status(run, stage)
        return found is not None and found.saved_step >= number < found.step

    until(is_saved, 300, f"{stage} in {run} beyond a save at step {number}")


def test_a_transfer_goes_on_after_preemption_and_power_cuts(home: Path) -> None:
    quiet, hurt = home / "runs/first run", home / "runs/hurt run"
    job = _submit(home, quiet.name)
    assert job.wait_for_end() == ("COMPLETED", "0:0"), job.said()[-4000:]
    assert _verdicts(job) == [(name, "to run") for name in STEPS]
    assert "stage3_long_context" in (quiet / "report.html").read_text(encoding="utf-8")

    job = _submit(home, hurt.name)
    _wait_for_save(hurt, "stage1_align", 20)
    options = ["--parsable", "--partition=urgent", "--nodes=2", "--output=/dev/null"]
    urgent = call("sbatch", *options, "--wrap=sleep 1", cwd=home).strip()
    job.wait_for_restart(1)
    until(lambda: "COMPLETED" in call("scontrol", "show", "job", urgent), 120, "the urgent job")
    assert not (hurt / "stage1_align/hybrid").exists()
    waiting = _submit(home, hurt.name, "--dependency=singleton")

    for restart, (stage, host) in enumerate(POWER_CUTS.items(), 2):
        _wait_for_save(hurt, stage, 20)
        _cut_power(job, host, restart)
        assert not (hurt / stage / "hybrid").exists()

    assert job.wait_for_end() == ("COMPLETED", "0:0"), job.said()[-4000:]
    assert "== stage1_align: to go on after step " in job.said()
    assert waiting.wait_for_end() == ("COMPLETED", "0:0"), waiting.said()[-4000:]
    assert _verdicts(waiting) == [(name, "done") for name in STEPS]

    scores = [HeadScores.load(run / "scores.json").scores.tolist() for run in (quiet, hurt)]
    assert scores[0] == scores[1]
    assert _layers(quiet) == _layers(hurt)
    for stage in MAX_STEPS:
        weights = [read_tensors(run / stage / "hybrid/weights") for run in (quiet, hurt)]
        assert differences(*weights) == []


def _cut_power(job: Job, host: str, restart: int) -> None:
    """And give it back once the job waits for it."""
    call(f"{HERE}/hosts.sh", "crash", host)
    until(lambda: job.record("Restarts") == str(restart), 240, f"requeued without {host}")
    call(f"{HERE}/slurm.sh", "slurmd", host)
    # A node that registers without jobs counts as idle to Slurm, whose it be: it has to be first.
    time.sleep(5)
    job.wait_for_restart(restart)


def _layers(run: Path) -> list:
    return json.loads((run / "plan.json").read_text())["layers"]


def test_a_signal_ends_a_step_without_ranks_too(home: Path) -> None:
    """It has nothing to save; srun has it on the first node, maybe after the signal comes."""
    job = _submit(home, "early", "--nodes=1")
    until(lambda: " hydra_tools.cli convert " in job.said(), 120, "the first step")
    call("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_for_restart(1)
    assert "stopped at convert_teacher; the same command goes on from there" in job.said()
    assert not (home / "runs/early/teacher").exists()
    until(lambda: "== score" in job.said(), 240, "the step after it")
    assert "== convert_teacher: to run again, as it was cut off" in job.said()
    call("scancel", job.number)


def test_a_second_job_in_the_same_folder_is_refused(home: Path) -> None:
    first = _submit(home, "two", "--nodes=1", ranks=2)
    until(lambda: "== score" in first.said(), 120, "the first one's step")
    second = _submit(home, "two", "--nodes=1", ranks=2)
    assert second.wait_for_end(120) == ("FAILED", "2:0"), second.said()
    assert "run.folder runs/two is in use by process" in second.said()
    assert "cannot run as it was asked to: not requeued" in second.said()
    call("scancel", "--batch", "--signal=USR1", first.number)  # as before the time limit
    first.wait_for_restart(1)
    assert "requeued: my configs/transfer.yaml was asked to stop" in first.said()
