"""Room on the disk: asked for before writing, and named in one sentence where it runs out."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_hydra.errors import UserError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# What PyTorch's and safetensors' writers say of it, which pass no error number on.
_DISK_FULL_WORDS = (
    "No space left",
    "Disk quota exceeded",
    "PytorchStreamWriter failed writing",
    "unexpected pos",
)
# What PyTorch says where the shared memory is full by which worker processes hand batches on.
_SHARED_MEMORY_WORDS = "unable to write to file </torch_"


@contextmanager
def disk_full_named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Around a block that writes ``path``.

    Raises:
        UserError: In place of what a full disk, a used-up quota, or full shared memory made the
            block raise.
    """
    try:
        yield
    except BaseException as error:  # which PyTorch's CheckpointException is
        if _SHARED_MEMORY_WORDS in str(error):
            raise UserError(
                "the shared memory /dev/shm is full, by which data.num_workers hand on batches: "
                "enlarge it (docker run --shm-size=1g), or set data.num_workers=0"
            ) from error
        if not _is_disk_full(error):
            raise
        folder = existing_folder(path)
        free = _in_words(shutil.disk_usage(folder).free)
        raise UserError(
            f"cannot write {os.fspath(path)}: the disk is full or its quota used up, with {free} "
            f"free in {folder}: make room or name another place"
        ) from error


def check_space(path: str | os.PathLike[str], num_bytes: float) -> None:
    """Check that the disk of ``path`` has room, where the size is known before writing starts.

    Raises:
        UserError: Naming the needed and the free space.
    """
    folder = existing_folder(path)
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"{os.fspath(path)} needs {_in_words(num_bytes)}, and {folder} has {_in_words(free)} "
            "free: make room or name another place"
        )


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """The nearest place above ``path`` that exists."""
    ancestor = Path(path).absolute().parent
    while not ancestor.exists():
        ancestor = ancestor.parent
    return ancestor


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether ``error``, what caused it, or one of the ranks' errors in it is a full disk's."""
    if error is None or isinstance(error, UserError):
        return False
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return True
    if any(words in str(error) for words in _DISK_FULL_WORDS):
        return True
    # PyTorch's CheckpointException keeps the ranks' errors: rank -> (error, its stack).
    failures = getattr(error, "failures", {})
    inner = [failure[0] for failure in failures.values()] if isinstance(failures, dict) else []
    return any(map(_is_disk_full, (*inner, error.__cause__, error.__context__)))


def _in_words(num_bytes: float) -> str:
    """A size as a person says it."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.1f} {unit}"
    return f"{num_bytes:.0f} bytes"
