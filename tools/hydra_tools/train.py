"""`megatron-hydra train`, or `torchrun -m hydra_tools.train`: one stage of the transfer from YAML.

Imports stay inside functions where they are heavy: a config with a typo is answered at once.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra_tools.cli import log_to_stderr
from megatron_hydra.errors import UserError
from megatron_hydra.nemo.config import RunConfig, load_config
from megatron_hydra.nemo.run_folder import RunFolder

_SHOWN = ("loss", "kl", "ce", "grad_norm", "lr", "tokens_per_s")
_SECONDS_FOR_RANK_0 = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--overwrite", action="store_true", help="remove an earlier run first")


def run(args: argparse.Namespace) -> int:
    """Train, or go on with, one stage; return the exit code."""
    config = load_config(args.config, args.overrides)
    folder = RunFolder(config)
    is_first_rank = _rank() == 0
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
    training.run(progress.show, start_anew=args.overwrite, command=_command(args))
    progress.close()
    if is_first_rank:
        print(f"trained model: {folder.hybrid}")
    return 0


def main() -> int:
    """Entry point under torchrun."""
    parser = argparse.ArgumentParser(prog="hydra_tools.train", description=__doc__)
    add_arguments(parser)
    if _rank() == 0:
        log_to_stderr()
    try:
        return run(parser.parse_args())
    except UserError as error:
        sentence = f"megatron-hydra: error: {error}"
        if _rank() != 0:  # torchrun's signal, once rank 0 has ended
            signal.signal(signal.SIGTERM, lambda *_: os._exit(2))
        _tell_torchrun(sentence)
        if _rank() != 0:
            # Rank 0 says the same, and torchrun then ends this rank. Were this one to end first,
            # torchrun could end rank 0 before it has spoken.
            time.sleep(_SECONDS_FOR_RANK_0)
        print(sentence, file=sys.stderr)
        return 2


def _tell_torchrun(sentence: str) -> None:
    """Put the sentence into torchrun's own summary, which ends what it prints."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        report = {"message": {"message": sentence, "extraInfo": {"timestamp": int(time.time())}}}
        Path(path).write_text(json.dumps(report), encoding="utf-8")


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
    """Without NeMo's warnings of every optional package, and without Megatron's stack dumps.

    Megatron registers a dump on SIGTERM, which torchrun sends to the other ranks once one failed.
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
    """What a user types on each node; ``sys.argv`` has this file's place on this machine."""
    start = ["megatron-hydra", "train"]
    if "LOCAL_WORLD_SIZE" in os.environ:  # set by torchrun
        num_local = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ["WORLD_SIZE"]) // num_local
        nodes = [] if num_nodes == 1 else ["--nnodes", str(num_nodes)]
        start = ["torchrun", *nodes, "--nproc-per-node", str(num_local), "-m", "hydra_tools.train"]
    overwrite = ["--overwrite"] if args.overwrite else []
    return [*start, "--config", args.config, *args.overrides, *overwrite]


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


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
    sys.exit(main())
