"""Worlds of ranks, one after the other in the same processes, each with Megatron's groups."""

from __future__ import annotations

import gc
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_hydra.certify.layouts import Layout
from megatron_hydra.parallel import initialize_model_parallel

_TIMEOUT = timedelta(minutes=30)


class Ranks:
    """This process alone, or all that torchrun started.

    Each layout has a world of its own, so that no process group, communicator or buffer of one
    can reach the next.
    """

    def __init__(self) -> None:
        self._worlds = 0
        self._store: Any = None

    def enter(self, layout: Layout, alone: bool = False) -> None:
        """Leave the present world and set up Megatron's parallel state for a layout."""
        self.leave()
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if alone or "RANK" not in os.environ:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            store, rank, size = self._rendezvous()
            self._worlds += 1
            dist.init_process_group(
                backend,
                store=dist.PrefixStore(f"world {self._worlds}", store),
                rank=rank,
                world_size=size,
                timeout=_TIMEOUT,
            )
        initialize_model_parallel(
            layout.tp, layout.pp, context=layout.cp, virtual_pipeline=layout.vpp
        )

    def share(self, value: str | None) -> str:
        """Rank 0's value on every rank; the others' do not count."""
        if "RANK" not in os.environ:
            assert value is not None
            return value
        store, rank, _ = self._rendezvous()
        if rank == 0:
            store.set("shared", value)
        return store.get("shared").decode()

    def _rendezvous(self) -> tuple[dist.Store, int, int]:
        if self._store is None:
            self._store = next(iter(dist.rendezvous("env://", timeout=_TIMEOUT)))
        return self._store

    def leave(self) -> None:
        """Destroy the present world, if there is one."""
        parallel_state.destroy_model_parallel()
        RotaryEmbedding.forward.cache_clear()  # it holds its modules, and so a process group
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if dist.is_initialized():
            dist.destroy_process_group()
