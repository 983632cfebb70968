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
from contextlib import contextmanager
from typing import Any

from hydra_tools import launch
from megatron_hydra.nemo.config import RunConfig, load_config
from megatron_hydra.nemo.run_folder import RunFolder

_SHOWN = ("loss", "kl", "ce", "grad_norm", "lr", "tokens_per_s")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--overwrite", action="store_true", help="remove an earlier run first")


def run(args: argparse.Namespace) -> int:
    """Train, or go on with, one stage; return the exit code."""
    config = load_config(args.config, args.overrides)
    folder = RunFolder(config)
    is_first_rank = launch.rank() == 0
    if args.overwrite:
        if is_first_rank:
            folder.check_removable()
    else:
        folder.check()
        if folder.is_complete():
            if is_first_rank:
                print(f"{folder.path} is complete: the trained model is {folder.hybrid}")
            return 0
    training = _prepare(config)
    folder = training.folder  # of the configuration with nothing left open
    if is_first_rank and args.overwrite:
        folder.remove()
    if is_first_rank or not args.overwrite:  # else rank 0 may be removing it at this moment
        folder.check()
    if is_first_rank:
        folder.write_config()
    progress = _Progress(config)
    try:
        training.run(progress.show, start_anew=args.overwrite, command=_command(args))
    finally:
        progress.close()  # what is said next starts on a line of its own
    if is_first_rank:
        print(f"trained model: {folder.hybrid}")
    return 0


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
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(
                desc=self.config.transfer.stage,
                total=self.config.trainer.max_steps,
                initial=step - 1,
                unit="step",
                dynamic_ncols=True,
            )
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
