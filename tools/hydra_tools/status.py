"""`megatron-hydra status`: how far trainings are, from their folders; no GPU and no slow import."""

from __future__ import annotations

import argparse
import sys
import time

from hydra_tools.progress import SHOWN_SCALARS
from megatron_hydra.api.status import Status, status, status_of
from megatron_hydra.errors import UserError
from megatron_hydra.training.config import load_config

# A run that says nothing for so many times the usual seconds of a step, and for a minute, hangs.
_SILENT_STEPS, _SILENT_SECONDS = 5, 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a run (log.folder)")
    parser.add_argument(
        "--config", help="in place of RUN: the YAML file of one, with its overrides behind it"
    )
    parser.add_argument(
        "--steps", action="store_true", help="print no more than the number of saved steps"
    )


def run(args: argparse.Namespace) -> int:
    """Tell; return the exit code."""
    if args.config is None and not args.runs:
        raise UserError("no run is named: give the folders of runs, or --config")
    if args.config is not None:
        found = [status_of(load_config(args.config, args.runs))]
    else:
        found = [status(folder) for folder in args.runs]
    for each in found:
        print(each.saved_step if args.steps else "\n".join(_lines(each)))
    return 0


def _lines(found: Status) -> list[str]:
    lines = [f"{found.folder}: {found.stage}, {_state(found)}"]
    if found.step:
        ago = _ago(found.seconds_since_step)
        lines.append(f"  step {found.step:,} of {found.max_steps:,}, {ago}; {_scalars(found)}")
        lines.append(f"  {found.tokens:,} of {found.max_tokens:,} tokens{_resources(found)}")
    if found.validation is not None:
        step, loss = found.validation
        lines.append(f"  validation loss {_figure(loss)} at step {step:,}")
    if found.needles is not None:
        step, task, share = found.needles
        of_teacher = found.teacher_needles
        beside = "" if of_teacher is None else f", its teacher finds {of_teacher:.0%}"
        lines.append(f"  {share:.0%} of the needles found ({task}) at step {step:,}{beside}")
    if found.seconds_per_step is not None and not found.is_complete:
        left = found.seconds_left or 0.0
        end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + left))
        goal = f"{_duration(left)} left"
        if found.holder:
            goal += f", done about {end}"
        lines.append(f"  {found.seconds_per_step:.3g} s per step, {goal}")
    if found.saved_step:
        lines.append(f"  saved at step {found.saved_step:,}, {_ago(found.seconds_since_save)}")
    else:
        lines.append("  nothing is saved yet")
    return lines


def _state(found: Status) -> str:
    if found.is_complete:
        return "complete"
    if not found.holder:
        return "not running: the same command goes on" if found.saved_step else "not running"
    longest = max(_SILENT_SECONDS, _SILENT_STEPS * (found.seconds_per_step or 0.0))
    if (found.seconds_since_step or 0.0) > longest:
        return f"SILENT, though {found.holder} is alive"
    return f"running ({found.holder})"


def _scalars(found: Status) -> str:
    shown = {name: found.scalars[name] for name in SHOWN_SCALARS if name in found.scalars}
    return ", ".join(f"{name} {_figure(value)}" for name, value in shown.items())


def _figure(value: float | None) -> str:
    return "no number" if value is None else f"{value:.4g}"


def _resources(found: Status) -> str:
    """What the newest step took, as far as it is known: of a GPU alone."""
    memory, mfu = found.scalars.get("peak_memory_gib"), found.scalars.get("mfu")
    told = "" if memory is None else f", {memory:.3g} GiB of memory at the peak"
    return told if mfu is None else f"{told}, MFU {mfu:.1%}"


def _ago(seconds: float | None) -> str:
    return f"{_duration(max(0.0, seconds or 0.0))} ago"


def _duration(seconds: float) -> str:
    """A time as people say it, in its two largest units."""
    whole = round(seconds)
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    for (large, of_large), (small, of_small) in zip(units, units[1:], strict=False):
        if whole >= of_large:
            return f"{whole // of_large} {large} {whole % of_large // of_small} {small}"
    return f"{whole} s"


if __name__ == "__main__":
    from hydra_tools.cli import main

    sys.exit(main(["status", *sys.argv[1:]]))
