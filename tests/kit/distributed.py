"""Runs a function on several ranks of this machine."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import cycle, islice
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from megatron_hydra.processes import end_with_parent

_SECONDS_FOR_STACKS = 2.0
_FIRST_PORT, _NUM_PORTS = 10_000, 20_000
# Test processes that run side by side begin at different ones.
_ports = cycle((os.getpid() * 1009 + i) % _NUM_PORTS + _FIRST_PORT for i in range(_NUM_PORTS))
# Where one cannot be imported, as without NeMo, the fork server goes on without it.
_PRELOADED = ["kit.preload", "megatron_hydra.nemo.training"]


def run_distributed(
    function: Callable[..., None], world_size: int, *args: Any, limit_s: float = 1800.0
) -> None:
    """Call `function(*args)` on `world_size` fresh processes joined by torchrun's environment.

    Each process has one thread; `function` (of a module's top level) sets up Megatron's groups
    itself with `initialize_model_parallel`. An exception on any rank is raised here. Without a GPU
    CUDA's calls are mapped to the CPU, and ranks fork from a server that has imported Megatron and
    NeMo and run nothing; with one they start anew, as CUDA does not survive a fork. More ranks than
    GPUs share the first, each as a host of its own: NCCL takes one rank for a GPU of a host.

    Args:
        function: What each rank runs.
        world_size: Number of ranks.
        *args: Given to each.
        limit_s: Wall-clock time, after which all ranks are killed.

    Raises:
        TimeoutError: If a rank has not ended in time; says where each of those stood.
    """
    start_method = "spawn" if torch.cuda.is_available() else "forkserver"
    if start_method == "forkserver":
        start_fork_server()
    port = _free_port()
    with tempfile.TemporaryDirectory() as stacks:
        context = torch.multiprocessing.start_processes(
            _run,
            (world_size, port, Path(stacks), function, args),
            nprocs=world_size,
            join=False,
            start_method=start_method,
        )
        deadline = time.monotonic() + limit_s
        while not context.join(timeout=max(0.0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                raise TimeoutError(_kill(context.processes, Path(stacks), limit_s))


def _free_port() -> int:
    """One below those that systems give to connections, which would take it before the ranks do."""
    for port in islice(_ports, _NUM_PORTS):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def as_every_rank(tp_size: int) -> Iterator[int]:
    """This process as each tensor-parallel rank in turn, which says nothing to the others."""
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  registers the backend
    from megatron.core import parallel_state

    for rank in range(tp_size):
        dist.init_process_group("fake", rank=rank, world_size=tp_size, store=dist.HashStore())
        parallel_state.initialize_model_parallel(tp_size)
        yield rank
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def start_fork_server() -> None:
    """Start the server that ranks fork from, unless it runs.

    It looks for what it preloads on the environment's path, not on ours.
    """
    multiprocessing.set_forkserver_preload(_PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()


def _kill(processes: list[Any], stacks: Path, limit_s: float) -> str:
    """Ask the ranks that still run where they stand, then kill them."""
    running = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in running:
        if (stacks / f"{rank}").exists():  # made once the rank can answer
            os.kill(processes[rank].pid, signal.SIGUSR1)
    time.sleep(_SECONDS_FOR_STACKS)
    for rank in running:
        processes[rank].kill()
        processes[rank].join()
    lines = [f"ranks {running} of {len(processes)} had not ended after {limit_s:g} s"]
    for rank in running:
        file = stacks / f"{rank}"
        lines.append(f"rank {rank}: {file.read_text() if file.exists() else 'not started'}")
    return "\n".join(lines)


def _run(
    rank: int, world_size: int, port: int, stacks: Path, function: Callable, args: tuple
) -> None:
    end_with_parent(os.getppid())  # the fork server, which ends with pytest
    torch.set_num_threads(1)
    gc.freeze()  # what is imported never becomes garbage, and takes long to walk through
    crowded = torch.cuda.is_available() and torch.cuda.device_count() < world_size
    host, local_rank, local_size = (rank, 0, 1) if crowded else (0, rank, world_size)
    os.environ.update(
        TORCHELASTIC_RUN_ID="run_distributed",
        GROUP_RANK=str(host),
        GROUP_WORLD_SIZE=str(world_size // local_size),
        NCCL_HOSTID=str(host),
        RANK=str(rank),
        LOCAL_RANK=str(local_rank),
        LOCAL_WORLD_SIZE=str(local_size),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from megatron_hydra.cpu import install_if_needed

    install_if_needed()
    with (stacks / f"{rank}.opening").open("w") as file:
        faulthandler.register(signal.SIGUSR1, file, all_threads=False)
        Path(file.name).rename(stacks / f"{rank}")
        function(*args)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        faulthandler.unregister(signal.SIGUSR1)
