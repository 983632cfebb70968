"""Unfinished work: where it lies, what it says of a place that cannot be, what it takes of a disk.

Catches: a command that ends in a traceback for its output's name, a link or a full disk.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_hydra.errors import UserError
from megatron_hydra.unfinished import UnfinishedWork, num_bytes_kept


class Work(UnfinishedWork):
    what = writer = "work"
    units = r"unit_\d"


def test_it_lies_beside_what_a_link_points_to(tmp_path: Path) -> None:
    """From where alone a finished file can be moved, as the link may lead to another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk/model")
    with Work(tmp_path / "out", {}).going_on():
        assert os.listdir(tmp_path / "disk") == ["model.partial"]
        assert os.listdir(tmp_path / "disk/model.partial")
    assert os.listdir(tmp_path / "disk") == []


@pytest.mark.parametrize("length", [247, 248, 255])
def test_an_output_may_have_as_long_a_name_as_the_disk_takes(tmp_path: Path, length: int) -> None:
    with Work(tmp_path / ("x" * length), {}).going_on():
        assert len(os.listdir(tmp_path)) == 1
    assert os.listdir(tmp_path) == []


def test_a_file_in_its_place_is_named_and_left(tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text("mine")
    with pytest.raises(UserError, match=r"out\.partial is a file, .* move it"):
        Work(tmp_path / "out", {}).open()
    assert (tmp_path / "out.partial").read_text() == "mine"


def test_a_full_disk_is_named_and_nothing_left_on_it(tmp_path: Path) -> None:
    work = Work(tmp_path / "out", {})
    with pytest.raises(UserError, match="the disk is full"), work.going_on():
        (work.path / "unit_1").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == []


def test_what_is_kept_is_counted_but_for_half_written_units(tmp_path: Path) -> None:
    out, size = tmp_path / "out", 2**20
    assert num_bytes_kept(out) == 0
    for name in ("unit_1", "unit_2/weights", ".unit_3.7.partial/weights", ".unit_4.7.partial"):
        path = tmp_path / "out.partial" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size))
        with path.open("rb") as stream:
            os.fsync(stream.fileno())  # some disks give room as late as this
    assert 2 * size <= num_bytes_kept(out) < 3 * size


def test_what_a_kill_left_half_written_is_gone_when_the_next_begins(tmp_path: Path) -> None:
    """Else each kill takes more of the disk."""
    folder = tmp_path / "out.partial"
    Work(tmp_path / "out", {}).open()
    for name in ("unit_1/weights", ".unit_2.7.partial/weights", ".unit_3.7.partial"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    Work(tmp_path / "out", {}).open()
    assert sorted(os.listdir(folder)) == [".lock", "run.json", "unit_1"]
