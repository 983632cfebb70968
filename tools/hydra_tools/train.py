"""`megatron-hydra train`, or `torchrun -m hydra_tools.train`: one stage of the transfer from YAML.

Imports stay inside functions where they are heavy: a config with a typo is answered at once.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from hydra_tools import launch, stops
from megatron_hydra.training.config import RunConfig, load_config
from megatron_hydra.training.run_folder import RunFolder
from megatron_hydra.training.run_inputs import check_present

_SHOWN = ("loss", "kl", "ce", "grad_norm", "lr", "tokens_per_s")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start anew: first remove what an earlier run wrote to log.folder, and nothing else",
    )
    parser.epilog = (
        "The same command again goes on from the newest checkpoint. SIGTERM, SIGINT and SIGUSR1 "
        "save after the step in progress (torchrun gives that 30 seconds, or what "
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT says); a second one ends at once. Exit codes: 0 when the "
        f"trained model is written, 2 for bad input, {stops.EXIT_CODE} when stopped by a signal "
        "(torchrun has a code of its own for that, which is not 0)."
    )


def run(args: argparse.Namespace) -> int:
    """Train, or go on with, one stage; return the exit code."""
    with stops.listening(_say) as asked, ExitStack() as stack:
        config = load_config(args.config, args.overrides)
        folder = RunFolder(config, args.config)
        is_first_rank = launch.rank() == 0
        _check_folder(folder, args.overwrite)
        if not args.overwrite and folder.is_complete():
            folder.check_trained()
            return _whole(folder)
        check_present(config)
        launch.check_launcher("train")
        is_held = is_first_rank and folder.lock_file.is_file()
        if is_held:  # or another run does: said now, not after the imports
            stack.enter_context(folder.lock())
        training = _prepare(config)
        folder = RunFolder(training.config, args.config)  # with nothing left open
        if is_first_rank:
            if not is_held:
                stack.enter_context(folder.lock())
            _check_folder(folder, args.overwrite)
            if args.overwrite:
                folder.remove()
            else:
                training.check_goes_on()
            folder.check_room()
            folder.write_config()
        num_steps = _train(training, args, asked)
        if num_steps == config.trainer.max_steps:
            return _whole(folder)
        asked.end()
        command = "the same command without --overwrite" if args.overwrite else "the same command"
        _say(
            f"{asked.name or 'a signal to another rank'}: stopped after step {num_steps} of "
            f"{config.trainer.max_steps}, which is saved in {folder.checkpoints}; {command} "
            "goes on from there"
        )
        training.wait_for_ranks()  # torchrun ends the others at once when one has ended
        return stops.EXIT_CODE


def _check_folder(folder: RunFolder, overwrite: bool) -> None:
    if not overwrite:
        folder.check()
    elif launch.rank() == 0:  # which may be removing it at this moment
        folder.check_removable()


def _train(training: Any, args: argparse.Namespace, asked: stops.Stops) -> int:
    progress = _Progress(training.config)
    try:
        steps: int = training.run(
            progress.show,
            start_anew=args.overwrite,
            command=_command(args),
            asks_to_stop=asked.is_asked,
        )
    finally:
        progress.close()  # what is said next starts on a line of its own
    return steps


def _whole(folder: RunFolder) -> int:
    if launch.rank() == 0:
        print(f"{folder.path} is complete: the trained model is {folder.hybrid}")
    return 0


def _say(sentence: str) -> None:
    """Tell torchrun, and on rank 0 the user; one write, as the thread that takes signals tells."""
    line = f"megatron-hydra: {sentence}"
    launch.tell_torchrun(line)
    if launch.rank() == 0:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def _prepare(config: RunConfig) -> Any:
    """Import the heavy parts and check the run."""
    gc.disable()  # a tenth of the import time goes to collecting nothing
    from megatron_hydra import cpu

    cpu.install_if_needed()
    with _quiet_imports():
        from megatron_hydra.nemo.training import TrainingRun
    gc.enable()
    return TrainingRun(config)


@contextmanager
def _quiet_imports() -> Iterator[None]:
    """Without NeMo's warnings of every optional package, and without its stack dumps.

    NeMo registers a dump on SIGTERM, which torchrun sends to the other ranks once one failed.
    """
    register, faulthandler.register = faulthandler.register, lambda *args, **kwargs: None
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        faulthandler.register = register


def _command(args: argparse.Namespace) -> list[str]:
    overwrite = ["--overwrite"] if args.overwrite else []
    return launch.command("train", ["--config", args.config, *args.overrides, *overwrite])


class _Progress:
    """One updating line: step, rate, time left and losses; made at the first finished step."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.bar: Any = None

    def show(self, step: int, scalars: dict[str, float]) -> None:
        """Move the line to ``step`` finished steps."""
        from hydra_tools.progress import meter

        if self.bar is None:
            stage, max_steps = self.config.transfer.stage, self.config.trainer.max_steps
            self.bar = meter(stage, "step", max_steps, initial=step - 1)
        self.bar.set_postfix_str(_progress_text(scalars), refresh=False)
        self.bar.update(step - self.bar.n)

    def close(self) -> None:
        """Leave the finished line standing."""
        if self.bar is not None:
            self.bar.close()


def _progress_text(scalars: dict[str, float]) -> str:
    """Losses and rates; of the layers' alignment losses the worst, as a line holds no more."""
    shown = {name: scalars[name] for name in _SHOWN if name in scalars}
    layers = {name: value for name, value in scalars.items() if name.startswith("alignment/")}
    if layers:
        worst = max(layers, key=lambda name: layers[name])
        shown = {"loss": shown.pop("loss"), f"worst {worst}": layers[worst], **shown}
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())


if __name__ == "__main__":
    sys.exit(launch.main("train"))
