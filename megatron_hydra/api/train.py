"""`train`: one stage of the transfer in NeMo's loop, or what is left of it.

Imports stay inside functions where they are heavy: what is wrong with the configuration is said at
once.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hydra.processes import is_first_rank
from megatron_hydra.training.config import RunConfig
from megatron_hydra.training.run_folder import RunFolder
from megatron_hydra.training.run_inputs import check_heartbeat, check_present

if TYPE_CHECKING:
    from megatron_hydra.nemo.training import TrainingRun


@dataclass(frozen=True)
class Training:
    """How far a run has come.

    Attributes:
        folder: Of the run; `folder.hybrid` is the trained model, once it is complete.
        num_steps: That are finished and saved.
        is_complete: Whether those are all.
    """

    folder: RunFolder
    num_steps: int
    is_complete: bool


def train(
    config: RunConfig,
    *,
    config_file: str | Path | None = None,
    overwrite: bool = False,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, scalars: None,
    asks_to_stop: Callable[[], bool] = lambda: False,
    on_stop: Callable[[Training], None] = lambda training: None,
) -> Training:
    """Run one stage, or go on with it from its newest checkpoint; a complete run is left as it is.

    On several ranks each calls it, as torchrun starts them.

    Args:
        config: What is trained how, from :func:`~megatron_hydra.training.config.load_config`.
        config_file: It was read from, which the run must not replace.
        overwrite: Start anew: first remove what an earlier run wrote to the folder, nothing else.
        on_step: Gets each finished step's number, from 1 on, and its scalars, on the first rank.
        asks_to_stop: Asked after each step, on every rank; if one says yes, all save and stop.
        on_stop: Called where a run has stopped early, before the ranks wait for one another: a
            launcher may end them all when one has ended.

    Raises:
        UserError: For a configuration, data or folder that cannot be used.
    """
    with ExitStack() as stack:
        folder = RunFolder(config, config_file)
        _check_folder(folder, overwrite)
        if not overwrite and folder.is_complete():
            folder.check_trained()
            return Training(folder, config.trainer.max_steps, True)
        check_present(config)
        check_heartbeat(config)
        is_held = is_first_rank() and folder.lock_file.is_file()
        if is_held:  # or another run does: said now, not after the imports
            stack.enter_context(folder.lock())
        run = _prepare(config)
        folder = RunFolder(run.config, config_file)  # with nothing left open
        if is_first_rank():
            if not is_held:
                stack.enter_context(folder.lock())
            _check_folder(folder, overwrite)
            if overwrite:
                folder.remove()
            else:
                run.check_goes_on()
            folder.check_room()
            folder.write_config()
        num_steps = run.run(
            on_step,
            start_anew=overwrite,
            asks_to_stop=asks_to_stop,
        )
        training = Training(folder, num_steps, num_steps == config.trainer.max_steps)
        if not training.is_complete:
            on_stop(training)
            run.wait_for_ranks()
        return training


def _check_folder(folder: RunFolder, overwrite: bool) -> None:
    if not overwrite:
        folder.check()
    elif is_first_rank():  # which may be removing it at this moment
        folder.check_removable()


def _prepare(config: RunConfig) -> TrainingRun:
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
