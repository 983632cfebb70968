"""Weights & Biases gets what TensorBoard gets, once, and no secret leaves the environment.

By a stand-in for the package, with the parts of its interface that Lightning's logger takes, and
by the package itself, offline. Catches: scalars or steps that one of the two lacks, a rank beside
the first that logs, a training that goes on in another run of W&B's, a key that is written down,
and a start without the package.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kit.distributed import run_distributed
from kit.lives import paths
from kit.optional import optional_program
from kit.tiny_models import PLAN
from test_training import END, NUM_STEPS, write_inputs

pytestmark = [pytest.mark.dist, pytest.mark.slow]

KEY = "5ec2e7" * 6
STAND_IN = {
    "wandb/__init__.py": '''
import json, os, sys
from wandb import errors
from wandb.wandb_run import Run
run = None

def init(**arguments):
    global run
    if "REFUSE" in os.environ:
        raise errors.UsageError("No API key\\nconfigured.")
    run = Run(arguments)
    return run
''',
    "wandb/errors.py": "class Error(Exception): ...\nclass UsageError(Error): ...\n",
    "wandb/wandb_run.py": '''
import json, os, sys

class Run:
    def __init__(self, arguments):
        self.write("init", {**arguments, "rank": os.environ["RANK"]})

    def write(self, what, values):
        with open(os.environ["STAND_IN_LOG"], "a") as stream:
            stream.write(json.dumps([what, values], default=str) + "\\n")

    def define_metric(self, *names, **options):
        pass

    def log(self, metrics):
        self.write("log", metrics)

    def finish(self):
        sys.modules["wandb"].run = None
        self.write("finish", {})
''',
    "wandb/sdk/__init__.py": "",
    "wandb/sdk/lib/__init__.py": "class RunDisabled: ...\n",
    "wandb-0.19.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: wandb\nVersion: 0.19.0\n",
}  # fmt: skip


def _install(folder: Path) -> Path:
    """Write the stand-in."""
    for name, text in STAND_IN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from megatron_hydra.training.indexed_dataset import write_indexed_dataset

    folder = write_inputs(tmp_path_factory.mktemp("inputs"), PLAN)
    write_indexed_dataset(folder / "held_out", [[1, END] * 40], END + 1, {})
    _install(folder / "packages")
    return folder


def test_it_gets_what_tensorboard_gets(inputs: Path, tmp_path: Path) -> None:
    """Stopped after a step and gone on with, on two ranks, with a step that is validated."""
    run_distributed(_train_twice, 2, inputs, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "wandb.log").read_text().splitlines()]
    assert [what for what, _ in lines if what != "log"] == ["init", "finish"] * 2
    begun = [values for what, values in lines if what == "init"]
    for values in begun:
        assert values["rank"] == "0" and values["resume"] == "allow"
        assert (values["project"], values["name"]) == ("hydra", "run")
        assert values["mode"] == "offline" and values["dir"] == str(tmp_path / "run")
        assert values["config"]["trainer"]["max_steps"] == NUM_STEPS
    assert begun[0]["id"] == begun[1]["id"] == (tmp_path / "run/wandb/run_id").read_text().strip()

    found: dict[tuple[str, int], float] = {}
    for _, values in (line for line in lines if line[0] == "log"):
        step = values.pop("trainer/global_step")
        assert not {(name, step) for name in values} & set(found), "logged twice"
        found |= {(name, step): value for name, value in values.items()}
    expected = _tensorboard(tmp_path / "run/tensorboard")
    assert {step for _, step in expected} == set(range(1, NUM_STEPS + 1))
    assert ("validation/loss", NUM_STEPS) in expected and ("train/kl", 1) in expected
    assert found == pytest.approx(expected, rel=1e-6)

    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"run_config.yaml", "metrics.jsonl", "model.json"} < {path.name for path in written}
    for path in [*written, tmp_path / "wandb.log"]:
        assert KEY.encode() not in path.read_bytes(), path


def _train_twice(inputs: Path, folder: Path) -> None:
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

    _use(inputs, folder)
    for last in (1, NUM_STEPS):
        asks = iter(range(1, NUM_STEPS + 2))
        _run(inputs, folder, last, asks)
        unset_num_microbatches_calculator()  # NeMo keeps the first run's


def _use(inputs: Path, folder: Path) -> None:
    sys.path.insert(0, str(inputs / "packages"))
    os.environ.update(WANDB_API_KEY=KEY, STAND_IN_LOG=str(folder / "wandb.log"))


def _run(inputs: Path, folder: Path, last: int, asks: Any) -> None:
    from megatron_hydra.nemo.training import TrainingRun
    from megatron_hydra.training.config import load_config

    overrides = [
        "log.wandb_project=hydra", "log.wandb_mode=offline", f"log.folder={folder}/run",
        f"data.validation_paths=[{inputs}/held_out]", "trainer.validate_every_n_steps=2",
        "trainer.validation_steps=1",
    ]  # fmt: skip
    run = TrainingRun(load_config(inputs / "run.yaml", overrides))
    if os.environ["RANK"] == "0":
        run.folder.path.mkdir(exist_ok=True)
        run.folder.write_config()
    run.run(lambda step, scalars: None, asks_to_stop=lambda: next(asks) == last)


def _tensorboard(folder: Path) -> dict[tuple[str, int], float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        (tag, point.step): point.value
        for tag in events.Tags()["scalars"]
        for point in events.Scalars(tag)
    }


# The records of a W&B file: blocks of 32 KiB, in which each part of one has a head of 7 bytes.
READ = """
import json, struct, sys
from wandb.proto.wandb_internal_pb2 import Record

def values(items):
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}

data, at, parts = open(sys.argv[1], "rb").read(), 7, b""
while at + 7 <= len(data):
    if 32768 - at % 32768 < 7:
        at += 32768 - at % 32768
        continue
    size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
    parts, at = parts + data[at + 7 : at + 7 + size], at + 7 + size
    if kind in (1, 4):  # whole, or the last part
        record, parts = Record.FromString(parts), b""
        if record.HasField("run"):
            run = record.run
            about = {"id": run.run_id, "project": run.project, "name": run.display_name}
            print(json.dumps(["run", {**about, "config": values(run.config.update)}]))
        if record.HasField("history"):
            print(json.dumps(["history", values(record.history.item)]))
"""


@pytest.mark.exhaustive  # two launches; the stand-in has the same scalars above
def test_the_package_itself_writes_into_the_run_folder_offline(
    inputs: Path, tmp_path: Path
) -> None:
    """A training that was stopped and goes on: two files of one run of W&B's."""
    python = optional_program("python")
    environment = {**os.environ, "PYTHONPATH": paths(), "OMP_NUM_THREADS": "1",
                   "WANDB_MODE": "offline", "WANDB_API_KEY": KEY}  # fmt: skip
    for last in (1, NUM_STEPS):
        trained = subprocess.run(
            [python, "-m", "hydra_tools.train", "--config", f"{inputs}/run.yaml",
             "log.wandb_project=hydra", f"log.folder={tmp_path}/run", f"trainer.max_steps={last}",
             "strategy.tensor_model_parallel_size=1", "resume.save_every_n_steps=1"],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert trained.returncode == 0, trained.stderr[-4000:]
    lines = []
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    for file in files:
        read = subprocess.run([python, "-c", READ, file], env=environment, capture_output=True)
        assert read.returncode == 0, read.stderr.decode()
        lines += [json.loads(line) for line in read.stdout.splitlines()]
    runs = [values for what, values in lines if what == "run"]
    known = (tmp_path / "run/wandb/run_id").read_text().strip()
    assert [(run["id"], run["project"], run["name"]) for run in runs] == [
        (known, "hydra", "run")
    ] * 2
    assert [run["config"]["trainer"]["max_steps"] for run in runs] == [1, NUM_STEPS]
    found: dict[tuple[str, int], float] = {}
    for _, values in (line for line in lines if line[0] == "history"):
        step = values.pop("trainer/global_step")
        found |= {(key, step): value for key, value in values.items() if key[0] != "_"}
    expected = _tensorboard(tmp_path / "run/tensorboard")
    assert {step for _, step in expected} == set(range(1, NUM_STEPS + 1))
    assert found == pytest.approx(expected, rel=1e-6)
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_a_refusal_of_theirs_is_one_sentence(inputs: Path, tmp_path: Path) -> None:
    run_distributed(_check_refusal, 1, inputs, tmp_path)


def _check_refusal(inputs: Path, folder: Path) -> None:
    from megatron_hydra.errors import UserError

    _use(inputs, folder)
    os.environ["REFUSE"] = "1"
    sentence = (
        "^log.wandb_project is hydra, but Weights & Biases does not start: No API key configured.; "
        "run wandb login or set WANDB_API_KEY, or set log.wandb_mode to offline$"
    )
    with pytest.raises(UserError, match=sentence):
        _run(inputs, folder, NUM_STEPS, iter(range(9)))
