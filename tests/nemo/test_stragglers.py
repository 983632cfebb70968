"""Replicas that compute slowly are named while a run trains."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.distributed import run_distributed
from kit.tiny_models import PLAN
from test_training import NUM_STEPS, write_inputs
from test_validation import _check_same_run, _train

from megatron_hydra.nemo.stragglers import slow_hosts

EVERY = 2
WATCHED = [f"log.stragglers_every_n_steps={EVERY}", "log.straggler_factor=1.5"]


def test_slow_ranks_are_named_by_host() -> None:
    ranks = [("a", 1.0), ("a", 1.0), ("b", 1.0), ("b", 1.4), ("c", 2.0), ("c", 1.6)]
    assert slow_hosts(ranks, 2.0) == []
    assert [found.words for found in slow_hosts(ranks, 1.2)] == [
        "rank 3 on b took 1.4 s to compute a step, 1.4 times the ranks' median: all others wait",
        "ranks 4, 5 on c took 2 s to compute a step, 2 times the ranks' median: all others wait",
    ]
    (one,) = slow_hosts([("a", 3.0), ("b", 1.0)], 1.3)
    assert one.words.startswith("rank 0 on a took 3 s")


@pytest.mark.dist
@pytest.mark.slow
def test_a_slow_replica_is_named(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs", PLAN)
    run_distributed(_check_slow_replica, 2, inputs, tmp_path)


def _check_slow_replica(inputs: Path, folder: Path) -> None:
    from megatron_hydra.model.hydra_attention import HydraAttention

    quiet = _train(inputs, folder / "quiet", [])
    assert not any("straggling" in scalars for scalars in quiet.values())
    forward, said = HydraAttention.forward, []

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.distributed.get_rank() == 1:
            time.sleep(0.5)
        return forward(self, *args, **kwargs)

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("megatron_hydra.nemo.stragglers").addHandler(Listener())
    HydraAttention.forward = slow
    try:
        shown = _train(inputs, folder / "slow", WATCHED)
    finally:
        HydraAttention.forward = forward
    if torch.distributed.get_rank() == 1:
        assert said == []  # one rank speaks
        return
    due = set(range(EVERY, NUM_STEPS + 1, EVERY))
    found = {step: x["straggling"] for step, x in shown.items() if "straggling" in x}
    assert set(found) == due and all(ratio > 1.5 for ratio in found.values())
    assert len(said) == len(due) and all(line.startswith("rank 1 on ") for line in said)
    lines = [json.loads(x) for x in (folder / "slow/metrics.jsonl").read_text().splitlines()]
    assert {x["step"]: x["straggling"] for x in lines if "straggling" in x} == found
    lines = [json.loads(x) for x in (folder / "slow/findings.jsonl").read_text().splitlines()]
    assert {x["step"]: x["times_the_median"] for x in lines} == found
    assert all((x["what"], x["ranks"]) == ("straggler", [1]) for x in lines)
    for scalars in shown.values():
        scalars.pop("straggling", None)
    _check_same_run(shown, quiet, folder / "slow", folder / "quiet")
