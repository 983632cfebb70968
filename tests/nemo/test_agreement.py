"""Ranks that do not share their run folder or read other files, which ends before the first step.

Catches: half a model on each machine's own disk, and exit code 0; a check that leaves files behind.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from kit.distributed import run_distributed

from megatron_hydra.errors import UserError
from megatron_hydra.nemo import agreement

pytestmark = pytest.mark.dist


def test_ranks_that_do_not_agree_end_with_one_sentence(tmp_path: Path) -> None:
    for name in ("shared", "0", "1"):
        (tmp_path / name).mkdir()
    run_distributed(_check, 2, tmp_path)
    assert [list((tmp_path / name).iterdir()) for name in ("shared", "0", "1")] == [[], [], []]


def _check(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank, host = torch.distributed.get_rank(), os.uname().nodename
    agreement._SECONDS_TO_SEE = 0.3
    agreement.check_ranks_agree(folder / "shared", {"data.paths": "hash"})
    with pytest.raises(UserError) as raised:
        agreement.check_ranks_agree(folder / str(rank), {})
    assert f"rank 1 on {host} does not see what rank 0 on {host} has written" in str(raised.value)
    with pytest.raises(UserError, match=r"^rank 1 on .* has another data.paths than rank 0 on"):
        agreement.check_ranks_agree(folder / "shared", {"x": "", "data.paths": f"hash {rank}"})
