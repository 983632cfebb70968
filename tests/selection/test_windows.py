"""Heads that become sliding windows: whose work is local, and that have no full attention."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hydra_tools import cli
from kit.scores import make_scores

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.budget import Budget
from megatron_hydra.selection.policy import plan_from_scores
from megatron_hydra.selection.scores import HeadScores

# Layer 0: looks far back, does nothing, local, local and little. Layer 1: far, nothing, all of it
# local and the strongest of all, half of it local.
WITHOUT = [[0.8, 0.0, 0.5, 0.1], [0.6, 0.0, 0.9, 0.4]]
IN_WINDOW = [[0.8, 0.0, 0.0, 0.0], [0.6, 0.0, 0.0, 0.2]]


def _scores(**shape: object) -> HeadScores:
    effects = {
        "activation_patching": {"needle": np.array([WITHOUT])},
        "mean_ablation": {"needle": np.array([WITHOUT])},
        "window_ablation": {"needle": np.array([IN_WINDOW])},
    }
    scores = make_scores(effects, **shape)  # type: ignore[arg-type]
    paper = make_scores({"activation_patching": effects["activation_patching"]}).combination
    return scores.with_combination(paper)


def _windows(plan: HeadPlan) -> list[tuple[int, ...]]:
    return [layer.heads_of("sliding_window") for layer in plan.layers]


def test_local_heads_without_full_attention_become_windows() -> None:
    """The strongest head keeps full attention, local or not: the budget's choice comes first."""
    scores = _scores()
    summary = plan_from_scores(
        scores, Budget("fa_heads", 3), window_ratio=Fraction(2, 8), num_resamples=0
    )
    assert [layer.fa_heads for layer in summary.plan.layers] == [(0,), (0, 2)]
    assert _windows(summary.plan) == [(2,), (3,)]
    fewer = plan_from_scores(
        scores, Budget("fa_heads", 1), window_ratio=Fraction(2, 8), num_resamples=0
    )
    assert [layer.fa_heads for layer in fewer.plan.layers] == [(), (2,)]
    assert _windows(fewer.plan) == [(2,), (3,)]


def test_costs_in_the_plan_are_of_windows_too() -> None:
    scores = _scores(sliding_window_tokens=64)
    made = [
        plan_from_scores(scores, Budget("fa_heads", 2), window_ratio=ratio, num_resamples=0).plan
        for ratio in (Fraction(0), Fraction(1, 4))
    ]
    found = [plan.provenance["costs"]["plan"]["state_bytes"] for plan in made]
    d, dtype_bytes = scores.shape.head_dim, 2
    taps = scores.shape.conv_kernel_size - 1
    state, window = 4 * d * d + 3 * taps * d * dtype_bytes, 2 * 64 * d * dtype_bytes
    assert found[1] - found[0] == 2 * (window - state)


@pytest.mark.parametrize(
    ("budget", "ratio", "shape", "sentence"),
    [
        (Budget("fa_heads", 7), "1/4", {}, "2 heads cannot become windows: 1 have no FA"),
        (Budget("fa_heads", 1), "9/8", {}, "the window ratio is 1.125; allowed: 0 to 1"),
        (Budget("fa_heads", 1), "-1/8", {}, "the window ratio is -0.125; allowed: 0 to 1"),
        (Budget("fa_heads", 1), "1/8", {"la_kind": "sliding_window"}, "are windows already"),
        (Budget("cache_gib", 1.0, 4096), "1/8", {}, "counts no windows"),
    ],
)
def test_what_cannot_be_is_said(
    budget: Budget, ratio: str, shape: dict[str, str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        plan_from_scores(_scores(**shape), budget, window_ratio=Fraction(ratio), num_resamples=0)


def test_scores_without_the_scorers_are_refused() -> None:
    with pytest.raises(UserError, match="no mean_ablation and no window_ablation"):
        plan_from_scores(
            make_scores([[1.0, 2.0]]), Budget("fa_heads", 1), window_ratio=Fraction(1, 2),
            num_resamples=0,
        )  # fmt: skip


def test_the_verb_writes_a_plan_of_three_kinds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _scores().save(tmp_path / "scores.json")
    command = ["plan", "--scores", f"{tmp_path}/scores.json", "--out", f"{tmp_path}/plan.json"]
    assert cli.main([*command, "--fa-heads", "1", "--window-ratio", "1/4"]) == 0
    said = capsys.readouterr().out
    assert "the others become LA heads (5 Gated DeltaNet, 2 sliding window)" in said
    assert _windows(HeadPlan.load(tmp_path / "plan.json")) == [(2,), (3,)]
    again = [*command, "--overwrite", "--fa-heads", "1", "--window-ratio", "1/4"]
    assert cli.main([*again, "--random-seed", "1"]) == 2
    assert "leave --window-ratio out" in capsys.readouterr().err
