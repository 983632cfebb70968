"""Tests of HeadScores: its JSON and what it says about bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_hydra.errors import UserError
from megatron_hydra.selection.scores import HeadScores

VALUES: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": 4,
    "num_query_groups": 2,
    "teacher_config_hash": "abc",
    "scorer": "activation_patching",
    "scores": [[0.1, 0.2, 0.3, 1], [0.5, 0.6, 0.7, 0.8]],
    "effects": {"single": [[0.0, -0.3, 0.1, 0.2]] * 2, "multi": [[0.0, 0.1, 0.1, 0.0]] * 2},
    "consistency": [[1.0, 0.5, 0.0, 0.25]] * 2,
    "provenance": {"seed": 1, "probes": [{"name": "single", "pairs": 8}]},
}


def test_file_round_trip_is_the_documented_json(tmp_path: Path) -> None:
    scores = HeadScores(**VALUES)
    scores.save(tmp_path / "scores.json")
    data = json.loads((tmp_path / "scores.json").read_text())
    assert data == {"schema_version": 1, "kind": "head_scores", **VALUES}
    assert HeadScores.load(tmp_path / "scores.json") == scores
    with pytest.raises(UserError, match="exists"):
        scores.save(tmp_path / "scores.json")


def test_effect_size_is_the_mean_of_absolute_effects() -> None:
    scores = HeadScores(**VALUES)
    assert scores.effect_size(0, 1) == pytest.approx(0.2)
    assert scores.effect_size(1, 0) == 0
    assert HeadScores(**VALUES | {"effects": {}}).effect_size(0, 1) == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_layers": 3}, r"scores of the head scores must have shape \[3\]\[4\]"),
        ({"num_layers": 0}, "num_layers of the head scores must be a positive integer: 0"),
        ({"num_heads": "4"}, "num_heads of the head scores must be a positive integer: '4'"),
        ({"num_query_groups": 3}, "4 heads do not divide into 3 query groups"),
        ({"scorer": None}, "scorer of the head scores must be a string"),
        ({"effects": [1]}, "effects of the head scores must be a JSON object"),
        ({"scores": [[1, 2, 3, 4], [1, 2, 3]]}, "scores of the head scores must have shape"),
        ({"scores": [[1, 2, 3, 4], [1, 2, 3, "4"]]}, "scores of the head scores must be numbers"),
        ({"scores": None}, "scores of the head scores must be numbers"),
        ({"consistency": [[0.0] * 4]}, "consistency of the head scores must have shape"),
        ({"effects": {"a": [[0.0]]}}, r"effects\['a'\] of the head scores must have shape"),
        (
            {"scores": [[0.0] * 4, [0.0, 0.0, float("nan"), 0.0]]},
            "scores of layer 1, head 2 is nan, not finite",
        ),
    ],
)
def test_bad_values_are_explained(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        HeadScores(**VALUES | change)
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"schema_version": 1, "kind": "head_scores", **VALUES, **change}))
    with pytest.raises(UserError, match=rf"scores\.json: {sentence}"):
        HeadScores.load(path)


def test_unknown_and_missing_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    head = {"schema_version": 1, "kind": "head_scores"}
    path.write_text(json.dumps(head | VALUES | {"surprise": 1}))
    with pytest.raises(UserError, match="unknown key 'surprise'"):
        HeadScores.load(path)
    path.write_text(json.dumps(head | {k: v for k, v in VALUES.items() if k != "consistency"}))
    with pytest.raises(UserError, match="key 'consistency' is missing"):
        HeadScores.load(path)
