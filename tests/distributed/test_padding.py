"""A vocabulary and an MLP width that ranks cannot share equally: padded, and nothing shows of it.

Catches: padded rows that a softmax sees or a token finds, padding that trains or starts at random,
a row counted on two ranks or none, unequal parts that collectives take for equal ones, padding
that gets into a checkpoint, and state of the optimizer that lands one row off.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hydra.testing import run_distributed

pytestmark = pytest.mark.dist

# Of 2 ranks the last holds one less, of 4 ranks three less: 31 + 30, 16 + 16 + 16 + 13, and so on.
PADDED = {"vocab_size": 61, "ffn_hidden_size": 49}
FA_HEADS = {0: (1, 2, 5), 1: (0, 1, 6, 7)}
WANTED = {
    "tensor parallel, ranks of one kind: tp4 by_type",
    "tensor and context parallel: tp2 cp2 sp by_type",
    "tensor parallel and pipeline: tp2 pp2 sp by_type micro4",
    "distributed optimizer: tp4 sp by_type distopt",
    "checkpoint there and back: tp4 sp by_type",
}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_layouts_train_the_same_model(tmp_path: Path, tied: bool) -> None:
    """Logits, losses, gradients, weights and Adam's moments of one rank without padding."""
    run_distributed(_certify, 4, tmp_path, tied)
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    failed = [row for row in certificate["rows"] if not row["passed"]]
    assert certificate["passed"] and not failed, failed
    assert {f"{row['check']}: {row['layout']}" for row in certificate["rows"]} == WANTED


def _certify(folder: Path, tied: bool) -> None:
    from megatron_hydra.testing.certificate import certify
    from megatron_hydra.testing.checks import Limits
    from megatron_hydra.testing.worlds import Ranks

    certificate = certify(
        _run(folder, tied),
        Limits(4, 2, 2),
        48,
        Ranks(),
        world_size=4,
        rank=int(os.environ["RANK"]),
        select=lambda check: f"{check.name}: {check.layout.name}" in WANTED,
    )
    if os.environ["RANK"] == "0":
        (folder / "certificate.json").write_text(json.dumps(certificate.data))


def _run(folder: Path, tied: bool) -> Any:
    from megatron_hydra.head_plan import HeadPlan
    from megatron_hydra.testing.certificate import WELL_CONDITIONED
    from megatron_hydra.testing.tiny import tiny_fields
    from megatron_hydra.testing.training import Run

    fields = tiny_fields(share_embeddings_and_output_weights=tied, **PADDED, **WELL_CONDITIONED)
    plan = HeadPlan.from_fa_heads(FA_HEADS, 2, 8, 4)
    return Run(fields, plan, folder / "weights", folder, num_steps=2)
