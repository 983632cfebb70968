"""Tests of the Pareto table: its rows, which are dominated, its file and the verb."""

from __future__ import annotations

import dataclasses
import itertools
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hydra_tools import cli
from kit.scores import make_scores

from megatron_hydra.errors import UserError
from megatron_hydra.selection.budget import Budget, Constraints
from megatron_hydra.selection.cost import Costs, costs_of
from megatron_hydra.selection.pareto import (
    ParetoRow,
    ParetoTable,
    mark_dominated,
    pareto_table,
)
from megatron_hydra.selection.policy import choose_plan
from megatron_hydra.selection.scores import HeadScores

RATIOS = [Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(1)]


@pytest.fixture
def scores() -> HeadScores:
    """Twelve pairs; heads with an effect are noisy, so that the kept share has an interval."""
    generator = np.random.default_rng(0)
    means = generator.random((4, 8)) ** 4
    return make_scores(means * generator.normal(1, 0.4, (12, 4, 8)), num_query_groups=4)


def test_rows_are_the_plans_of_their_budgets(scores: HeadScores) -> None:
    budgets = [Budget("fa_ratio", ratio) for ratio in RATIOS]
    constraints = Constraints(min_fa_per_layer=1)
    table = pareto_table(scores, budgets, constraints, 4096, "h200")
    for budget, row in zip(budgets, table.rows, strict=True):
        plan = choose_plan(scores, budget, constraints)
        assert row.costs == costs_of(scores.shape, plan, 4096, "h200")
        kept = sum(scores.scores[i, h] for i in range(4) for h in plan.layers[i].fa_heads)
        assert row.kept_share == pytest.approx(kept / scores.scores.sum())
        assert row.budget == budget.words
        assert row.kept_interval is not None
        assert row.kept_interval[0] - 1e-12 <= row.kept_share <= row.kept_interval[1] + 1e-12
    shares = [row.kept_share for row in table.rows]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)
    assert table.rows[0].kept_interval[0] < table.rows[0].kept_interval[1]
    assert table.teacher == costs_of(scores.shape, None, 4096, "h200")


def test_scores_without_uncertainty_give_no_interval() -> None:
    table = pareto_table(
        make_scores([[0.5, 0.2]]), [Budget("fa_heads", 1)], Constraints(), 128, "h100"
    )
    assert table.rows[0].kept_interval is None


def row(kept: float, gib: float, flops: float, ms: float) -> ParetoRow:
    return ParetoRow("", kept, None, Costs(1, "h100", 1, 1, gib * 2**30, 0, flops, ms, 1))


def test_a_row_is_dominated_if_another_is_nowhere_worse_and_somewhere_better() -> None:
    rows = [row(*figures) for figures in itertools.product((0.2, 0.4), (1, 2), (5, 6), (3, 4))]
    for found in mark_dominated(rows):
        worst = (found.kept_share, found.costs.cache_gib, found.costs.flops_per_token)
        is_best = worst == (0.4, 1, 5) and found.costs.decode_ms == 3
        assert found.is_dominated is not is_best
    traded = [row(0.2, 1, 5, 3), row(0.4, 2, 6, 4), row(0.4, 2, 6, 4)]
    assert not any(found.is_dominated for found in mark_dominated(traded)), "equals dominate none"
    worse = [row(0.4, 2, 6, 4), row(0.3, 2, 6, 5)]
    assert [found.is_dominated for found in mark_dominated(worse)] == [False, True]


def test_greedy_rows_may_be_dominated(scores: HeadScores) -> None:
    """A whole-group plan costs more for what it keeps: the mark is no decoration."""
    blind = pareto_table(scores, [Budget("fa_heads", 8)], Constraints(), 10**6, "h100").rows
    whole = Constraints(whole_groups=True)
    whole_rows = pareto_table(scores, [Budget("fa_heads", 16)], whole, 10**6, "h100").rows
    inflated = dataclasses.replace(
        blind[0], kept_share=blind[0].kept_share / 2, costs=whole_rows[0].costs
    )
    assert [found.is_dominated for found in mark_dominated([*blind, inflated])] == [False, True]


def test_the_file_keeps_the_table(scores: HeadScores, tmp_path: Path) -> None:
    path = tmp_path / "pareto.json"
    table = pareto_table(scores, [Budget("fa_heads", 4)], Constraints(), 128, "h100")
    table.save(path, {"command": "x"})
    assert ParetoTable.load(path) == table
    data = json.loads(path.read_text())
    assert data["provenance"] == {"command": "x"}
    with pytest.raises(UserError, match="exists"):
        table.save(path, {})
    for broken, sentence in (
        ({"rows": [{}]}, r"key rows\[0\]\.budget is missing"),
        ({"teacher": {}}, r"key teacher\.context_tokens is missing"),
        ({"rows": 3}, "rows is 3; a list is needed"),
    ):
        path.write_text(json.dumps({**data, **broken}))
        with pytest.raises(UserError, match=rf"pareto\.json: {sentence}$"):
            ParetoTable.load(path)


@pytest.mark.parametrize("by", ["fa-ratio", "kv-cache-ratio"])
def test_the_verb_writes_and_prints_the_table(
    scores: HeadScores, by: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores.save(tmp_path / "scores.json")
    command = ["pareto", "--scores", f"{tmp_path}/scores.json", "--out", f"{tmp_path}/p.json"]
    command += ["--budgets", "1/8, 0.25,1/2", "--by", by, "--context", "4096", "--device", "h200"]
    assert cli.main(command) == 0
    table = ParetoTable.load(tmp_path / "p.json")
    assert [found.costs.context_tokens for found in table.rows] == [4096] * 3
    if by == "fa-ratio":
        assert [found.costs.num_fa_heads for found in table.rows] == [4, 8, 16]
    else:
        assert [found.costs.num_groups for found in table.rows] == [2, 4, 8]
    out = capsys.readouterr().out
    assert "one sequence of 4,096 tokens; times predicted for H200 SXM" in out
    for found in table.rows:
        (line,) = (line for line in out.splitlines() if line.startswith(found.budget))
        assert f" {found.kept_share:.1%} " in line
        assert f" {found.costs.cache_gib / table.teacher.cache_gib:.0%} " in line
    assert "teacher" in out
    assert cli.main(command) == 2
    assert "exists" in capsys.readouterr().err
