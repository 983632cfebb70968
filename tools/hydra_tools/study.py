"""`megatron-hydra study`: many arms side by side in processes, and the page that they make."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path

from hydra_tools import stops
from hydra_tools.study_bundle import unpack
from hydra_tools.study_jobs import NO_END, TEACHER, Jobs
from megatron_hydra.errors import UserError
from megatron_hydra.files import lock
from megatron_hydra.study.config import STAGES, Run, StudyConfig, load_study
from megatron_hydra.study.results import ArmResult, load_results
from megatron_hydra.study.speeds import load_speeds, timed_arms
from megatron_hydra.study.teacher import INPUTS, all_inputs, is_lost, loss_of, teacher_place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--config", required=True, help="YAML file of the study")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--workers", type=int, default=1,
        help="arms that run side by side, on all GPUs; fewer where memory ends, after which such "
        "an arm goes on later",
    )  # fmt: skip
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
    parser.add_argument("--seconds", type=float, default=NO_END, help=argparse.SUPPRESS)
    parser.epilog = (
        "The same command again goes on where it was; SIGTERM and SIGINT have all arms save and "
        "stop. A teacher that has results is never trained again. Exit codes: 0 when no arm is "
        "left to run, 1 when a teacher failed or is not here, 2 for bad input, "
        f"{stops.EXIT_CODE} when stopped by a signal or by --minutes."
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
        unpack(study, args.bundle)
    if args.report is not None:
        from megatron_hydra.study.page import write_page

        write_page(study, load_results(study), args.report, load_speeds(study))
        return 0
    if args.speeds:
        return _measure_speeds(study, args)
    lost = {name for name in study.teachers if is_lost(study, name)}
    verdicts = {run: _verdict(study, run, args.retry_failed) for run in runs}
    for run in (run for run, said in verdicts.items() if _is_left(said) and run.teacher in lost):
        verdicts[run] = "cannot run, as its teacher is not here"
    if args.dry_run:
        _tell(study, verdicts)
        _tell_lost(study, verdicts)
        return 0
    with lock(study.folder / ".study.lock", f"run.folder {study.folder}"):
        jobs = Jobs(study, args, [run for run, said in verdicts.items() if _is_left(said)])
        code = jobs.run()
    lost_code = _tell_lost(study, verdicts)
    return code or lost_code


def _tell_lost(study: StudyConfig, verdicts: dict[Run, str]) -> int:
    """Say of which teachers runs are left that cannot run; the exit code."""
    left = {run.teacher for run, said in verdicts.items() if said.startswith("cannot run")}
    for name in sorted(left):
        print(loss_of(study, name))
    return 1 if left else 0


def _run_one(study: StudyConfig, name: str, seconds: float) -> int:
    """A teacher or an arm in this process."""
    from megatron_hydra.study.arm import run_arm
    from megatron_hydra.study.teacher import prepare_teacher
    from megatron_hydra.study.watch import StoppedError, Watch

    runs = {run.name: run for run in study.runs()}
    teacher = name.removeprefix(TEACHER) if name.startswith(TEACHER) else None
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
    end = time.monotonic() + 60 * (NO_END if args.minutes is None else args.minutes)
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
        ready = "ready" if study.teacher_folder(name).exists() else "not here"
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


if __name__ == "__main__":
    from hydra_tools.cli import main

    sys.exit(main(["study", *sys.argv[1:]]))
