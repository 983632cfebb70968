"""Slurm once for all tests of this folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from kit.cluster import call, running_cluster, until

_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter")


@pytest.fixture(scope="session", autouse=True)
def slurm() -> Iterator[None]:
    """A cluster of two hosts."""
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    assert os.geteuid() == 0 and not missing, f"needs root and {missing}: see make test-cluster"
    with running_cluster():
        yield


@pytest.fixture(autouse=True)
def jobs() -> Iterator[None]:
    """Jobs that a failed test has left would keep the next one waiting."""
    yield
    call("scancel", "--user=root", check=False)
    until(lambda: not call("squeue", "--noheader", check=False), 120, "jobs have ended")
