"""``megatron-hydra warm-up``: kernels of LA heads are compiled, so that no first step need."""

from __future__ import annotations

import argparse
import time

from megatron_hydra.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "--head-dim", type=int, nargs="+", default=[128], metavar="D", help="default: 128"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--context-parallel",
        action="store_true",
        help="also what context parallelism needs, whose heads start from a state",
    )
    parser.add_argument(
        "--decay-per-channel",
        action="store_true",
        help="for heads whose decay is per channel (la_kind kda)",
    )


def run(args: argparse.Namespace) -> int:
    """Compile, and print where the compiled kernels lie."""
    from hydra_kernels.gated_delta_rule.fla_kernels import check_head_dim

    for head_dim in args.head_dim:
        if head_dim < 2 or head_dim % 2:
            raise UserError(f"--head-dim is {head_dim}: must be even, 2 or more")
        try:
            check_head_dim(head_dim)
        except ValueError as error:
            raise UserError(f"--head-dim: {error}") from error
    import torch

    if not torch.cuda.is_available():
        raise UserError("warm-up compiles for the GPU of this machine, and PyTorch finds none")
    from hydra_kernels.gated_delta_rule.compilation import Mode
    from hydra_kernels.warm_up import warm_up

    device = torch.device("cuda", torch.cuda.current_device())
    for head_dim in args.head_dim:
        for with_state in (False, True)[: 1 + args.context_parallel]:
            start = time.monotonic()
            dtype = getattr(torch, args.dtype)
            mode = Mode(head_dim, head_dim, dtype, with_state, args.decay_per_channel)
            done = warm_up(mode, device)
            if not done.is_file():
                raise UserError(f"{done.parent} cannot be written: nothing compiled is kept")
            print(f"{mode}: ready after {time.monotonic() - start:.1f} s, in {done.parents[1]}")
    return 0
