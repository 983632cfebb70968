"""LA preparation on a GPU: our kernels, the same in separate kernels, and compiled PyTorch.

    python kernels/benchmarks/la_preparation.py --out la_preparation.json

Every row stands beside its floor: the bytes that the pass must read and write once (the sections,
q, k and v or their gradients, gates, angles), over the bandwidth of a plain copy in the same run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hydra_kernels.la_preparation import la_preparation, reference
from hydra_kernels.measure import device_figures, median_ms, peak_gib, print_table, write
from torch import Tensor

HEAD_DIM = 128
EPS = 1e-6


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 32768, 131072])
    parser.add_argument("--heads", type=int, nargs="+", default=[14, 12])
    parser.add_argument("--document", type=int, default=2000, help="tokens of a packed document")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile's peer out")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    figures = device_figures() | {"norm_of_separate_kernels": NORM, "command": " ".join(sys.argv)}
    if arguments.no_compile:
        del IMPLEMENTATIONS["torch.compile"]
    rows: list[dict[str, Any]] = []
    for heads in arguments.heads:
        sizes = [(tokens, None) for tokens in arguments.tokens]
        for tokens, document in (*sizes, (max(arguments.tokens), arguments.document)):
            for row in measure(tokens, heads, document, figures["copy_gb_per_s"]):
                rows.append(row)
                print_table([row])
                write(arguments.out, figures, rows)
    print_table(rows)


def measure(
    tokens: int, heads: int, document: int | None, copy_gb_per_s: float
) -> Iterator[dict[str, Any]]:
    """Forward and backward of every implementation for one size.

    Backward is both passes less the forward one: not every peer can repeat it alone.
    """
    inputs = make_inputs(tokens, heads)
    cu_seqlens = None
    if document is not None:
        starts = torch.arange(0, tokens, document, device="cuda")
        cu_seqlens = F.pad(starts, (0, 1), value=tokens)
    learned = [x for x in inputs.values() if x.requires_grad]
    for name, function in IMPLEMENTATIONS.items():
        if function is compiled and document is not None:
            continue  # half a minute of compilation per size
        torch.compiler.reset()
        try:
            run = partial(function, inputs, heads, cu_seqlens)
            upstream = [torch.randn_like(x) for x in run()]
            gib, forward = peak_gib(run), median_ms(run)
            both = median_ms(lambda f=run, u=upstream: torch.autograd.grad(f(), learned, u))
            backward = both - forward
        except torch.OutOfMemoryError:
            gib = forward = backward = float("nan")
        run = upstream = None
        for direction, ms in (("forward", forward), ("backward", backward)):
            floor = floor_bytes(tokens, heads, direction) / copy_gb_per_s / 1e6
            yield {
                "heads": heads,
                "tokens": tokens,
                "document": document or tokens,
                "pass": direction,
                "implementation": name,
                "ms": ms,
                "floor_ms": floor,
                "of_floor": floor / ms,
                "forward_peak_gib": gib,
            }


def make_inputs(tokens: int, heads: int) -> dict[str, Tensor]:
    """bf16 sections of one wide in-projection row, as the layer hands them over; angles float32."""
    channels = 3 * heads * HEAD_DIM
    # What else lies in a row: the output gate, and two FA heads with their query groups.
    width = -(-(channels + heads * HEAD_DIM + 2 * heads + 8 * HEAD_DIM) // 64) * 64
    rows = torch.randn(tokens, 1, width, device="cuda", dtype=torch.bfloat16)
    first, last = 8 * HEAD_DIM, 8 * HEAD_DIM + channels + heads * HEAD_DIM
    sections = {
        "x": rows[..., first : first + channels],
        "a": rows[..., last : last + heads],
        "b": rows[..., last + heads : last + 2 * heads],
    }
    learned = {name: x.transpose(0, 1).detach() for name, x in sections.items()} | {
        "conv_weight": torch.randn(channels, 4, device="cuda", dtype=torch.bfloat16),
        "q_norm_weight": torch.randn(HEAD_DIM, device="cuda", dtype=torch.bfloat16),
        "k_norm_weight": torch.randn(HEAD_DIM, device="cuda", dtype=torch.bfloat16),
        "a_log": torch.randn(heads, device="cuda"),
        "dt_bias": torch.randn(heads, device="cuda") - 4,
    }
    frequencies = 1e6 ** -(torch.arange(0, HEAD_DIM, 2, device="cuda") / HEAD_DIM)
    angles = torch.arange(tokens, device="cuda")[:, None] * frequencies
    fixed = {"angles": angles, "cos": angles.cos()[None], "sin": angles.sin()[None]}
    return {name: torch.nn.Parameter(x) for name, x in learned.items()} | fixed


def floor_bytes(tokens: int, heads: int, direction: str) -> int:
    """What a pass must move if it reads and writes everything once."""
    vectors, gate, angles = 3 * heads * HEAD_DIM * 2, 2 * heads, HEAD_DIM * 4
    if direction == "forward":
        return tokens * (2 * vectors + gate * (2 + 4) + angles)
    return tokens * (3 * vectors + gate * (2 + 4 + 2) + angles)


def fused(inputs: dict[str, Tensor], heads: int, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    """Our kernels."""
    given = {name: x for name, x in inputs.items() if name != "angles"}
    return la_preparation(
        **given, num_heads=heads, norm_eps=EPS, cu_seqlens=cu_seqlens, impl="triton"
    )


def separate(
    inputs: dict[str, Tensor], heads: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, ...]:
    """A step at a time: fla's convolution, Transformer Engine's norm where it is installed.

    Megatron's rotation, PyTorch's normalisation and gates; sequence first, then batch first.
    """
    from fla.modules.causal_conv1d import causal_conv1d

    x, weight = inputs["x"].contiguous(), inputs["conv_weight"]
    x = causal_conv1d(x, weight, activation="silu", cu_seqlens=cu_seqlens)[0].transpose(0, 1)
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in x.chunk(3, dim=-1))
    q, k = rms_norm(q, inputs["q_norm_weight"]), rms_norm(k, inputs["k_norm_weight"])
    angles = torch.cat((inputs["angles"], inputs["angles"]), -1)[:, None, None]
    q, k = (_rotate(t, angles) for t in (q, k))
    q, k = (F.normalize(t.float(), dim=-1).to(v.dtype) for t in (q, k))
    g = -inputs["a_log"].exp() * F.softplus(inputs["a"].float() + inputs["dt_bias"])
    beta = inputs["b"].float().sigmoid()
    return (*(t.transpose(0, 1).contiguous() for t in (q, k, v)), g, beta)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    return _apply_rotary_pos_emb_bshd(x, angles)


def _transformer_engine_norm() -> tuple[str, Callable[[Tensor, Tensor], Tensor]]:
    """Transformer Engine's RMSNorm if it is installed, PyTorch's if not, and whose it is."""
    try:
        from transformer_engine.pytorch import RMSNorm
    except ImportError:
        return "PyTorch", lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, EPS)
    module = RMSNorm(HEAD_DIM, eps=EPS, device="cuda", dtype=torch.bfloat16)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        module.weight = weight
        return module(x)

    return "Transformer Engine", norm


def compiled(
    inputs: dict[str, Tensor], heads: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, ...]:
    """torch.compile of our reference."""
    names = (
        "x", "a", "b", "conv_weight", "q_norm_weight", "k_norm_weight", "a_log", "dt_bias",
    )  # fmt: skip
    return _COMPILED(
        *(inputs[name] for name in names),
        None,
        inputs["cos"],
        inputs["sin"],
        cu_seqlens,
        heads,
        EPS,
    )


_COMPILED = torch.compile(reference.la_preparation, dynamic=False)
NORM, rms_norm = _transformer_engine_norm()
IMPLEMENTATIONS = {"triton": fused, "separate kernels": separate, "torch.compile": compiled}


if __name__ == "__main__":
    main()
