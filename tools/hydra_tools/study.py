"""`megatron-hydra study`: many arms side by side in processes, and the page that they make.

Each teacher and each arm is a process of its own: what one leaves in Megatron's or NeMo's state, or
in a GPU's memory, ends with it, and one that fails ends no other.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from hydra_tools import stops
from megatron_hydra.errors import UserError
from megatron_hydra.files import lock, write_beside
from megatron_hydra.processes import end_with_parent
from megatron_hydra.study.config import STAGES, Run, StudyConfig, load_study
from megatron_hydra.study.results import ArmResult, load_results
from megatron_hydra.study.speeds import load_speeds, timed_arms
from megatron_hydra.study.teacher import INPUTS, all_inputs, is_prepared, teacher_place

_TEACHER = "teacher:"
_SECONDS_TO_STOP = 45.0
_SECONDS_BETWEEN_LOOKS = 0.2
_NO_END = 10**6
_LEAST_FAILURES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--config", required=True, help="YAML file of the study")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--workers", type=int, default=1, help="arms that run side by side, on all GPUs"
    )
    parser.add_argument("--minutes", type=float, help="stop after so many; what is left goes on")
    parser.add_argument(
        "--bundle", type=Path, metavar="FILE.tar",
        help="results and trained teachers in one file: read at the start where the study's folder "
        "lacks them, written whenever one is finished",
    )  # fmt: skip
    parser.add_argument(
        "--questions", nargs="+", default=(), metavar="NAME[@BUDGET]",
        help="run the arms of these questions alone, in this order; default: of all",
    )  # fmt: skip
    parser.add_argument(
        "--speeds", action="store_true",
        help="measure how fast the arms of the section speeds are, one after another, and end",
    )  # fmt: skip
    parser.add_argument("--retry-failed", action="store_true", help="run failed arms again")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="tell of each arm what it is and whether it is to run",
    )
    parser.add_argument(
        "--report", type=Path, metavar="PAGE.md", help="write the page of the results, and end"
    )
    parser.add_argument(
        "--only", metavar="NAME", help="run one arm, by its name in --dry-run, in this process"
    )
    parser.add_argument("--seconds", type=float, default=_NO_END, help=argparse.SUPPRESS)
    parser.epilog = (
        "The same command again goes on where it was; SIGTERM and SIGINT have all arms save and "
        f"stop. Exit codes: 0 when no arm is left to run, 2 for bad input, {stops.EXIT_CODE} when "
        "stopped by a signal or by --minutes."
    )


def run(args: argparse.Namespace) -> int:
    """Run the study, one arm of it, or write its page; return the exit code."""
    study = load_study(args.config, args.overrides)
    if args.workers < 1 or (args.minutes is not None and args.minutes <= 0):
        raise UserError("--workers must be 1 or more and --minutes above 0")
    if args.only is not None:
        return _run_one(study, args.only, args.seconds)
    runs = study.runs(args.questions)
    if args.bundle is not None and args.bundle.exists():
        _unpack(study, args.bundle)
    if args.report is not None:
        from megatron_hydra.study.page import write_page

        write_page(study, load_results(study), args.report, load_speeds(study))
        return 0
    if args.speeds:
        return _measure_speeds(study, args)
    verdicts = {run: _verdict(study, run, args.retry_failed) for run in runs}
    if args.dry_run:
        _tell(study, verdicts)
        return 0
    with lock(study.folder / ".study.lock", f"run.folder {study.folder}"):
        jobs = _Jobs(study, args, [run for run, said in verdicts.items() if _is_left(said)])
        return jobs.run()


def _run_one(study: StudyConfig, name: str, seconds: float) -> int:
    """A teacher or an arm in this process."""
    from megatron_hydra.study.arm import run_arm
    from megatron_hydra.study.teacher import prepare_teacher
    from megatron_hydra.study.watch import StoppedError, Watch

    runs = {run.name: run for run in study.runs()}
    teacher = name.removeprefix(_TEACHER) if name.startswith(_TEACHER) else None
    if name not in runs and teacher not in study.teachers:
        raise UserError(f"the study has no arm {name}; --dry-run names all")
    with stops.listening(lambda sentence: print(sentence, file=sys.stderr)) as asked:
        watch = Watch(asked.is_asked)
        try:
            if teacher is not None:
                prepare_teacher(study, teacher, watch, seconds)
            else:
                run_arm(study, runs[name], watch)
        except StoppedError:
            return stops.EXIT_CODE
    return 0


def _measure_speeds(study: StudyConfig, args: argparse.Namespace) -> int:
    """Speeds, in this process alone."""
    from megatron_hydra.study.measure_speeds import measure_speeds
    from megatron_hydra.study.watch import StoppedError, Watch

    if args.workers > 1 or args.questions:
        raise UserError("--speeds measures the arms of the section speeds one after another: leave "
                        "--workers and --questions out")  # fmt: skip
    if args.dry_run:
        for timed in timed_arms(study):
            others = f", which stands for {', '.join(timed.stands_for)}" if timed.stands_for else ""
            print(f"{timed.run.name}{others}")
        return 0
    end = time.monotonic() + 60 * (_NO_END if args.minutes is None else args.minutes)
    with (
        lock(study.folder / ".study.lock", f"run.folder {study.folder}"),
        stops.listening(lambda sentence: print(sentence, file=sys.stderr)) as asked,
    ):
        watch = Watch(lambda: asked.is_asked() or time.monotonic() > end)
        try:
            left = end - time.monotonic()
            tell = functools.partial(print, flush=True)
            num_failed = measure_speeds(study, watch, left, tell)
        except StoppedError:
            print("stopped; what is measured is kept, and the same command goes on")
            return stops.EXIT_CODE
    return 1 if num_failed else 0


def _verdict(study: StudyConfig, run: Run, retry_failed: bool) -> str:
    """What is to become of a run, in words."""
    path = study.results / f"{run.name}.json"
    begun = (study.folder / "arms" / run.name).exists()
    if not path.is_file():
        return "to go on" if begun else "to run"
    result = ArmResult.load(path)
    if (teacher_place(study, run.teacher) / INPUTS).is_file():
        inputs = all_inputs(study, run)
        if changed := [key for key in inputs if result.inputs.get(key) != inputs[key]]:
            return f"to run again, as {', '.join(changed)} changed"
    if result.status == "failed":
        return "to run again, as it failed" if retry_failed else f"failed: {result.reason}"
    return "done"


def _is_left(verdict: str) -> bool:
    return verdict.startswith("to ")


def _tell(study: StudyConfig, verdicts: dict[Run, str]) -> None:
    for name, teacher in study.teachers.items():
        made = teacher.folder or f"to be trained by {teacher.script}"
        ready = "ready" if study.teacher_folder(name).exists() else "not there"
        print(f"teacher {name}: {made} ({ready})")
    total = steps = 0
    for run, verdict in verdicts.items():
        numbers = {stage: study.steps(run, stage) for stage in STAGES}
        tokens = sum(study.tokens(run, stage) for stage in STAGES)
        told = ", ".join(f"{stage} {number:,}" for stage, number in numbers.items() if number)
        told = f"{told} steps, {tokens:,} tokens" if told else "untrained"
        print(f"{run.name:<36} {told}: {verdict}")
        if _is_left(verdict):
            total, steps = total + tokens, steps + sum(numbers.values())
    left = sum(map(_is_left, verdicts.values()))
    print(f"{left} of {len(verdicts)} runs are left: {steps:,} steps, {total:,} tokens")
    asked = study.evaluation
    cells = len(asked.tasks) * len(study.lengths)
    lengths = ", ".join(map(str, study.lengths))
    print(f"each is asked {cells * asked.samples:,} prompts at {lengths} "
          f"tokens, and {len(asked.probes) * asked.samples:,} of probes")  # fmt: skip


class _Jobs:
    """The processes of a study."""

    def __init__(self, study: StudyConfig, args: argparse.Namespace, runs: Sequence[Run]) -> None:
        self.study, self.args, self.left = study, args, list(runs)
        self.begun = time.monotonic()
        minutes = _NO_END if args.minutes is None else args.minutes
        self.end = self.begun + max(0.0, 60 * minutes - _SECONDS_TO_STOP)
        self.stopped = ""
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.gpu_of: dict[str, str] = {}  # of each that runs, where there are several
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
        free = self.args.workers - len(self.running)
        ready: dict[str, bool] = {}
        jobs = []
        for run in self.left:
            teacher = run.teacher
            if teacher not in ready:
                at_work = _TEACHER + teacher in self.running
                ready[teacher] = not at_work and is_prepared(self.study, teacher)
                if not ready[teacher] and teacher not in self.failed_teachers:
                    jobs.append(_TEACHER + teacher)
        jobs += [run.name for run in self.left if ready[run.teacher]]
        yield from [job for job in jobs if job not in self.running][: max(0, free)]

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
            self.running[job] = subprocess.Popen(
                [sys.executable, "-m", "hydra_tools.study", *words],
                stdout=stream, stderr=stream, env=environment, start_new_session=True,
                preexec_fn=functools.partial(end_with_parent, os.getpid()),
            )  # fmt: skip
        self._say(f"{job}: started")

    def _reap(self) -> None:
        for job, process in list(self.running.items()):
            if (code := process.poll()) is None:
                continue
            del self.running[job]
            self.gpu_of.pop(job, None)
            if code == 0:
                self.num_finished += not job.startswith(_TEACHER)
                self._say(f"{job}: finished")
            elif code == stops.EXIT_CODE or self.stopped:
                self._say(f"{job}: stopped")
                continue
            else:
                reason = self._reason(job, code)
                self._say(f"{job}: failed: {reason}")
                self._note_failure(job, reason)
            self.left = [run for run in self.left if run.name != job]
            self._pack()

    def _note_failure(self, job: str, reason: str) -> None:
        if job.startswith(_TEACHER):
            self.failed_teachers.add(job.removeprefix(_TEACHER))
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
            _pack(self.study, self.args.bundle)

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


def _carried(study: StudyConfig) -> Iterator[tuple[Path, str]]:
    """What a bundle holds: where it lies, and its name there."""
    for run in study.runs():
        path = study.results / f"{run.name}.json"
        if path.is_file():
            yield path, f"results/{path.name}"
    for name, teacher in study.teachers.items():
        place = teacher_place(study, name)
        there = [place / INPUTS, place / "scores.json"]
        there += [] if teacher.folder else sorted((place / "hf").glob("*"))
        yield from ((p, f"teachers/{p.relative_to(place.parent)}") for p in there if p.is_file())


def _pack(study: StudyConfig, bundle: Path) -> None:
    with write_beside(bundle, overwrite=True) as temporary, tarfile.open(temporary, "w") as tar:
        for path, name in _carried(study):
            tar.add(path, name)


def _unpack(study: StudyConfig, bundle: Path) -> None:
    """What is there already stays."""
    try:
        with tarfile.open(bundle) as tar:
            for member in tar.getmembers():
                if member.isdir():  # as where somebody packed it anew
                    continue
                kind, _, rest = member.name.partition("/")
                if kind not in ("results", "teachers") or not (rest and member.isfile()):
                    raise UserError(f"{bundle} holds {member.name}: it is no bundle of a study")
                target = (study.results if kind == "results" else study.folder / kind) / rest
                if not target.exists():
                    member.name = rest
                    tar.extract(member, target.parents[rest.count("/")], filter="data")
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"cannot read the bundle {bundle}: {error}") from error


if __name__ == "__main__":
    from hydra_tools.cli import main

    sys.exit(main(["study", *sys.argv[1:]]))
