"""Tests of a disk without room: one sentence, the earlier output kept, asked for before writing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_hydra.disk import check_space, disk_full_named
from megatron_hydra.errors import UserError
from megatron_hydra.files import write_beside


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 448 vs 342"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
)
def test_a_full_disk_is_one_sentence_and_leaves_the_earlier_output(
    tmp_path: Path, error: Exception
) -> None:
    target = tmp_path / "out.txt"
    target.write_text("old")
    for raised in (error, _caused_by(error), _of_a_rank(error)):
        with (
            pytest.raises(UserError, match=r"cannot write .*out\.txt: the disk is full"),
            write_beside(target, overwrite=True) as temporary,
        ):
            temporary.write_text("half")
            raise raised
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.txt"]
    with pytest.raises(ValueError, match="a bug"), disk_full_named(target):
        raise ValueError("a bug")


def _caused_by(error: Exception) -> Exception:
    outer = RuntimeError("writing failed")
    outer.__cause__ = error
    return outer


def _of_a_rank(error: Exception) -> Exception:
    outer = RuntimeError("a rank failed")
    outer.failures = {1: (error, None)}  # type: ignore[attr-defined]
    return outer


def test_a_real_full_disk() -> None:
    with pytest.raises(UserError, match="the disk is full"), disk_full_named("/dev/full"):
        Path("/dev/full").write_text("x")


def test_a_full_shared_memory_is_no_full_disk() -> None:
    """Of a process that loads data, as PyTorch wraps it."""
    told = (
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback\nRuntimeError: "
        "unable to write to file </torch_41_9_0>: No space left on device (28)"
    )
    with (
        pytest.raises(UserError, match=r"^the shared memory /dev/shm is full, .*num_workers=0$"),
        disk_full_named("run/checkpoints"),
    ):
        raise RuntimeError(told)


def test_space_is_asked_for_before_writing(tmp_path: Path) -> None:
    check_space(tmp_path / "new" / "out", 1)
    with pytest.raises(UserError, match=r"out needs 1,048,576\.0 GiB, and .* has .* free"):
        check_space(tmp_path / "new" / "out", 2**50)
