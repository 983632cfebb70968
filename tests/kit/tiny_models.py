"""The checkpoint folders that every training test starts from, written by the public commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra_tools import cli
from kit.tiny_qwen3 import write_tiny_qwen3

from megatron_hydra.head_plan import HeadPlan

PLAN = HeadPlan.from_fa_heads({0: [1], 1: [0, 3]}, 2, 4, 2)
PLAN_OF_KINDS = HeadPlan.from_fa_heads(
    {0: [1], 1: [3]}, 2, 4, 2, other_kinds={1: {"kda": [1], "sliding_window": [2]}}
)
"""A layer of full attention and Gated DeltaNet, and one of these and two more."""


def write_models(folder: Path, plan: HeadPlan = PLAN, **qwen3_fields: Any) -> None:
    """Write `qwen3`, `plan.json`, `teacher` and `hybrid` to a folder."""
    source = str(write_tiny_qwen3(folder / "qwen3", **qwen3_fields))
    plan.save(folder / "plan.json")
    convert = ["convert", "--teacher", source, "--out"]
    assert cli.main([*convert, f"{folder}/teacher"]) == 0
    planned = ["--plan", f"{folder}/plan.json", "--calibration-tokens", "256"]
    assert cli.main([*convert, f"{folder}/hybrid", *planned]) == 0
