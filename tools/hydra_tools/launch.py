"""Verbs that torchrun starts: one rank speaks, and an error ends all ranks with one sentence."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from hydra_tools import stops
from hydra_tools.cli import log_to_stderr, run_verb
from megatron_hydra.errors import UserError

_SECONDS_FOR_RANK_0 = 30
# What the launch scripts ask for: torchrun takes a machine whose clock is behind for a dead one.
_NODES = "HYDRA_NUM_NODES"
_ALONE = [{"RANK": rank, "WORLD_SIZE": size} for rank in (None, "0") for size in (None, "1")]


def rank() -> int:
    """This process's rank under torchrun; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def check_launcher(verb: str) -> None:
    """Check that ranks, if the environment tells of any, are torchrun's, and as many as asked for.

    Raises:
        UserError: If a shell has kept them: rank 1 of nobody would write no more than half. If
            torchrun has started with fewer machines.
    """
    found = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    if "TORCHELASTIC_RUN_ID" not in os.environ and found not in _ALONE:
        values = " and ".join(f"{name}={value}" for name, value in found.items() if value)
        raise UserError(
            f"the environment has {values}, but torchrun has not started this process: unset "
            f"RANK and WORLD_SIZE, or start it with torchrun -m hydra_tools.{verb}"
        )
    asked, found_nodes = os.environ.get(_NODES), os.environ.get("GROUP_WORLD_SIZE")
    if asked and found_nodes and asked != found_nodes:
        raise UserError(
            f"torchrun has brought together {found_nodes} of the {asked} machines that {_NODES} "
            "asks for: are their clocks within 15 seconds of each other, and do they all run the "
            "same line?"
        )


def main(verb: str, arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``torchrun -m hydra_tools.<verb>``; return the exit code.

    Args:
        verb: As `megatron-hydra` has it.
        arguments: Of the verb; None: those of the command line.
    """
    stops.end_with_launcher()
    if rank() == 0:
        log_to_stderr()
    try:
        given = sys.argv[1:] if arguments is None else list(arguments)
        return run_verb(verb, given, f"hydra_tools.{verb}")
    except UserError as error:
        sentence = f"megatron-hydra: error: {error}"
        if rank() != 0:  # torchrun's signal, once rank 0 has ended
            signal.signal(signal.SIGTERM, lambda *_: os._exit(2))
        tell_torchrun(sentence)
        if rank() != 0:
            # Rank 0 says the same, and torchrun then ends this rank. Were this one to end first,
            # torchrun could end rank 0 before it has spoken.
            time.sleep(_SECONDS_FOR_RANK_0)
        print(sentence, file=sys.stderr)
        return 2
    except Exception as error:
        tell_torchrun(f"{type(error).__name__}: {error}", traceback.format_exc())
        raise


def tell_torchrun(sentence: str, stack: str = "") -> None:
    """Put the sentence, and a Python stack, into torchrun's own summary, the end of its words."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        more = {"timestamp": int(time.time()), **({"py_callstack": stack} if stack else {})}
        report = {"message": {"message": sentence, "extraInfo": more}}
        Path(path).write_text(json.dumps(report), encoding="utf-8")
