"""`hydra_tools.train`, recorded, and at a named point killed -9 with all its ranks, or signalled.

Environment: `RECORD` names the folder of the records, one file per rank; `LIFE` is this launch's
number in them; `KILL` is `phase:n`, the n-th call of one of the phases below, or with a signal's
name `phase:n:SIGTERM`, which the last rank then sends itself, or `phase:n:launcher`, where it kills
-9 torchrun alone; `WRITE_SECONDS` makes every rank's disk that slow.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from hydra_tools import launch

from megatron_hydra.api import train

SAMPLE_BASE = 200  # the first two tokens of a sample are the digits of its number
_prepare = train._prepare
_calls: dict[str, int] = {}


def _kill_at(phase: str) -> None:
    """Kill -9 torchrun and every rank, this one last, if this call is the one; or send a signal."""
    _calls[phase] = _calls.get(phase, 0) + 1
    name, number, *way = [*os.environ.get("KILL", "").split(":"), ""][:3]
    if [name, number] != [phase, str(_calls[phase])]:
        return
    if not way[0]:
        agent = psutil.Process(os.getppid())
        others = [child for child in agent.children(recursive=True) if child.pid != os.getpid()]
        _record({"killed": phase})
        for victim in (agent, *others, psutil.Process()):
            victim.kill()
    elif int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        _record({"killed": f"{phase} {way[0]}"})
        if way[0] == "launcher":
            os.kill(os.getppid(), signal.SIGKILL)
        else:
            os.kill(os.getpid(), signal.Signals[way[0]])


def _record(entry: dict[str, Any]) -> None:
    file = Path(os.environ["RECORD"]) / f"rank_{os.environ.get('RANK', '0')}.jsonl"
    with file.open("ab", buffering=0) as stream:  # in one write, so that a kill cuts no line
        stream.write(json.dumps({"life": int(os.environ["LIFE"]), **entry}).encode() + b"\n")


def _prepare_and_patch(config: Any) -> Any:
    _kill_at("imports")
    training = _prepare(config)  # imports all that is patched
    _patch_steps()
    _patch_saving()
    return training


def _around(owner: Any, name: str, before: str | None, after: str | None = None) -> None:
    """Kill points before and after a function's calls."""
    function = getattr(owner, name)
    is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before:
            _kill_at(before)
        result = function(*args, **kwargs)
        if after:
            _kill_at(after)
        return result

    setattr(owner, name, staticmethod(wrapped) if is_static else wrapped)


def _patch_steps() -> None:
    from megatron_hydra.nemo.model import HydraModel
    from megatron_hydra.nemo.strategy import HydraStrategy

    HydraModel.data_step = _recorded(HydraModel.data_step)
    forward_step = HydraModel.forward_step

    def forward(self: Any, batch: Any) -> Any:
        _kill_at("forward")
        output = forward_step(self, batch)
        output["loss"].register_hook(lambda gradient: _kill_at("backward"))
        return output

    HydraModel.forward_step = forward
    _around(HydraModel, "configure_model", "start")
    _around(HydraStrategy, "load_optimizer_state_dict", "load")
    _around(torch.optim.AdamW, "step", "optimizer", "optimizer_done")


def _recorded(data_step: Callable) -> Callable:
    """A `data_step` that records the samples it gives out, and draws from every generator."""

    def wrapped(self: Any, batches: Any) -> Any:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        _kill_at("data")
        batch = data_step(self, batches)
        with get_cuda_rng_tracker().fork():
            tracked = torch.rand(()).item()
        digits = batch["tokens"][:, :2].tolist()
        _record(
            {
                "step": self.trainer.global_step,
                "samples": [low + SAMPLE_BASE * high for low, high in digits],
                "tokens": int(batch["tokens"].numel()),
                "draws": [torch.rand(()).item(), np.random.rand(), random.random(), tracked],
                "data": parallel_state.get_data_parallel_rank(),
                "tensor": parallel_state.get_tensor_model_parallel_rank(),
            }
        )
        return batch

    return wrapped


def _patch_saving() -> None:
    from megatron.core.dist_checkpointing import serialization
    from torch.distributed.checkpoint import FileSystemWriter

    from megatron_hydra import files
    from megatron_hydra.nemo.checkpoint_io import HydraModelCheckpoint
    from megatron_hydra.nemo.strategy import HydraStrategy

    _around(FileSystemWriter, "finish", "save_metadata")
    _around(serialization, "save_config", "save_config")
    _around(HydraModelCheckpoint, "remove_checkpoint_unfinished_marker", "save_mark")
    move = files._replace

    def move_into_place(temporary: Path, target: Path) -> None:
        if target.name == "hybrid":
            _kill_at("hybrid_move")
        move(temporary, target)
        if target.name == "hybrid":
            _kill_at("hybrid_moved")

    files._replace = move_into_place
    write_data = FileSystemWriter.write_data

    def slow_write(self: Any, *args: Any) -> Any:
        time.sleep(float(os.environ.get("WRITE_SECONDS", "0")))
        _kill_at("save_begin")
        result = write_data(self, *args)
        _kill_at("save_files")
        return result

    FileSystemWriter.write_data = slow_write
    remove_checkpoint = HydraStrategy.remove_checkpoint

    def remove(self: Any, folder: str | Path) -> None:
        if self.is_global_zero:
            weights = Path(str(folder).removesuffix(".ckpt")) / "weights"
            next(weights.iterdir()).unlink()
        _kill_at("remove")
        remove_checkpoint(self, folder)

    HydraStrategy.remove_checkpoint = remove


def run_stages(stages: list[tuple[list[str], dict[str, str], Path]]) -> None:
    """Several lives that nothing ends, one after the other, on ranks that a test has started.

    Args:
        stages: Of each the arguments, the environment and where to print.
    """
    train._prepare = _prepare_and_patch
    for arguments, environment, log in stages:
        os.environ.update(environment)
        sys.argv[1:] = arguments
        with log.open("ab") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        assert launch.main("train") == 0, log.read_text()[-4000:]
        train._prepare = _prepare  # all is patched


if __name__ == "__main__":
    _record({"pid": os.getpid()})
    train._prepare = _prepare_and_patch
    sys.exit(launch.main("train"))
