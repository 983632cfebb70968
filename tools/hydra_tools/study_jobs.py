"""The processes of a study: how many run, on which GPU, and what becomes of one that ends.

Each teacher and each arm is a process of its own: what one leaves in Megatron's or NeMo's state, or
in a GPU's memory, ends with it, and one that fails ends no other.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from hydra_tools import stops
from hydra_tools.study_bundle import pack
from megatron_hydra.processes import end_with_parent
from megatron_hydra.study.config import Run, StudyConfig
from megatron_hydra.study.results import ArmResult
from megatron_hydra.study.teacher import all_inputs, is_prepared

TEACHER = "teacher:"
"""Before a teacher's name, in what names a job."""
NO_END = 10**6
"""Minutes or seconds that no study takes."""
_SECONDS_TO_STOP = 45.0
_SECONDS_BETWEEN_LOOKS = 0.2
_LEAST_FAILURES = 3
# As PyTorch, CUDA, NCCL and cuBLAS say it.
_NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cudaErrorMemoryAllocation|Failed to CUDA calloc|"
    r"CUBLAS_STATUS_ALLOC_FAILED"
)
# Under CUDA's MPS a fault of one process, or its end by SIGKILL amidst a kernel, is a fault of all
# that share the GPU (NVIDIA's documentation of MPS, on error containment).
_GPU_FAULT = re.compile(
    r"illegal memory access|unspecified launch failure|CUDA_ERROR_MPS|cudaErrorMps"
)


class Jobs:
    """The processes of a study."""

    def __init__(self, study: StudyConfig, args: argparse.Namespace, runs: Sequence[Run]) -> None:
        self.study, self.args, self.left = study, args, list(runs)
        self.places = args.workers
        self.begun = time.monotonic()
        minutes = NO_END if args.minutes is None else args.minutes
        self.end = self.begun + max(0.0, 60 * minutes - _SECONDS_TO_STOP)
        self.stopped = ""
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.gpu_of: dict[str, str] = {}  # of each that runs, where there are several
        self.shared = set[str]()  # of what runs, what has run beside others on its device
        self.accompanied = set[str]()  # the same on any device: they share the host's memory
        self.faulted = set[str]()  # what a fault of the GPU has ended beside others: alone then
        self.log_starts: dict[str, int] = {}  # where in its log's bytes what runs now begins
        self.gpus = _gpus()
        self.failed_teachers: set[str] = set()
        self.num_finished = self.num_failed = 0

    def run(self) -> int:
        """Run what is left, or until time or a signal ends it."""
        earlier = {n: signal.signal(n, self._stop) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            while not self.stopped:
                if time.monotonic() > self.end:
                    self.stopped = "the time is over"
                    break
                for job in self._startable():
                    self._start(job)
                if not self.running:
                    break
                time.sleep(_SECONDS_BETWEEN_LOOKS)
                self._reap()
        finally:
            self._end_all()
            self._pack()  # a teacher may be trained, and not yet scored
            for number, handler in earlier.items():
                signal.signal(number, handler)
        if self.left and self.stopped:
            self._say(f"{self.stopped}: {len(self.left)} runs are left; the same command goes on")
            return stops.EXIT_CODE
        return 1 if self.failed_teachers else 0

    def _stop(self, number: int, _frame: object) -> None:
        self.stopped = self.stopped or signal.Signals(number).name

    def _startable(self) -> Iterator[str]:
        """Jobs for the free places, teachers before arms."""
        free = self.places - len(self.running)
        ready: dict[str, bool] = {}
        jobs = []
        for run in self.left:
            teacher = run.teacher
            if teacher not in ready:
                at_work = TEACHER + teacher in self.running
                ready[teacher] = not at_work and is_prepared(self.study, teacher)
                if not ready[teacher] and teacher not in self.failed_teachers:
                    jobs.append(TEACHER + teacher)
        jobs += [run.name for run in self.left if ready[run.teacher]]
        for job in [job for job in jobs if job not in self.running][: max(0, free)]:
            if self.running and self.faulted & {job, *self.running}:
                break
            yield job

    def _start(self, job: str) -> None:
        left = max(1.0, self.end - time.monotonic() - _SECONDS_TO_STOP)
        words = ["--config", self.args.config, *self.args.overrides, "--only", job]
        words += ["--seconds", str(left)]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        if len(self.gpus) > 1:
            self.gpu_of[job] = least_used(self.gpus, self.gpu_of.values())
            environment["CUDA_VISIBLE_DEVICES"] = self.gpu_of[job]
        log = self._log(job)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            self.log_starts[job] = stream.tell()
            self.running[job] = subprocess.Popen(
                [sys.executable, "-m", "hydra_tools.study", *words],
                stdout=stream, stderr=stream, env=environment, start_new_session=True,
                preexec_fn=functools.partial(end_with_parent, os.getpid()),
            )  # fmt: skip
        mates = {each for each in self.running if self.gpu_of.get(each) == self.gpu_of.get(job)}
        for known, others in ((self.shared, mates), (self.accompanied, {*self.running})):
            known.discard(job)
            known |= others if len(others) > 1 else set()
        self._say(f"{job}: started")

    def _reap(self) -> None:
        at_once = len(self.running)
        for job, process in list(self.running.items()):
            if (code := process.poll()) is None:
                continue
            del self.running[job]
            self.gpu_of.pop(job, None)
            if code == 0:
                self.num_finished += not job.startswith(TEACHER)
                self._say(f"{job}: finished")
            elif code == stops.EXIT_CODE or self.stopped:
                self._say(f"{job}: stopped")
                continue
            elif self._lacked_memory(job, code):
                self.places = max(1, min(self.places, at_once - 1))
                self.left.sort(key=lambda run: run.name == job)
                self._say(f"{job}: out of memory beside others: {self.places} run side by side "
                          "from here on, and it goes on after those that wait")  # fmt: skip
                continue
            elif self._ended_beside_others(job, _GPU_FAULT):
                self.faulted.add(job)
                self.left.sort(key=lambda run: run.name == job)
                self._say(f"{job}: a fault of the GPU, which may be another's beside it: it goes "
                          "on alone, after those that wait")  # fmt: skip
                continue
            else:
                reason = self._reason(job, code)
                self._say(f"{job}: failed: {reason}")
                self._note_failure(job, reason)
            self.left = [run for run in self.left if run.name != job]
            self._pack()

    def _lacked_memory(self, job: str, code: int) -> bool:
        """Whether others may have had what it lacked: its log, or the system's killer, says so."""
        if code == -signal.SIGKILL:
            return job in self.accompanied
        return self._ended_beside_others(job, _NO_MEMORY)

    def _ended_beside_others(self, job: str, cause: re.Pattern[str]) -> bool:
        """Whether it ran beside others on its device, and its log names the cause."""
        said = self._log(job).read_bytes()[self.log_starts[job] :].decode(errors="replace")
        return job in self.shared and cause.search(said) is not None

    def _note_failure(self, job: str, reason: str) -> None:
        if job.startswith(TEACHER):
            self.failed_teachers.add(job.removeprefix(TEACHER))
            return
        (run,) = (run for run in self.left if run.name == job)
        inputs = all_inputs(self.study, run)
        failed = ArmResult(
            run.arm, run.budget, run.teacher, run.seed, inputs, "failed", reason=reason
        )
        failed.save(self.study.results)
        self.num_failed += 1
        # What ails all would use up a GPU's time for nothing: as many as started together have
        # failed then, of which a few may fail while others still run well.
        if self.num_failed >= max(_LEAST_FAILURES, self.args.workers) and not self.num_finished:
            self.stopped = self.stopped or "none has finished, and too many have failed"

    def _end_all(self) -> None:
        """Have all save and stop; those that do not in time are killed."""
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        late = time.monotonic() + _SECONDS_TO_STOP
        while self.running:
            self._reap()
            if time.monotonic() > late:
                for process in self.running.values():
                    process.kill()
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _pack(self) -> None:
        if self.args.bundle is not None:
            pack(self.study, self.args.bundle)

    def _log(self, job: str) -> Path:
        return self.study.folder / "logs" / f"{job.replace(':', '.')}.log"

    def _reason(self, job: str, code: int) -> str:
        """The last line of its log, which names the error."""
        lines = self._log(job).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        ended = f"ended with code {code}"
        return f"{lines[-1].removeprefix('megatron-hydra: error: ')} ({ended})" if lines else ended

    def _say(self, sentence: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.begun), 60)
        print(f"{minutes:3d}:{seconds:02d} {sentence}", flush=True)


def _gpus() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = named.split(",") if named else map(str, itertools.count())
    return list(itertools.islice(names, torch.cuda.device_count()))


def least_used(gpus: Sequence[str], in_use: Iterable[str]) -> str:
    """The GPU that the fewest of those in use are, the first of several."""
    counts = Counter(in_use)
    return min(gpus, key=lambda gpu: counts[gpu])
