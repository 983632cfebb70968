"""Times linear_kl, forward and backward, beside its products alone, whole logits and its peers.

    python kernels/benchmarks/linear_kl.py --out linear_kl.json

Each row is one way to get the loss's gradients for `tokens` rows: milliseconds forward and
backward, peak memory beyond the inputs, the same less the gradients that it returns, and the floor:
the flops of its matrix products at the rate measured in the same run. A way that does not fit or
does not run says so in place of its figures. The accuracy rows hold the divergence of a student
close to its teacher against float64, from logits rounded to bf16 and from float32 logits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hydra_kernels.linear_kl import LossOptions, linear_kl
from hydra_kernels.measure import device_figures, median_ms, peak_gib, print_table, write

Inputs = dict[str, torch.Tensor]
_SETTINGS = ("trained", "frozen", "shared")  # the output weights; shared is frozen and one matrix


def main() -> int:
    """Measure; print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--chunk-tokens", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--weights", nargs="+", choices=_SETTINGS, default=_SETTINGS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    figures = device_figures() | {"command": " ".join(sys.argv)}
    figures["accuracy"] = measure_accuracy(args.hidden, args.vocab)
    print_table(figures["accuracy"])
    rows: list[dict[str, Any]] = []
    for num_tokens in args.tokens:
        for setting in args.weights:
            inputs = make_inputs(num_tokens, args.hidden, args.vocab, setting)
            for name, step in ways(inputs, setting, args.chunk_tokens):
                row = {"tokens": num_tokens, "weights": setting, "way": name}
                row |= measure(step, inputs) | floor(inputs, figures)
                rows.append(row)
                print_table([row])
                write(args.out, figures, rows)
            del inputs, step
    print_table(rows)
    return 0


def make_inputs(num_tokens: int, hidden: int, vocab: int, setting: str) -> Inputs:
    """Random bf16 inputs whose logits have a spread of about 3."""
    rng = torch.Generator(device="cuda").manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, device="cuda", dtype=torch.bfloat16)

    scale = 3 * hidden**-0.5
    inputs = {
        "student_hidden": randn(num_tokens, hidden).requires_grad_(),
        "student_weight": (scale * randn(vocab, hidden)).requires_grad_(setting == "trained"),
        "teacher_hidden": randn(num_tokens, hidden),
    }
    inputs["teacher_weight"] = (
        inputs["student_weight"] if setting == "shared" else scale * randn(vocab, hidden)
    )
    labels = torch.randint(vocab, (num_tokens,), generator=rng, device="cuda")
    return inputs | {"labels": labels, "loss_mask": torch.ones(num_tokens, device="cuda")}


def measure(step: Callable[[], Any], inputs: Inputs) -> dict[str, Any]:
    """Time and memory of a step that leaves gradients in the inputs."""
    leaves = [x for x in inputs.values() if x.requires_grad]

    def clear() -> None:
        for x in leaves:
            x.grad = None

    figures: dict[str, Any] = dict(ms=None, peak_gib=None, beyond_gradients_gib=None, note="")
    try:
        step()  # compiles, and takes the libraries' own memory
        clear()
        figures["peak_gib"] = peak_gib(step)
        gradients = sum(x.grad.numel() * x.grad.itemsize for x in leaves if x.grad is not None)
        figures["beyond_gradients_gib"] = figures["peak_gib"] - gradients / 2**30
        clear()
        figures["ms"] = median_ms(step, grad_to_none=leaves, rep_ms=1000)
    except (RuntimeError, ImportError, ValueError, TypeError, AttributeError) as error:
        # A peer that does not run here is a finding, not the end of the benchmark.
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        figures["note"] = "does not fit" if out_of_memory else f"{error!s:.80}".replace("\n", " ")
    clear()
    torch.cuda.empty_cache()
    return figures


def floor(inputs: Inputs, figures: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of the products that the step needs, three or four of equal size."""
    num_tokens, hidden = inputs["student_hidden"].shape
    num_products = 4 if inputs["student_weight"].requires_grad else 3
    flop = num_products * 2 * num_tokens * hidden * len(inputs["student_weight"])
    return {"floor_ms": flop / figures["matmul_tflop_per_s"] / 1e9}


def ways(
    inputs: Inputs, setting: str, chunks: list[int]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each way's name and its step, forward and backward."""

    def ours(impl: Any, **options: Any) -> Callable[[], Any]:
        loss = LossOptions(kl_weight=1.0, ce_weight=1.0, **options)
        return lambda: linear_kl(**inputs, loss=loss, impl=impl).loss_sum.backward()

    for chunk_tokens in chunks:
        yield f"triton, chunks of {chunk_tokens}", ours(impl="triton", chunk_tokens=chunk_tokens)
    yield "products alone, chunks of 1024", lambda: products(inputs, 1024)
    if setting == "trained":
        options: dict[str, Any] = {"impl": "triton", "chunk_tokens": chunks[0]}
        for kind in ("reverse", "jsd"):
            yield f"triton, {kind}", ours(**options, kind=kind)
        yield "triton, temperature 2", ours(**options, temperature=2.0)
        yield "triton, float32 logits", ours(**options, float32_logits=True)
    yield "reference", ours(impl="reference", chunk_tokens=chunks[0])
    yield "whole logits (KL and CE)", lambda: whole_logits(inputs)
    yield "fla FusedKLDivLoss (KL)", lambda: fla_loss(inputs)
    yield "Liger fused linear JSD (forward KL)", lambda: liger_loss(inputs)


def products(inputs: Inputs, chunk_tokens: int) -> None:
    """The matrix products alone, each chunk's written over the last one's."""
    hidden, weight, teacher_hidden, teacher_weight, *_ = (x.detach() for x in inputs.values())
    trains = inputs["student_weight"].requires_grad
    logits = weight.new_empty(chunk_tokens, len(weight))
    teacher_logits = torch.empty_like(logits)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.empty_like(weight) if trains else None
    for start in range(0, len(hidden), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        torch.mm(hidden[rows], weight.t(), out=logits)
        torch.mm(teacher_hidden[rows], teacher_weight.t(), out=teacher_logits)
        torch.mm(logits, weight, out=grad_hidden[rows])
        if grad_weight is not None:
            torch.mm(logits.t(), hidden[rows], out=grad_weight)


def whole_logits(inputs: Inputs) -> None:
    """PyTorch's own functions on the logits of all tokens, in float32 as Megatron takes them."""
    log_q = F.log_softmax((inputs["student_hidden"] @ inputs["student_weight"].t()).float(), -1)
    with torch.no_grad():
        teacher_logits = inputs["teacher_hidden"] @ inputs["teacher_weight"].t()
        log_p = F.log_softmax(teacher_logits.float(), -1)
        del teacher_logits
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    (kl + F.nll_loss(log_q, inputs["labels"], reduction="sum")).backward()


def fla_loss(inputs: Inputs) -> None:
    """flash-linear-attention's; it has no cross entropy and no mask."""
    from fla.modules.fused_kl_div import fused_kl_div_loss

    fused_kl_div_loss(
        inputs["student_hidden"],
        inputs["teacher_hidden"],
        inputs["student_weight"],
        inputs["teacher_weight"].detach(),
    ).backward()


def liger_loss(inputs: Inputs) -> None:
    """Liger's; beta 0 is its forward KL. It has no cross entropy."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    LigerFusedLinearJSD(jsd_beta=0.0)(
        inputs["student_hidden"],
        inputs["student_weight"],
        inputs["teacher_hidden"],
        inputs["teacher_weight"].detach(),
        inputs["labels"],
    ).backward()


def measure_accuracy(hidden: int, vocab: int, num_tokens: int = 256) -> list[dict[str, Any]]:
    """KL and its gradient against float64 of the same bf16 inputs.

    `rounded logits`: against float64 from logits rounded to bf16, what rounding them aside the
    kernels add; `exact logits`: against float64 throughout.
    """
    inputs = make_inputs(num_tokens, hidden, vocab, "frozen")
    rng = torch.Generator(device="cuda").manual_seed(1)
    noise = torch.randn(
        inputs["student_hidden"].shape, generator=rng, device="cuda", dtype=torch.float32
    )
    inputs["teacher_weight"] = inputs["student_weight"]
    rows = []
    for distance in (0.3, 0.03):
        near = inputs["student_hidden"].detach().float() + distance * noise
        inputs["teacher_hidden"] = near.bfloat16()
        targets = {
            "rounded logits": _kl_in_float64(inputs, rounds=True),
            "exact logits": _kl_in_float64(inputs, rounds=False),
        }
        for impl, wide in (("reference", False), ("triton", False), ("triton", True)):
            inputs["student_hidden"].grad = None
            loss = LossOptions(kl_weight=1.0, ce_weight=0.0, float32_logits=wide)
            output = linear_kl(**inputs, loss=loss, impl=impl)
            output.loss_sum.backward()
            gradient = inputs["student_hidden"].grad.double()
            row = {"distance": distance, "impl": impl, "float32_logits": wide}
            row["nats_a_token"] = float(targets["exact logits"][0]) / num_tokens
            for name, (kl, expected) in targets.items():
                row[f"KL error, {name}"] = float(abs(output.kl_sum.double() - kl) / kl)
                norm = float((gradient - expected).norm() / expected.norm())
                row[f"gradient error, {name}"] = norm
            rows.append(row)
    return rows


def _kl_in_float64(inputs: Inputs, rounds: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL sum, its gradient of the student's hidden states), 32 rows at a time."""
    weight = inputs["student_weight"].detach().double()
    kl, gradients = 0.0, []
    pairs = zip(inputs["student_hidden"].split(32), inputs["teacher_hidden"].split(32), strict=True)
    for student, teacher in pairs:
        logits, teacher_logits = (
            (x.detach() @ inputs["student_weight"].detach().t()).double()
            if rounds
            else x.detach().double() @ weight.t()
            for x in (student, teacher)
        )
        log_q, log_p = F.log_softmax(logits, -1), F.log_softmax(teacher_logits, -1)
        kl = kl + (log_p.exp() * (log_p - log_q)).sum()
        gradients.append((log_q.exp() - log_p.exp()) @ weight)
    return kl, torch.cat(gradients)


if __name__ == "__main__":
    sys.exit(main())
