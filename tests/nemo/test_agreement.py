"""Ranks that do not share their run folder or read other files, which ends before the first step.

Catches: half a model on each machine's own disk, and exit code 0; a check that leaves files behind.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from kit.distributed import run_distributed

from megatron_hydra.errors import UserError
from megatron_hydra.nemo import agreement
from megatron_hydra.nemo.strategy import limit_groups

pytestmark = pytest.mark.dist


def test_ranks_that_do_not_agree_end_with_one_sentence(tmp_path: Path) -> None:
    for name in ("shared", "0", "1"):
        (tmp_path / name).mkdir()
    run_distributed(_check, 2, tmp_path)
    assert [list((tmp_path / name).iterdir()) for name in ("shared", "0", "1")] == [[], [], []]


def test_a_rank_that_hangs_is_noticed_in_the_time_that_was_set() -> None:
    run_distributed(_wait_for_nobody, 2)


def _wait_for_nobody() -> None:
    torch.distributed.init_process_group("gloo")
    groups = [None, torch.distributed.new_group([0, 1])]
    limit_groups(timedelta(seconds=1))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        for group in groups:
            with pytest.raises(RuntimeError, match="1000ms|[Tt]imed out"):
                torch.distributed.all_reduce(torch.ones(1), group=group)
    else:
        time.sleep(4)
    os._exit(0)  # these groups cannot be left together


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
