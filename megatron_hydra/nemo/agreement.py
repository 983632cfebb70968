"""What the ranks of a run must have in common, looked at once they can talk: folder and inputs."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_hydra.errors import UserError

# Network file systems show a new file late: by their default up to a minute.
_SECONDS_TO_SEE = 60.0


def check_ranks_agree(folder: Path, facts: Mapping[str, str]) -> None:
    """Check that all ranks work in one folder and on the same inputs; collective.

    Machines that share nothing would each write their half of every checkpoint to a disk of their
    own, and end as if all were well.

    Args:
        folder: The run's, which is there on rank 0.
        facts: What must be equal, by what it is called in the message.

    Raises:
        UserError: On every rank, with the same sentence about the first that differs.
    """
    name: list[Any] = [f".seen_by_all.{secrets.token_hex(8)}"]
    is_first = torch.distributed.get_rank() == 0
    token = folder / name[0]
    if is_first:
        token.touch()
    try:
        torch.distributed.broadcast_object_list(name, src=0)
        sees = is_first or _appears(folder / name[0])
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, (socket.gethostname(), sees, dict(facts)))
    finally:
        if is_first:
            token.unlink(missing_ok=True)
    first_host, _, first_facts = ranks[0]
    for rank, (host, sees, found) in enumerate(ranks):
        who = f"rank {rank} on {host}"
        if not sees:
            raise UserError(
                f"log.folder {folder} is not one folder for all machines: {who} does not see what "
                f"rank 0 on {first_host} has written there; name a place that all of them share"
            )
        for what in first_facts:
            if found.get(what) != first_facts[what]:
                raise UserError(
                    f"{who} has another {what} than rank 0 on {first_host}: see to it that all "
                    "machines read the same files"
                )


def _appears(file: Path) -> bool:
    end = time.monotonic() + _SECONDS_TO_SEE
    while not file.exists():
        if time.monotonic() >= end:
            return False
        time.sleep(0.1)
    return True
