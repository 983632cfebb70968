"""`megatron-hydra transfer`: all steps from one YAML file, but for those that are finished.

Each step is a command of its own, and its ranks are started anew: Megatron's and NeMo's state is
the process's, and no rank waits for hours in a collective until another has evaluated.
"""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType

from hydra_tools import stops
from hydra_tools.transfer_steps import (
    RunSection,
    Step,
    check_evaluating,
    check_planning,
    load_steps,
)
from megatron_hydra.errors import UserError
from megatron_hydra.files import check_output, lock, write_json
from megatron_hydra.processes import end_with_parent
from megatron_hydra.schema import load_json
from megatron_hydra.teachers.model_folder import check_model_folder
from megatron_hydra.training.run_inputs import check_datasets_present

_STATE = "transfer.json"
_KIND, _SCHEMA_VERSION = "transfer", 1
_SECONDS_TO_SAVE = "600"
_LAUNCHERS = ("launcher", "single_launcher")


@dataclass(frozen=True)
class Record:
    """What is known of a step.

    Attributes:
        inputs: That it was begun with: settings as text, contents as hashes, by name.
        begun: When, in ISO's words.
        finished: The same; None if it was cut off.
    """

    inputs: dict[str, str]
    begun: str
    finished: str | None


@dataclass
class _File:
    """The JSON file."""

    steps: dict[str, Record] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--config", required=True, help="YAML file of the transfer")
    parser.add_argument("overrides", nargs="*", metavar="step.key=value")
    parser.add_argument(
        "--dry-run", action="store_true", help="tell of each step whether it is to run, and end"
    )
    parser.epilog = (
        "Start it without torchrun: run.launcher starts the ranks of score and of the stages. The "
        "same command again goes on where it was. The first SIGTERM, SIGINT, SIGHUP or SIGUSR1 "
        "has a stage save after its step. Exit codes: 0 when all is done, 2 for bad input, "
        f"{stops.EXIT_CODE} when stopped by a signal, else that of the step that failed."
    )


def run(args: argparse.Namespace) -> int:
    """Run what is to run; return the exit code."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError("start transfer without torchrun: run.launcher starts the ranks, as "
                        "run.launcher='torchrun --nproc-per-node 8'")  # fmt: skip
    section, steps = load_steps(args.config, args.overrides)
    launchers = _Launchers.of(section)
    state = State(Path(section.folder) / _STATE)
    verdicts = state.verdicts(steps)
    _check(section, steps, verdicts, state)
    if args.dry_run:
        for step in steps:
            print(f"{step.name:<20} {verdicts[step.name]}")
        return 0
    with lock(state.path.with_name(".transfer.lock"), f"run.folder {section.folder}"):
        return _run_all(steps, State(state.path), launchers)


@dataclass(frozen=True)
class _Launchers:
    """The beginnings of the steps' commands: of those that have ranks, and of the others."""

    ranks: list[str]
    single: list[str]

    @classmethod
    def of(cls, section: RunSection) -> _Launchers:
        found = {key: shlex.split(getattr(section, key) or "") for key in _LAUNCHERS}
        for key, words in found.items():
            if words and shutil.which(words[0]) is None:
                raise UserError(f"run.{key} starts with {words[0]}, which is no command here")
        ranks, single = found.values()
        single = single or [sys.executable]
        return cls(ranks or single, single)


class State:
    """Which steps are finished, and what they were made of: `transfer.json` in the run's folder.

    Args:
        path: Of the file, which need not be there yet.

    Raises:
        UserError: If it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        known = path.exists()
        self.steps = load_json(_File, path, _KIND, _SCHEMA_VERSION).steps if known else {}
        # That of an earlier release is of evaluation.json, and of none that may lie in its place.
        found = self.steps.get("evaluate")
        self.has_likelihoods = found is not None and "hydra-hf" not in found.inputs
        """Whether an earlier release has evaluated, by log-likelihood."""
        if self.has_likelihoods:
            del self.steps["evaluate"]

    def verdicts(self, steps: Sequence[Step]) -> dict[str, str]:
        """What is to become of each step, in words; `done` if nothing."""
        found: dict[str, str] = {}
        renewed: list[Path] = []
        for step in steps:
            found[step.name] = self.verdict(step, step.inputs(), renewed)
            if found[step.name] != "done":
                renewed.append(step.output)
        return found

    def verdict(self, step: Step, inputs: Mapping[str, str], renewed: Collection[Path] = ()) -> str:
        """The same of one step, before which others are to write ``renewed``."""
        record = self.steps.get(step.name)
        if record is None and step.name == "evaluate" and self.has_likelihoods:
            return "to run, by generated text; the evaluation.json of an earlier release stays"
        if record is None:
            return "to run"
        awaited = [
            name for name, path in step.reads.items()
            if isinstance(path, Path) and any(path.is_relative_to(output) for output in renewed)
        ]  # fmt: skip
        names = {**record.inputs, **inputs}
        changed = [
            name for name in names
            if record.inputs.get(name) != inputs.get(name) and name not in awaited
        ]  # fmt: skip
        if changed:
            return f"to run again, as {', '.join(changed)} changed"
        if awaited:
            return f"to run again if {', '.join(awaited)} will have changed"
        if record.finished is None:
            if step.goes_on and step.run is None and step.is_there():
                return "done"  # its ranks, or this process, died after it was written
            if not step.goes_on:
                return "to run again, as it was cut off"
            return f"to go on {step.kept()}".rstrip()
        return "done" if step.is_there() else f"to run again, as {step.output} is missing"

    def begin(self, step: Step, inputs: Mapping[str, str]) -> None:
        """Note that a step runs."""
        self._put(step.name, Record(dict(inputs), _now(), None))

    def finish(self, step: Step) -> None:
        """Note that it has ended well."""
        self._put(step.name, replace(self.steps[step.name], finished=_now()))

    def _put(self, name: str, record: Record) -> None:
        self.steps[name] = record
        known = {name: asdict(each) for name, each in self.steps.items()}
        data = {"kind": _KIND, "schema_version": _SCHEMA_VERSION, "steps": known}
        write_json(self.path, data, overwrite=True)


def _check(
    section: RunSection, steps: Sequence[Step], verdicts: Mapping[str, str], state: State
) -> None:
    """What can be said before the first step runs, and not hours later."""
    check_output(section.folder, overwrite=True, kind="folder")
    if check_model_folder(section.teacher):
        raise UserError(f"run.teacher {section.teacher} is a checkpoint folder: name the Hugging "
                        "Face folder that it is from")  # fmt: skip
    named_steps = {step.name: step for step in steps}
    check_planning(named_steps["score"], named_steps["plan"])
    check_evaluating(named_steps["evaluate"])
    for step in steps:
        if verdicts[step.name] == "done":
            continue
        if step.run is not None:  # what stands in its folder, the stage itself looks at
            check_datasets_present(step.run.data)
        elif step.name not in state.steps and step.output.exists():
            raise UserError(
                f"{step.output} exists, but {state.path} does not tell what it was made of: move "
                "it away, or choose another run.folder"
            )


def _run_all(steps: Sequence[Step], state: State, launchers: _Launchers) -> int:
    with _Child.hears_signals() as child:
        for step in steps:
            inputs = step.inputs()
            verdict = state.verdict(step, inputs)
            print(f"== {step.name}: {verdict}", flush=True)
            if verdict == "done":
                continue
            if child.stopped:
                return _end(child, step)
            code = _run(step, inputs, state, launchers, child)
            if code == 0:
                state.finish(step)
            elif child.stopped or code == stops.EXIT_CODE:
                return _end(child, step)
            else:
                print(f"megatron-hydra: {step.name} failed with code {code}; the same command "
                      "goes on from there", file=sys.stderr)  # fmt: skip
                return code
    return 0


def _run(
    step: Step, inputs: Mapping[str, str], state: State, launchers: _Launchers, child: _Child
) -> int:
    """Run one step's command; return its exit code."""
    record, arguments = state.steps.get(step.name), list(step.arguments)
    if record is not None and record.inputs != inputs:
        step.clear()
    if not step.goes_on:
        arguments += ["--overwrite"] if step.output.exists() else []
    start = launchers.ranks if step.has_ranks else launchers.single
    module = f"hydra_tools.{step.verb}"
    verb = ["-m", module] if step.has_ranks else ["-m", "hydra_tools.cli", step.verb]
    state.begin(step, inputs)
    command = [*start, *verb, *arguments]
    print(f"   {shlex.join(command)}", flush=True)
    return child.run(command)


def _end(child: _Child, step: Step) -> int:
    name = child.stopped or "a signal to a rank"
    print(f"megatron-hydra: {name}: stopped at {step.name}; the same command goes on from there",
          file=sys.stderr)  # fmt: skip
    return stops.EXIT_CODE


class _Child:
    """The process of the step that runs, and the signals that are handed on to it.

    It has a session of its own, so that of Ctrl-C it hears once. It gets SIGTERM for any: torchrun
    would die of SIGUSR1.
    """

    def __init__(self) -> None:
        self.stopped = ""
        """Name of the first signal."""
        self._process: subprocess.Popen[bytes] | None = None
        self._first = 0.0

    @classmethod
    @contextmanager
    def hears_signals(cls) -> Iterator[_Child]:
        """Hand signals on inside the block."""
        child = cls()
        heard = [each for each in stops.SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
        earlier = {number: signal.signal(number, child.take) for number in heard}
        try:
            yield child
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def take(self, number: int, _frame: FrameType | None) -> None:
        """Act on a signal; schedulers send one several times."""
        now = time.monotonic()
        if self.stopped and now - self._first < stops.SECONDS_OF_ONE_STOP:
            return
        if not self.stopped:
            self.stopped, self._first = signal.Signals(number).name, now
        self._tell()

    def run(self, command: Sequence[str]) -> int:
        """Run a command to its end; return its exit code."""
        # torchrun gives ranks 30 seconds else.
        environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": _SECONDS_TO_SAVE, **os.environ}
        self._process = subprocess.Popen(
            command, env=environment, start_new_session=True,
            preexec_fn=functools.partial(end_with_parent, os.getpid()),
        )  # fmt: skip
        if self.stopped:  # it came while the process was started
            self._tell()
        code = self._process.wait()
        self._process = None
        return code if code >= 0 else 128 - code

    def _tell(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


if __name__ == "__main__":
    from hydra_tools.cli import main

    sys.exit(main(["transfer", *sys.argv[1:]]))
