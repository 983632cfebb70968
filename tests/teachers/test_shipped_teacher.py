"""The teacher that ships: it retrieves, few of its heads do it, and its log says how many."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from megatron_hydra.tasks.text import local_text, split_held_out
from megatron_hydra.teachers.tokenizer import load_tokenizer

QUICKSTART = Path(__file__).parents[2] / "examples/quickstart"
NUM_SAMPLES = 24
NUM_CONTROLS = 8
# Of the true accuracy: three standard errors of 24 samples at 0.9 are 0.18.
SLACK = 0.2


@pytest.fixture(scope="module")
def retrieval() -> ModuleType:
    spec = importlib.util.spec_from_file_location("retrieval", QUICKSTART / "retrieval.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def log() -> dict[str, Any]:
    return json.loads((QUICKSTART / "teacher/training_log.json").read_text())["ablation"]


@pytest.fixture(scope="module")
def study(retrieval: ModuleType) -> Any:
    folder = QUICKSTART / "teacher"
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder)
    text = tokenizer.encode(local_text(), add_special_tokens=False, verbose=False)
    _, held_out = split_held_out(text)
    return retrieval.HeadAblation(model, tokenizer, held_out, NUM_SAMPLES)


def test_the_logs_controls_are_random_draws_of_other_heads(study: Any, log: dict[str, Any]) -> None:
    top = [tuple(head) for head in log["top_heads"]]
    costs = log["log_prob_cost"]
    ranked = sorted(study.every_head, key=lambda head: -costs[head[0]][head[1]])
    assert ranked[: len(top)] == top
    draws = study.random_others(top, len(log["control_draws"]))
    assert [[list(head) for head in draw] for draw in draws] == log["control_draws"]
    assert not any(head in top for draw in draws for head in draw)
    assert len({str(draw) for draw in draws}) > 0.9 * len(draws)


def test_its_top_heads_alone_break_retrieval_and_others_mostly_do_not(
    study: Any, log: dict[str, Any]
) -> None:
    """Measured here on fewer samples: whole, without the top heads, without the log's controls."""
    assert study.accuracy() >= 0.9
    assert study.accuracy([tuple(head) for head in log["top_heads"]]) <= 0.1
    draws = [[tuple(head) for head in draw] for draw in log["control_draws"][:NUM_CONTROLS]]
    found = [study.accuracy(draw) for draw in draws]
    logged = log["accuracy_without_control_draws"]
    for draw, measured, expected in zip(draws, found, logged, strict=False):
        assert abs(measured - expected) <= SLACK, draw
    assert sum(value >= 0.9 - SLACK for value in found) >= 0.75 * NUM_CONTROLS
    assert sum(value >= 0.9 for value in logged) >= 0.75 * len(logged)


def test_without_each_head_it_is_as_good_as_its_log_says(study: Any, log: dict[str, Any]) -> None:
    """The heads whose loss breaks retrieval, and the next ones, each alone."""
    alone = {head: log["accuracy_without_head"][head[0]][head[1]] for head in study.every_head}
    worst = sorted(alone, key=alone.__getitem__)
    assert 0 < sum(value < 0.1 for value in alone.values()) <= len(alone) // 8
    for head in worst[:4]:
        assert abs(study.accuracy([head]) - alone[head]) <= SLACK, head


def test_no_head_ablated_is_the_model_itself_and_an_ablated_head_has_no_say(study: Any) -> None:
    model, tokens = study.model, study.samples[:2]
    with torch.no_grad():
        plain = model(input_ids=tokens).logits
        with study._ablated([]):
            assert torch.equal(model(input_ids=tokens).logits, plain)
        with study._ablated([(1, 3)]):
            first = model(input_ids=tokens).logits
            rows = slice(3 * 32, 4 * 32)
            weight = model.model.layers[1].self_attn.q_proj.weight
            kept = weight[rows].clone()
            weight[rows] *= -2.0  # another attention pattern in that head alone
            second = model(input_ids=tokens).logits
            weight[rows] = kept
    assert torch.equal(first, second)
    assert not torch.equal(first, plain)
