"""Kernels compiled before they are needed, by one process of a machine while the others wait.

Which kernels a mode needs does not depend on the number of heads, but FlashQLA has a few by how
many documents there are for the GPU's multiprocessors, and whether it cuts them: `_samples` has one
of each. What is compiled lies in the compilers' own caches; a file beside says that all is there.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hydra_kernels.gated_delta_rule import fla_kernels
from hydra_kernels.gated_delta_rule.documents import CHUNK_SIZE, Documents

logger = logging.getLogger(__name__)

_PACKAGES = ("torch", "triton", "fla-core", "flash-qla", "tilelang")
_TARGET_SHARE = 0.7  # of the multiprocessors: FlashQLA takes wider tiles from so many documents on


class Mode(NamedTuple):
    """What kernels are compiled for, whatever the number of heads and tokens.

    Attributes:
        head_dim: Of queries and keys.
        value_dim: Of values.
        dtype: Of all three.
        with_state: Whether states come and go, as under context parallelism.
        of_channels: Whether each channel has a decay of its own.
    """

    head_dim: int
    value_dim: int
    dtype: torch.dtype
    with_state: bool
    of_channels: bool = False

    def __str__(self) -> str:
        purpose = "context parallelism" if self.with_state else "whole sequences"
        purpose += ", a decay per channel" if self.of_channels else ""
        return (
            f"head dimension {self.head_dim}, {str(self.dtype).removeprefix('torch.')}, {purpose}"
        )


class _Sample(NamedTuple):
    """A call that compiles kernels: so many rows, cut or not, and whether backward too."""

    num_rows: int
    num_tokens: int
    is_cut: bool
    backward: bool


@cache
def compile_once(mode: Mode, device: torch.device) -> Path:
    """Compile what a mode needs and is missing, under the lock of the machine's cache.

    Returns:
        The file that says so, which is missing if it cannot be written.
    """
    why_not = why_not_flash_qla(mode)
    logger.info(
        "gated delta rule (%s): %s", mode,
        "FlashQLA" if why_not is None else f"fla's own kernels, as {why_not}",
    )  # fmt: skip
    uses_flash_qla = why_not is None
    folder = cache_folder(uses_flash_qla)
    done = folder / f"{_key(mode, device, uses_flash_qla)}.done"
    if os.path.exists(done):  # which a folder of another user's is not
        return done
    with _locked(done.with_suffix(".lock")):
        if os.path.exists(done):
            return done
        logger.info(
            "compiling the gated delta rule (%s): minutes, once for %s; "
            "`megatron-hydra warm-up` does it beforehand", mode, folder.parent,
        )  # fmt: skip
        start = time.monotonic()
        compile_all(mode, device, uses_flash_qla)
        logger.info("compiled in %.0f s", time.monotonic() - start)
        with suppress(OSError):  # a folder that cannot be written: it is compiled for this process
            done.touch()
    return done


def compile_all(mode: Mode, device: torch.device, uses_flash_qla: bool) -> None:
    """Call the kernels once in each way that compiles others, side by side."""
    # fla's autotuner takes what is fastest in the first call for good: one as large as a layer's.
    samples = _samples(device) if uses_flash_qla else [_Sample(16, 4096, False, True)]
    # Threads of their own: neither autocast nor hooks of the caller reach them, compilers run
    # outside the interpreter's lock.
    with ThreadPoolExecutor(min(len(samples), os.cpu_count() or 1)) as threads:
        for _ in threads.map(lambda sample: _call(mode, sample, device, uses_flash_qla), samples):
            pass
    torch.cuda.synchronize(device)


def load(mode: Mode, num_rows: int, num_tokens: int, device: torch.device) -> None:
    """Bring into this process what such rows call, forward and backward, from the cache.

    TileLang goes through each kernel's Python once in every process, compiled or not, which takes
    a second or two of each.
    """
    uses_flash_qla = why_not_flash_qla(mode) is None
    sample = _Sample(num_rows, num_tokens, False, True)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(_call, mode, sample, device, uses_flash_qla).result()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # gigabytes, in pieces that a training would not ask for


def why_not_flash_qla(mode: Mode) -> str | None:
    """Why a mode runs on fla's own kernels; None if FlashQLA takes it."""
    return fla_kernels.why_not_flash_qla(*_inputs(mode, 1, torch.device("meta")))


def cache_folder(uses_flash_qla: bool) -> Path:
    """The folder `hydra` in the cache of the compiler whose kernels they are.

    `TILELANG_CACHE_DIR`, by default `~/.tilelang/cache`, or `TRITON_CACHE_DIR`, by default
    `~/.triton/cache`.
    """
    name, default = (
        ("TILELANG_CACHE_DIR", "~/.tilelang/cache")
        if uses_flash_qla
        else ("TRITON_CACHE_DIR", "~/.triton/cache")
    )
    return Path(os.environ.get(name, default)).expanduser() / "hydra"


def _samples(device: torch.device) -> list[_Sample]:
    target = int(torch.cuda.get_device_properties(device).multi_processor_count * _TARGET_SHARE)
    samples = []
    for num_documents in (1, target // 2 + 1, target):
        backward = num_documents == 1
        samples.append(_Sample(num_documents, CHUNK_SIZE, False, backward))
        # Cut in two: FlashQLA's pieces have four chunks or more.
        samples.append(_Sample(-(-num_documents // 2), 8 * CHUNK_SIZE, True, backward))
    return samples


def _call(mode: Mode, sample: _Sample, device: torch.device, uses_flash_qla: bool) -> None:
    torch.cuda.set_device(device)
    documents = Documents(
        torch.tensor([0, sample.num_tokens], dtype=torch.int32), sample.num_rows, device
    )
    if uses_flash_qla:
        fla_kernels.context_of(documents, force_cut=sample.is_cut)
    row = _inputs(mode, sample.num_rows * sample.num_tokens, device)
    states = None
    if mode.with_state:
        states = torch.zeros(sample.num_rows, mode.head_dim, mode.value_dim, device=device)
    with torch.set_grad_enabled(sample.backward):
        outputs = fla_kernels.run(
            row, mode.head_dim**-0.5, states, mode.with_state, documents, uses_flash_qla
        )
        if not sample.backward:
            return
        try:
            torch.stack([x.float().sum() for x in outputs if x is not None]).sum().backward()
        except RuntimeError as error:
            # fla refuses its backward without TileLang on Hopper GPUs (issue 640): what only
            # decodes or evaluates goes on, a training step raises the same.
            if uses_flash_qla or "tilelang" not in str(error):
                raise
            logger.warning("only the forward pass is compiled: %s", error)


def _inputs(mode: Mode, num_tokens: int, device: torch.device) -> list[Tensor]:
    """q, k, v, g, beta of one row, zeros."""
    dims = (mode.head_dim, mode.head_dim, mode.value_dim)
    vectors = [torch.zeros(1, num_tokens, 1, d, dtype=mode.dtype, device=device) for d in dims]
    decay = (mode.head_dim,) if mode.of_channels else ()
    gates = [torch.zeros(1, num_tokens, 1, *width, device=device) for width in (decay, ())]
    return [x.requires_grad_() for x in (*vectors, *gates)]


def _key(mode: Mode, device: torch.device, uses_flash_qla: bool) -> str:
    """A file name for what is compiled: a mode, by these versions, for this GPU."""
    properties = torch.cuda.get_device_properties(device)
    gpu = (properties.major, properties.minor, properties.multi_processor_count)
    versions = []
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.append((package, importlib.metadata.version(package)))
    text = repr((mode, gpu, versions, uses_flash_qla))
    return f"gated_delta_rule_{mode.head_dim}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """Hold the lock; where the folder cannot be written, go on without one."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        stream = lock.open("a")
    except OSError as error:
        logger.warning("%s cannot be written (%s): nothing compiled is kept", lock.parent, error)
        yield
        return
    with stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            logger.info("another process compiles the gated delta rule: waiting for it")
            fcntl.lockf(stream, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s has no locks (%s): each process compiles", lock.parent, error)
        yield
