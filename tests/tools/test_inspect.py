"""Tests of ``inspect``: what it tells of a plan's heads, costs and certainty, from its file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hydra_tools import cli
from kit.scores import make_scores
from scipy.stats import spearmanr

from megatron_hydra.api import inspect as api
from megatron_hydra.api.plan import recombine
from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.combination import Combination
from megatron_hydra.selection.cost import GIB, costs_of
from megatron_hydra.selection.policy import read_explanation
from megatron_hydra.selection.scores import HeadScores

CAPABILITIES = {"needle": "retrieval", "text": "language"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Scores of two scorers on two sub-probes, 12 pairs, and a plan of 5 of 16 heads."""
    generator = np.random.default_rng(1)
    means = np.array([[0.9, 0.0, 0.5, 0.0, 0.0, 0.3, 0.0, 0.0], [0.7] + [0.0] * 7])

    def effects() -> np.ndarray:
        return means * generator.normal(1, 0.2, (12, 2, 8)) + generator.normal(0, 0.004, (12, 2, 8))

    values = {"patching": {"needle": effects(), "text": effects()}, "gates": {"needle": effects()}}
    scores = make_scores(
        values,
        num_query_groups=4,
        capabilities=CAPABILITIES,
        combination=Combination(("patching",)),
        teacher_config_hash="abc",
    )
    scores.save(tmp_path / "scores.json")
    plan(tmp_path, "plan.json", "--fa-heads", "5")
    return tmp_path


def plan(folder: Path, name: str, *arguments: str) -> HeadPlan:
    command = ["plan", "--scores", f"{folder}/scores.json", "--out", f"{folder}/{name}"]
    assert cli.main([*command, *arguments]) == 0
    return HeadPlan.load(folder / name)


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    capsys.readouterr()
    assert cli.main(["inspect", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_the_plans_file_alone_tells_what_it_keeps_and_how_sure(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "scores.json").rename(folder / "gone.json")
    out = inspect(capsys, folder / "plan.json")
    explanation = read_explanation(HeadPlan.load(folder / "plan.json"))
    assert explanation is not None and explanation.split_half is not None
    assert "5 of 16 heads keep full attention (FA)" in out
    assert "budget: 5 FA heads\nchosen: exact choice by patching" in out
    assert (
        f"{explanation.num_sure} of 5 FA heads are chosen in 95% of resamples; "
        "FA heads that only fill the budget (effect within noise): "
        f"{explanation.num_below_noise_floor}\n" in out
    )
    assert explanation.num_sure == 4 and explanation.num_below_noise_floor == 1
    median = explanation.split_half.median
    assert f"rank correlation (Spearman) of split halves: {median:.2f}" in out
    assert ", 6 pairs per sub-probe in each half" in out


def test_every_fa_head_has_a_row_that_the_scores_bear_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = inspect(capsys, folder / "plan.json").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("rank  layer"))
    rows = [line.split() for line in lines[start + 1 : start + 6]]
    assert [row[:3] for row in rows[:4]] == [
        ["1", "0", "0"], ["2", "1", "0"], ["3", "0", "2"], ["4", "0", "5"]
    ]  # fmt: skip
    scores = HeadScores.load(folder / "scores.json")
    for row in rows:
        head = int(row[1]), int(row[2])
        assert row[3] == f"{scores.scores[head]:.3f}"
        assert float(row[4]) <= float(row[3]) <= float(row[6])
        assert row[7].endswith("%") and row[8] in ("above", "below")
    effect = scores.mean_effects("patching", rows[1][-1])[1, 0]
    assert f"{effect:+.3f} patching {rows[1][-1]}" in lines[start + 2]
    assert not any("gates" in line for line in lines), "not in the combination"
    assert re.match(r"highest scores left out \(layer.head\): \d.\d \(0.00", lines[-1])


def test_costs_are_told_at_the_length_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_ = HeadPlan.load(folder / "plan.json")
    scores = HeadScores.load(folder / "scores.json")
    out = inspect(capsys, folder / "plan.json", "--context", "123456", "--device", "h200")
    ours, teacher = (costs_of(scores.shape, of, 123456, "h200") for of in (plan_, None))
    assert "one sequence of 123,456 tokens" in out
    for name, figure in (
        ("KV cache, GiB (bf16)", lambda costs: costs.kv_cache_bytes / GIB),
        ("predicted decode, ms per token (H200 SXM, bf16)", lambda costs: costs.decode_ms),
    ):
        (line,) = (line for line in out.splitlines() if line.startswith(name))
        assert line.split()[-3:-1] == [f"{figure(teacher):.4g}", f"{figure(ours):.4g}"]
    assert "one sequence of 32,768 tokens" in inspect(capsys, folder / "plan.json")
    plan(folder, "cache.json", "--cache-gib", "0.001", "--context", "4096")
    assert "one sequence of 4,096 tokens" in inspect(capsys, folder / "cache.json")


def test_costs_are_those_of_the_la_heads_planned_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    window = ("model.la_kind=sliding_window", "model.sliding_window_tokens=64")
    plan(folder, "window.json", "--fa-heads", "5", *window)
    shape = json.loads((folder / "window.json").read_text())["provenance"]["shape"]
    assert (shape["la_kind"], shape["sliding_window_tokens"]) == ("sliding_window", 64)
    found, other = (api.inspect(folder / name) for name in ("window.json", "plan.json"))
    assert found.plan.layers == other.plan.layers
    assert found.costs is not None and found.shape is not None
    # 11 heads' keys and values of 64 tokens, in bf16.
    assert found.costs[0].state_bytes == 11 * 2 * 64 * found.shape.head_dim * 2
    assert found.budget is not None and found.warning is None and found.left_out
    with pytest.raises(UserError, match="model.la_kind is 'swa'; allowed: gated_delta_net, kda"):
        recombine(HeadScores.load(folder / "scores.json"), ["model.la_kind=swa"])


def test_two_plans_are_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = plan(folder, "other.json", "--fa-heads", "3", "combine.consistency=false")
    out = inspect(capsys, folder / "plan.json", "--against", folder / "other.json")
    assert "3 FA heads in both; Jaccard 0.60" in out
    assert f"only in {folder}/other.json (0 heads, layer.head): none" in out
    assert re.search(r"only in \S+plan.json \(2 heads, layer.head\): 0.5, \d.\d", out)
    explained = [read_explanation(found) for found in (HeadPlan.load(folder / "plan.json"), other)]
    ranks = spearmanr(*(np.ravel(found.scores) for found in explained if found)).statistic
    assert ranks < 0.99
    assert f"rank correlation (Spearman) of the scores of all heads: {ranks:.2f}" in out
    assert "cost of" in out


def test_plans_at_random_or_by_hand_say_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(folder, "random.json", "--fa-heads", "5", "--random-seed", "3")
    out = inspect(capsys, folder / "random.json")
    assert "chosen: at random, seed 3" in out
    assert "drawn at random; " in out
    HeadPlan.from_fa_heads({0: [1]}, 2, 8, 4).save(folder / "hand.json")
    out = inspect(capsys, folder / "hand.json")
    assert "costs: the plan does not say the teacher's sizes; pass --scores" in out
    assert "does not say why its heads were chosen: written by hand?" in out
    out = inspect(capsys, folder / "hand.json", "--scores", folder / "scores.json")
    assert "KV cache, GiB" in out


def test_scores_of_one_pair_say_that_nothing_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_scores([[0.9, 0.1, 0.2, 0.0]]).save(tmp_path / "scores.json")
    plan(tmp_path, "plan.json", "--fa-heads", "2")
    out = inspect(capsys, tmp_path / "plan.json")
    assert "how sure: unknown, since the scores stand on one pair per sub-probe" in out
    assert "resamples" not in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--pictures", "x"], "--pictures needs --scores"),
        (["--scores", "nothing.json"], "cannot read nothing.json"),
        (["--against", "{folder}/scores.json"], "kind 'head_plan' is needed"),
        (["--against", "{folder}/other.json"], "made for another teacher"),
        (["--scores", "{folder}/others.json"], "made for another teacher"),
    ],
)
def test_bad_input_is_one_sentence(
    folder: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    others = make_scores(np.ones((2, 8)), num_query_groups=4, teacher_config_hash="other")
    others.save(folder / "others.json")
    HeadPlan.from_fa_heads({}, 2, 8, 4, "other").save(folder / "other.json")
    words = [word.format(folder=folder) for word in arguments]
    assert sentence in inspect(capsys, folder / "plan.json", *words, code=2)


def test_malformed_provenance_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = HeadPlan.load(folder / "plan.json")
    for key, value, sentence in (
        ("budget", 3, " is 3; a JSON object is needed"),
        ("constraints", {"most": 1}, ": unknown key most; known here: min_fa_per_layer, "),
        ("explanation", [], " is []; a JSON object is needed"),
    ):
        provenance = {**good.provenance, key: value}
        bad = HeadPlan(good.layers, good.num_query_groups, "abc", provenance)
        bad.save(folder / "bad.json", overwrite=True)
        found = inspect(capsys, folder / "bad.json", code=2)
        assert f"the {key} in the head plan{sentence}" in found
