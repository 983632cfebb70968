"""`megatron-hydra doctor`: what is installed, missing or slow, and the command that mends it."""

from __future__ import annotations

import argparse

from megatron_hydra.api.doctor import doctor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.epilog = "Exit codes: 0 when nothing is missing, 1 otherwise."


def run(args: argparse.Namespace) -> int:
    """Look, tell each thing as it is found, and return the exit code."""
    num_missing = 0
    for found in doctor():
        num_missing += found.state == "missing"
        print(f"{found.state:<8}{found.what}", flush=True)
        if found.mend:
            print(f"{'':<8}mend it: {found.mend}", flush=True)
    return 1 if num_missing else 0
