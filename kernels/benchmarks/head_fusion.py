"""Times the head fusion, forward and backward, against the bytes it must move and its peers.

    python kernels/benchmarks/head_fusion.py --out head_fusion.json

A layer of 16 heads of 128 channels in bf16: gates as slices of one in-projection's output, LA
heads batch first. The floor is the time in which a copy moves the bytes that forward (x, z, out
and one float32 per head and token) and backward (dy, x, z, that float32, dx, dz) cannot avoid.
Peers: what the layer does without the kernel (norm, gate, cat, order, scale: a PyTorch operator
each), the kernel's reference in torch.compile, and fla's fused RMSNorm with gate, which knows no
scale and no order, so that both follow in PyTorch; it runs with SiLU on both kinds, which costs
as much as the sigmoid.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from hydra_kernels.head_fusion import head_fusion, reference
from hydra_kernels.measure import device_figures, median_ms, peak_gib, print_table, write
from torch import Tensor

_HEAD_DIM, _EPS = 128, 1e-6
_KINDS = ((2, 14), (4, 12))
_TOKENS = (4096, 8192, 16384, 32768, 65536, 131072)


def main() -> int:
    """Measure; print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--tokens", type=int, nargs="+", default=_TOKENS)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile's peer out")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    # A compiled backward otherwise gives its saved tensors' memory away, and runs only once.
    torch._functorch.config.donated_buffer = False
    figures = device_figures() | {"command": " ".join(sys.argv)}
    implementations = _implementations()
    if args.no_compile:
        del implementations["compiled"]
    rows: list[dict[str, Any]] = []
    for n_fa, n_la in _KINDS:
        for tokens in args.tokens:
            rows += _measure(tokens, n_fa, n_la, implementations, figures["copy_gb_per_s"])
            write(args.out, figures, rows)
    print_table(rows)
    return 0


def _measure(
    tokens: int,
    n_fa: int,
    n_la: int,
    implementations: dict[str, Callable[..., Tensor]],
    copy_gb_per_s: float,
) -> list[dict[str, Any]]:
    """A row for each implementation and direction."""
    inputs = _inputs(tokens, n_fa, n_la)
    elements = tokens * (n_fa + n_la)
    bytes_moved = {
        "forward": elements * (3 * 2 * _HEAD_DIM + 4),
        "backward": elements * (5 * 2 * _HEAD_DIM + 4),
    }
    rows = []
    for name, fuse in implementations.items():
        output = fuse(*inputs)
        dy = torch.randn_like(output)
        leaves = [x for x in inputs if x.requires_grad]
        calls = {
            "forward": lambda fuse=fuse: fuse(*inputs),
            "backward": lambda output=output, leaves=leaves, dy=dy: torch.autograd.grad(
                output, leaves, dy, retain_graph=True
            ),
        }
        for direction, call in calls.items():
            ms = median_ms(call)
            rate = bytes_moved[direction] / ms / 1e6
            rows.append(
                {
                    "tokens": tokens,
                    "heads": f"{n_fa}+{n_la}",
                    "direction": direction,
                    "impl": name,
                    "ms": ms,
                    "floor_ms": bytes_moved[direction] / copy_gb_per_s / 1e6,
                    "gb_per_s": rate,
                    "share_of_copy": rate / copy_gb_per_s,
                    "peak_gib": peak_gib(call),
                }
            )
        del output, calls
    return rows


def _inputs(tokens: int, n_fa: int, n_la: int) -> tuple[Tensor, ...]:
    """fa, la, fa_gate, la_gate, head_scale, positions; all but the last with gradients."""
    d = _HEAD_DIM

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    # Rows as an in-projection has them beside the gates: FA query, key and value of two groups,
    # LA query, key and value.
    sizes = [n_fa * d, n_fa * d, 4 * d, 3 * n_la * d, n_la * d, 64]
    parts = randn(tokens, 1, sum(sizes)).split(sizes, dim=-1)
    fa, la = randn(tokens, 1, n_fa, d), randn(1, tokens, n_la, d).transpose(0, 1)
    gates = [part.unflatten(2, (-1, d)) for part in (parts[1], parts[4])]
    head_scale = torch.rand(n_fa + n_la, device="cuda") + 0.5
    positions = torch.randperm(n_fa + n_la, device="cuda")
    # Detached: the gradient of the split belongs to the in-projection.
    return *(x.detach().requires_grad_() for x in (fa, la, *gates, head_scale)), positions


def _implementations() -> dict[str, Callable[..., Tensor]]:
    implementations: dict[str, Callable[..., Tensor]] = {
        "triton": partial(head_fusion, eps=_EPS, impl="triton"),
        "eager": _eager,
        "compiled": _compiled(),
    }
    try:
        import fla.modules.norm.fused_norm_gate  # noqa: F401
    except ImportError:
        print("fla-core is not installed: its rows are left out")
    else:
        implementations["fla"] = _fla
    return implementations


def _compiled() -> Callable[..., Tensor]:
    """The reference, compiled for the length at hand alone: how it is fastest."""
    torch.compiler.reset()
    function = torch.compile(reference.head_fusion, dynamic=False)
    return lambda *inputs: function(*inputs, _EPS, "sigmoid2", "silu")


def _eager(
    fa: Tensor, la: Tensor, fa_gate: Tensor, la_gate: Tensor, head_scale: Tensor, positions: Tensor
) -> Tensor:
    """The layer's own way without the kernel."""
    weight = torch.ones(_HEAD_DIM, device=fa.device, dtype=fa.dtype)
    branches = [F.rms_norm(x, (_HEAD_DIM,), weight, _EPS) for x in (fa, la)]
    branches = [branches[0] * (2.0 * fa_gate.sigmoid()), branches[1] * F.silu(la_gate)]
    return _place(branches, head_scale, positions)


def _fla(
    fa: Tensor, la: Tensor, fa_gate: Tensor, la_gate: Tensor, head_scale: Tensor, positions: Tensor
) -> Tensor:
    """fla's norm and gate in one kernel, then as `_eager`."""
    from fla.modules.norm.fused_norm_gate import rms_norm_gated

    branches = [
        rms_norm_gated(x, gate, None, None, activation="swish", eps=_EPS)
        for x, gate in ((fa, fa_gate), (la, la_gate))
    ]
    return _place(branches, head_scale, positions)


def _place(branches: list[Tensor], head_scale: Tensor, positions: Tensor) -> Tensor:
    heads = torch.cat(branches, dim=2).index_select(2, positions.argsort())
    return (heads * head_scale.to(heads.dtype).view(1, 1, -1, 1)).flatten(2)


if __name__ == "__main__":
    sys.exit(main())
