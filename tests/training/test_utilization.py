"""MFU against operations counted by PyTorch, and its absence where a peak is not known.

Catches: a teacher or a backward pass that is left out or counted twice, a batch or a number of GPUs
that is forgotten, and a figure for a GPU, a format or samples that it does not hold for.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.shape import ModelShape
from megatron_hydra.training.config import RunConfig, load_config
from megatron_hydra.training.utilization import flops_of_step, seconds_at_peak

SHAPE = ModelShape(2, 4, 2, 64, 256, 512, 1024, tied_embeddings=True)
PLAN = HeadPlan.from_fa_heads({0: range(4), 1: range(4)}, 2, 4, 2)
LENGTH, BATCH = 128, 6


def _config(folder: Path, *overrides: str) -> RunConfig:
    raw = {
        "data": {"paths": ["d"], "seq_length": LENGTH, "micro_batch_size": 1,
                 "global_batch_size": BATCH},
        "trainer": {"max_steps": 3, "precision": "bf16"},
        "optim": {"lr": 1e-3},
        "transfer": {"stage": "long_context", "init_from": "hybrid", "teacher": "teacher"},
        "strategy": {"use_distributed_optimizer": True},
        "log": {"folder": "run"},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    return load_config(folder / "run.yaml", overrides)


def _counted(gate_width: int, trains: bool) -> int:
    """Operations of one sample's matrices and causal attention, as PyTorch counts them."""
    num_passes = 3 if trains else 1
    x = torch.zeros(LENGTH, SHAPE.hidden_size, requires_grad=trains)
    with FlopCounterMode(display=False) as counter:
        y = _forward(x, gate_width, trains)
        if trains:
            y.sum().backward()
    # It counts the whole square of queries and keys, of which a causal attention needs half.
    unneeded = 2 * LENGTH**2 * SHAPE.head_dim * SHAPE.total_heads
    return counter.get_total_flops() - num_passes * unneeded


def _forward(x: Tensor, gate_width: int, trains: bool) -> Tensor:
    """A decoder's matrices, without its norms and with an output gate of so many columns."""

    def linear(y: Tensor, width: int) -> Tensor:
        return y @ torch.zeros(y.shape[-1], width, requires_grad=trains)

    for _ in range(SHAPE.num_layers):
        q, k, v = (linear(x, heads * 64).unflatten(-1, (-1, 64)) for heads in (4, 2, 2))
        k, v = (y.repeat_interleave(2, dim=1) for y in (k, v))
        heads = torch.einsum("nqk,knd->qnd", torch.einsum("qnd,knd->nqk", q, k), v).flatten(1)
        if gate_width:
            heads = heads * linear(x, gate_width)
        x = linear(heads, SHAPE.hidden_size)
        x = linear(x, SHAPE.ffn_hidden_size) * linear(x, SHAPE.ffn_hidden_size)
        x = linear(x, SHAPE.hidden_size)
    return linear(x, SHAPE.vocab_size)


def test_a_steps_operations_are_those_that_pytorch_counts(tmp_path: Path) -> None:
    student = BATCH * _counted(gate_width=256, trains=True)
    teacher = BATCH * _counted(gate_width=0, trains=False)
    long_context = flops_of_step(_config(tmp_path), SHAPE, PLAN)
    assert long_context == pytest.approx(student, rel=1e-9)
    distill = flops_of_step(_config(tmp_path, "transfer.stage=distill"), SHAPE, PLAN)
    assert distill == pytest.approx(student + teacher, rel=1e-9)
    with_kl = flops_of_step(_config(tmp_path, "transfer.kl_weight=0.1"), SHAPE, PLAN)
    assert with_kl == distill


def test_a_step_of_two_gpus_at_their_peak_takes_half_as_long(tmp_path: Path) -> None:
    config = _config(tmp_path)
    flops = flops_of_step(config, SHAPE, PLAN)
    assert flops is not None
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        assert seconds_at_peak(config, SHAPE, PLAN, name, 2) == pytest.approx(flops / 2 / 989e12)


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("optim.lr=1e-3", "NVIDIA H100 PCIe"),
        ("optim.lr=1e-3", "NVIDIA H100 80GB HBM3 MIG 3g.40gb"),
        ("optim.lr=1e-3", "NVIDIA H200 NVL"),
        ("optim.lr=1e-3", "CPU"),
        ("trainer.precision=fp8", "NVIDIA H200"),
        ("trainer.precision=fp32", "NVIDIA H200"),
        ("data.reset_at_document_end=true", "NVIDIA H200"),
    ],
)
def test_what_is_not_known_has_no_figure(tmp_path: Path, override: str, name: str) -> None:
    config = _config(tmp_path, override)
    assert seconds_at_peak(config, SHAPE, PLAN, name, 1) is None
