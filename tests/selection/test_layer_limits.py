"""How many FA heads a layer has at most: what the constraint allows, and a plan without it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra_tools import cli
from kit.scores import make_scores

from megatron_hydra.errors import UserError
from megatron_hydra.selection.budget import Budget, Constraints
from megatron_hydra.selection.policy import plan_from_scores, random_plan


@pytest.mark.parametrize(
    ("number", "asked", "sentence"),
    [
        (6, {"per_layer": 2, "max_fa_per_layer": 1}, "2 FA heads per layer contradict at most 1"),
        (7, {"max_fa_per_layer": 2}, "7 FA heads is too large for 2 in each of 3 layers"),
        (
            4,
            {"max_fa_per_layer": 3, "multiple_of": 4},
            r"that makes 0 \(3 or fewer FA heads per layer, FA heads per layer in multiples of 4\)",
        ),
        (6, {"min_fa_per_layer": 3, "max_fa_per_layer": 2}, "at least 3 and at most 2 FA heads"),
        (
            6,
            {"min_fa_per_layer": 1, "max_fa_per_layer": 1, "whole_groups": True},
            "at least 1 and at most 1 .* a multiple of 2 can be FA",
        ),
        (6, {"max_fa_per_layer": -1}, "max_fa_per_layer is -1; it must be 0 or more"),
    ],
)
def test_limits_that_leave_nothing_are_explained(
    number: int, asked: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        plan_from_scores(
            make_scores(np.ones((3, 4))), Budget("fa_heads", number), Constraints(**asked)
        )


@pytest.mark.parametrize("more", [{}, {"whole_groups": True}, {"min_fa_per_layer": 1}])
def test_no_layer_has_more_than_the_limit(more: dict[str, Any]) -> None:
    """All evidence is in the first layer, which takes as much as it may; lots keep to it too."""
    scores = make_scores(np.array([[9.0] * 4, [1.0] * 4, [2.0] * 4]))
    limit, budget = Constraints(max_fa_per_layer=2, **more), Budget("fa_heads", 4)
    counts = plan_from_scores(scores, budget, limit).fa_heads_per_layer
    assert counts[0] == max(counts) == 2 and sum(counts) == 4
    for seed in range(20):
        assert max(random_plan(scores, budget, limit, seed=seed).fa_heads_per_layer) <= 2


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        ([], "WARNING: layer 0 would have FA heads alone: "),
        (["--max-fa-per-layer", "3"], None),
        (["--fa-heads", "12"], None),  # that is the teacher
        (["--fa-heads", "8"], "WARNING: layers 0, 2 would have FA heads alone: "),
        (["--fa-heads", "4", "--multiple-of", "4"], "WARNING: layer 0 would have FA heads alone: "),
        (["--fa-heads", "11"], "WARNING: layers 0, 2 would have FA heads alone: "),
    ],
)
def test_a_layer_without_other_heads_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], warning: str | None
) -> None:
    path, out = tmp_path / "scores.json", tmp_path / "plan.json"
    make_scores(np.array([[9.0] * 4, [1.0] * 4, [2.0] * 4])).save(path)
    number = [] if "--fa-heads" in words else ["--fa-heads", "5"]
    command = ["plan", "--scores", str(path), "--out", str(out), *number, *words]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert cli.main(["inspect", str(out)]) == 0
    for text in (printed, capsys.readouterr().out):
        lines = [line for line in text.splitlines() if line.startswith("WARNING")]
        assert [line.startswith(warning or "") for line in lines] == [True] * bool(warning), text
        possible = words not in (["--fa-heads", "4", "--multiple-of", "4"], ["--fa-heads", "11"])
        for line in lines:
            assert line.endswith("--max-fa-per-layer 3 leaves every layer other heads") == possible
