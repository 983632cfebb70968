"""A run's folder and its lives, each one launch of the same command, recorded and perhaps ended."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from kit import forks
from kit.tiny_models import PLAN_OF_KINDS, write_models
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

NUM_STEPS, SAVE_EVERY, BATCH, LENGTH = 14, 2, 2, 16
SAMPLE_BASE = 200  # as recorded_train.py has it
ROOT = Path(__file__).parents[2]
RUN_SECONDS_MAX = 600


def write_inputs(folder: Path, num_steps: int = NUM_STEPS) -> Path:
    """Write `teacher`, `hybrid`, `run.yaml` and `data`, whose samples say their number."""
    from megatron_hydra.training.indexed_dataset import write_indexed_dataset

    write_models(folder, PLAN_OF_KINDS)
    filler = random.Random(0)
    tokens = [
        token
        for sample in range(num_steps * BATCH)  # one epoch, to the last sample
        for token in (
            sample % SAMPLE_BASE,
            sample // SAMPLE_BASE,
            *filler.choices(range(256), k=14),
        )
    ]
    write_indexed_dataset(folder / "data", [[*tokens, 0]], 257, {})
    config = {
        "data": {"paths": [f"{folder}/data"], "seq_length": LENGTH, "micro_batch_size": 1,
                 "global_batch_size": BATCH},
        "trainer": {"max_steps": num_steps, "num_threads": 1},
        "strategy": {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True},
        "optim": {"lr": 1e-3, "warmup_steps": 5, "weight_decay": 0.1},
        "transfer": {"stage": "given by the test", "init_from": f"{folder}/hybrid",
                     "teacher": f"{folder}/teacher"},
        "log": {"folder": "given by the test"},
        "resume": {"save_every_n_steps": SAVE_EVERY},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


@dataclass
class Run:
    """One stage's run folder, its command, and the lives that it has had."""

    inputs: Path
    folder: Path
    stage: str
    overrides: list[str] = field(default_factory=list)
    is_fresh: bool = torch.cuda.is_available()
    """Lives are new Python processes; else forks, which CUDA would not survive."""
    num_lives: int = 0
    num_steps: int = NUM_STEPS

    @property
    def arguments(self) -> list[str]:
        fixed = [f"transfer.stage={self.stage}", f"log.folder={self.folder}"]
        return ["--config", f"{self.inputs}/run.yaml", *fixed, *self.overrides]

    def live(self, kill: str = "", ranks: int = 2, more: Sequence[str] = ()) -> str:
        """Run the command to its end, or to where it is ended; return what it printed."""
        code = self.start(kill, ranks, more).wait(timeout=RUN_SECONDS_MAX)
        printed = self.printed()
        # torchrun has codes of its own.
        expected = 1 if "SIG" in kill else -signal.SIGKILL if kill else 0
        assert code == expected, f"{kill or 'quiet'}: {printed[-4000:]}"
        return printed

    def start(
        self, kill: str = "", ranks: int = 2, more: Sequence[str] = ()
    ) -> subprocess.Popen | forks.Fork:
        """Begin a life; without torchrun where there are 0 ``ranks``."""
        environment = {**os.environ, **self.environment(kill, "resume.async_save=true" in more)}
        program = [str(Path(__file__).with_name("recorded_train.py")), *self.arguments, *more]
        if not self.is_fresh:
            return forks.start(program, environment, self.log, ranks)
        launcher = torchrun(ranks) if ranks else [sys.executable]
        with self.log.open("wb") as stream:
            return subprocess.Popen(
                [*launcher, *program], stdout=stream, stderr=subprocess.STDOUT, env=environment
            )

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def environment(self, kill: str = "", is_slow: bool = False) -> dict[str, str]:
        """What `recorded_train` asks for, of the next life."""
        self.num_lives += 1
        records = self.folder.with_name(f"{self.folder.name}.records")
        records.mkdir(parents=True, exist_ok=True)
        return {"RECORD": str(records), "KILL": kill, "LIFE": str(self.num_lives),
                "WRITE_SECONDS": "0.3" if is_slow else "0", "PYTHONPATH": paths(),
                "OMP_NUM_THREADS": "1"}  # fmt: skip

    def printed(self) -> str:
        """What the last life has printed until now."""
        return self.log.read_text(errors="replace")

    def records(self) -> list[dict[str, Any]]:
        """What the ranks recorded of all lives, in the order of their writing."""
        files = sorted(self.folder.with_name(f"{self.folder.name}.records").glob("*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def kills(self) -> list[str]:
        return [entry["killed"] for entry in self.records() if "killed" in entry]

    def consumed(self) -> list[tuple]:
        """Step, samples, tokens and random draws, without the steps that were rolled back."""
        entries = [entry for entry in self.records() if "step" in entry]
        start: dict[int, int] = {}  # of each life
        for entry in entries:
            start[entry["life"]] = min(entry["step"], start.get(entry["life"], self.num_steps))
        steps: dict[tuple, dict[int, list]] = {}
        for entry in entries:
            if all(entry["step"] < start[life] for life in start if life > entry["life"]):
                of_rank = steps.setdefault((entry["data"], entry["tensor"]), {})
                of_rank.setdefault(entry["step"], []).append(entry)
        return [
            (rank, step, *((e["samples"], e["tokens"], e["draws"]) for e in of_rank[step]))
            for rank, of_rank in sorted(steps.items())
            for step in sorted(of_rank)
        ]

    def checkpoint(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """All tensors and random states, and the common state, after the last step."""
        weights = self.folder / f"checkpoints/step_{self.num_steps:08d}/weights"
        common = torch.load(weights / "common.pt", weights_only=False)
        # The first holds the checkpoints' own paths, the second how often Lightning was started.
        return read_tensors(weights), {
            key: value for key, value in common.items() if key not in ("callbacks", "loops")
        }


def read_tensors(weights: Path) -> dict[str, Any]:
    file = weights.with_suffix(".whole.pt")
    if not file.exists():
        dcp_to_torch_save(weights, file)
    return torch.load(file, weights_only=False)


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two nests of dictionaries, lists, arrays and plain values differ, bit for bit."""
    if type(one) is not type(other):
        return [path]
    if isinstance(one, dict):
        wrong = [f"{path}.{key}" for key in one.keys() ^ other.keys()]
        parts = [(key, one[key], other[key]) for key in one.keys() & other.keys()]
    elif isinstance(one, list | tuple):
        wrong = [] if len(one) == len(other) else [path]
        parts = [(index, *pair) for index, pair in enumerate(zip(one, other, strict=False))]
    else:
        is_array = isinstance(one, torch.Tensor | np.ndarray)
        is_equal = np.array_equal(one, other) if is_array else one == other
        return [] if is_equal else [path]
    return wrong + [item for key, a, b in parts for item in differences(a, b, f"{path}.{key}")]


def torchrun(ranks: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(ranks)]


def paths() -> str:
    return os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tools"))


def order(run: Run) -> list[tuple[int, int]]:
    """Step and sample, in the order of the data: micro-batches are dealt out to the ranks."""
    of_step: dict[int, list[tuple]] = {}
    for (data, tensor), step, *batches in run.consumed():
        if tensor == 0:
            found = of_step.setdefault(step, [])
            found += [(place, data, tuple(batch[0])) for place, batch in enumerate(batches)]
    return [
        (step, sample)
        for step in sorted(of_step)
        for _, _, samples in sorted(of_step[step])
        for sample in samples
    ]


def checkpoint_step(run: Path) -> int:
    """Finished steps of the newest whole checkpoint; 0 if there is none."""
    unfinished = {path.name.removesuffix("-unfinished") for path in run.glob("checkpoints/*-unf*")}
    names = {path.name for path in run.glob("checkpoints/step_*") if path.is_dir()} - unfinished
    return max((int(name.removeprefix("step_")) for name in names), default=0)
