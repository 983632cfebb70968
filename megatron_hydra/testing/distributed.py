"""Runs a function on several ranks of this machine, over gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


def run_distributed(function: Callable[..., None], world_size: int, *args: Any) -> None:
    """Call `function(*args)` on `world_size` fresh processes joined by torchrun's environment.

    Each process has CUDA's calls mapped to the CPU and one thread; `function` (of a module's top
    level) sets up Megatron's groups itself with `initialize_model_parallel`. An exception on any
    rank is raised here. Ranks fork from a server that has imported Megatron and run nothing.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["megatron_hydra.testing.preload"]
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(
        _run, (world_size, port, function, args), nprocs=world_size, start_method="forkserver"
    )


def _run(rank: int, world_size: int, port: int, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        TORCHELASTIC_RUN_ID="run_distributed",
        GROUP_RANK="0",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from megatron_hydra.cpu import install_if_needed

    install_if_needed()
    function(*args)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
