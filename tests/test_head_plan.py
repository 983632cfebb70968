"""Tests of HeadPlan: its JSON, its counts and what it says about bad input."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan, LayerHeadPlan


@pytest.fixture
def plan() -> HeadPlan:
    """Three layers of 8 heads in 4 groups; layer 1 has LA heads only."""
    return HeadPlan.from_fa_heads(
        {0: [5, 0, 1], 2: [7]}, 3, 8, 4, teacher_config_hash="abc", provenance={"seed": 3}
    )


def test_heads_are_counted_from_zero_in_teacher_order(plan: HeadPlan) -> None:
    assert plan.layers[0].kinds == ("fa", "fa", "la", "la", "la", "fa", "la", "la")
    assert plan.layers[0].fa_heads == (0, 1, 5)
    assert plan.layers[0].la_heads == (2, 3, 4, 6, 7)
    assert plan.layers[1].fa_heads == ()
    assert (plan.num_layers, plan.num_heads, plan.heads_per_group) == (3, 8, 2)
    assert plan.num_fa_heads == 4


def test_a_group_is_kept_when_any_of_its_heads_is_fa(plan: HeadPlan) -> None:
    assert plan.fa_groups(0) == (0, 2)
    assert plan.fa_groups(1) == ()
    assert plan.fa_groups(2) == (3,)


def test_file_round_trip_keeps_everything(plan: HeadPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert HeadPlan.load(tmp_path / "plan.json") == plan
    with pytest.raises(UserError, match="exists"):
        plan.save(tmp_path / "plan.json")
    HeadPlan.from_fa_heads({0: [0, 1]}, 1, 2, 1).save(tmp_path / "plan.json", overwrite=True)
    assert HeadPlan.load(tmp_path / "plan.json").num_layers == 1


def test_file_is_the_documented_json(plan: HeadPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == {
        "schema_version": 1,
        "kind": "head_plan",
        "num_layers": 3,
        "num_heads": 8,
        "num_query_groups": 4,
        "teacher_config_hash": "abc",
        "layers": [
            {"layer": 0, "fa_heads": [0, 1, 5]},
            {"layer": 1, "fa_heads": []},
            {"layer": 2, "fa_heads": [7]},
        ],
        "provenance": {"seed": 3},
    }


@pytest.mark.parametrize(
    ("fa_heads", "sentence"),
    [
        ({3: [0]}, "unknown layer 3 in the head plan: use 0 to 2"),
        ({-1: [0]}, "unknown layer -1"),
        ({1: [8]}, "unknown head 8 in layer 1: use 0 to 7"),
        ({1: [-1]}, "unknown head -1 in layer 1"),
        ({1: ["2"]}, "unknown head '2' in layer 1"),
        ({1: [2, 2]}, "head 2 of layer 1 is named twice"),
    ],
)
def test_bad_heads_are_named(fa_heads: dict[int, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        HeadPlan.from_fa_heads(fa_heads, 3, 8, 4)


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (["schema_version"], 2, "schema_version is 2; allowed: 1"),
        (["kind"], "head_scores", "kind is 'head_scores'; allowed: head_plan"),
        (["surprise"], 1, "unknown key surprise; known here: schema_version, kind, num_layers, "),
        (["num_layer"], 1, "unknown key num_layer: did you mean num_layers?"),
        (["provenance"], None, "key provenance is missing"),
        (["provenance"], [1], "provenance is [1]; a JSON object is needed"),
        (["teacher_config_hash"], 7, "teacher_config_hash is 7; text is needed"),
        (["num_heads"], "8", "num_heads is '8'; an integer is needed"),
        (["num_layers"], 0, "num_layers is 0; it must be 1 or more"),
        (["num_query_groups"], 3, "8 heads are not divisible by 3 query groups"),
        (["layers"], {}, "layers is {}; a list is needed"),
        (["layers", 1], None, "layer 1 is missing"),
        (["layers", 1], 4, "layers[1] is 4; a JSON object is needed"),
        (["layers", 1, "layer"], 0, "layer 0 is named twice"),
        (["layers", 1, "layer"], 3, "unknown layer 3 in the head plan: use 0 to 2"),
        (["layers", 1, "layer"], True, "layers[1].layer is True; an integer is needed"),
        (["layers", 1, "la_heads"], [], "unknown key layers[1].la_heads: did you mean layers[1].f"),
        (["layers", 1, "fa_heads"], 3, "layers[1].fa_heads is 3; a list is needed"),
        (["layers", 1, "fa_heads"], [0, 8], "unknown head 8 in layer 1"),
        (["layers", 1, "fa_heads"], [0, 0], "head 0 of layer 1 is named twice"),
    ],
)
def test_bad_json_is_explained(
    plan: HeadPlan, path: list[Any], value: object, sentence: str
) -> None:
    """Each fault alone (a value of None removes the key) gets its own sentence."""
    data = copy.deepcopy(plan.to_dict())
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    with pytest.raises(UserError, match=f"^the head plan: {re.escape(sentence)}"):
        HeadPlan.from_dict(data)


def test_a_bad_file_is_named(plan: HeadPlan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_dict() | {"surprise": 1}))
    with pytest.raises(UserError, match=r"plan\.json: unknown key surprise"):
        HeadPlan.load(path)


def test_layers_must_agree() -> None:
    with pytest.raises(UserError, match="layer 1 of the head plan has 1 heads, but layer 0 has 2"):
        HeadPlan((LayerHeadPlan(("fa", "la")), LayerHeadPlan(("fa",))), 1)
    with pytest.raises(UserError, match="at least one layer"):
        HeadPlan((), 1)
    with pytest.raises(UserError, match="layer 0 has a head of kind '': it must be a name"):
        HeadPlan((LayerHeadPlan(("",)),), 1)


def test_heads_may_have_a_kind_of_their_own(tmp_path: Path) -> None:
    others = {1: {"kda": [2, 0], "sliding_window": [7]}}
    plan = HeadPlan.from_fa_heads({1: [1]}, 2, 8, 4, other_kinds=others)
    assert plan.layers[1].kinds == ("kda", "fa", "kda", *["la"] * 4, "sliding_window")
    assert plan.layers[1].la_heads == (0, 2, 3, 4, 5, 6, 7)
    plan.save(tmp_path / "plan.json")
    assert HeadPlan.load(tmp_path / "plan.json") == plan
    layers = json.loads((tmp_path / "plan.json").read_text())["layers"]
    assert layers == [
        {"layer": 0, "fa_heads": []},
        {"layer": 1, "fa_heads": [1], "kinds": {"kda": [0, 2], "sliding_window": [7]}},
    ]
    resolved = plan.resolved("gated_delta_net")
    assert resolved.layers[1].heads_of("gated_delta_net") == (3, 4, 5, 6)
    assert resolved.fa_groups(1) == plan.fa_groups(1) == (0,)
    with pytest.raises(UserError, match="head 1 of layer 1 is named twice in the head plan"):
        HeadPlan.from_fa_heads({1: [1]}, 2, 8, 4, other_kinds={1: {"kda": [1]}})


def test_plan_for_another_teacher_is_refused(plan: HeadPlan) -> None:
    plan.check_teacher(3, 8, 4, "abc")
    with pytest.raises(UserError, match="the teacher has 4 layers of 8 heads"):
        plan.check_teacher(4, 8, 4, "abc")
    with pytest.raises(UserError, match="made for another teacher"):
        plan.check_teacher(3, 8, 4, "abd")


def test_a_hand_written_plan_is_held_to_the_shape_alone() -> None:
    plan = HeadPlan.from_fa_heads({}, 3, 8, 4)
    plan.check_teacher(3, 8, 4, "abc")
    with pytest.raises(UserError, match="2 query groups"):
        plan.check_teacher(3, 8, 2, "abc")
