"""Tests of HeadScores: its JSON and what it says about bad input."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit.scores import make_scores

from megatron_hydra.errors import UserError
from megatron_hydra.selection.combination import Combination
from megatron_hydra.selection.scores import HeadScores, ProbeRecord

CAPABILITIES = {"needle": "retrieval", "needles": "retrieval", "text": "language"}


@pytest.fixture
def scores() -> HeadScores:
    """Two layers of four heads, two scorers, of which one cannot read the text."""
    generator = np.random.default_rng(0)

    def effects(*names: str) -> dict[str, np.ndarray]:
        return {name: generator.normal(0, 0.3, (3, 2, 4)) for name in names}

    return make_scores(
        {"patching": effects("needle", "needles", "text"), "attention": effects("needle")},
        capabilities=CAPABILITIES,
        combination=Combination(("patching", "attention"), weights={"language": 0.5}),
        provenance={"seed": 1, "command": "score"},
    )


def test_the_file_keeps_everything_and_effects_to_9_digits(
    scores: HeadScores, tmp_path: Path
) -> None:
    path = tmp_path / "scores.json"
    scores.save(path)
    loaded = HeadScores.load(path)
    for field in ("shape", "teacher_config_hash", "probes", "combination", "provenance"):
        assert getattr(loaded, field) == getattr(scores, field), field
    assert {s: list(by) for s, by in loaded.effects.items()} == {
        "patching": ["needle", "needles", "text"],
        "attention": ["needle"],
    }
    for scorer, by_probe in scores.effects.items():
        for name, values in by_probe.items():
            np.testing.assert_allclose(loaded.effects[scorer][name], values, rtol=5e-9, atol=0)
    np.testing.assert_allclose(loaded.scores, scores.scores, atol=1e-7)
    with pytest.raises(UserError, match="exists"):
        scores.save(path)


def test_the_weights_that_were_measured_stay_known(scores: HeadScores, tmp_path: Path) -> None:
    """A hash of the shape alone does not tell a model from its fine-tune."""
    dataclasses.replace(scores, teacher_weights_hash="feed").save(tmp_path / "scores.json")
    loaded = HeadScores.load(tmp_path / "scores.json")
    assert loaded.teacher_weights_hash == "feed"
    assert loaded.with_combination(scores.combination).teacher_weights_hash == "feed"
    data = json.loads((tmp_path / "scores.json").read_text())
    del data["teacher_weights_hash"]  # a file of an earlier release
    (tmp_path / "earlier.json").write_text(json.dumps(data))
    assert HeadScores.load(tmp_path / "earlier.json").teacher_weights_hash == ""


def test_rounding_happens_once(scores: HeadScores, tmp_path: Path) -> None:
    """What was loaded, saved and loaded again is still the same, however often."""
    paths = [tmp_path / f"{name}.json" for name in ("first", "second", "third")]
    scores.save(paths[0])
    HeadScores.load(paths[0]).save(paths[1])
    HeadScores.load(paths[1]).save(paths[2])
    assert paths[1].read_bytes() == paths[2].read_bytes()


def test_the_json_is_what_a_reader_expects(scores: HeadScores, tmp_path: Path) -> None:
    scores.save(tmp_path / "scores.json")
    data = json.loads((tmp_path / "scores.json").read_text())
    assert (data["schema_version"], data["kind"]) == (2, "head_scores")
    assert data["shape"]["num_heads"] == 4
    assert data["combination"]["scorers"] == ["patching", "attention"]
    np.testing.assert_allclose(data["scores"], scores.scores, rtol=1e-8)
    assert data["probes"][2]["capability"] == "language" and data["probes"][2]["kept"] == [0, 1, 2]
    found = data["effects"]["patching"]["text"][1][0][3]  # pair 1, layer 0, head 3
    assert found == pytest.approx(scores.effects["patching"]["text"][1, 0, 3], rel=1e-8)
    loaded = HeadScores.load(tmp_path / "scores.json")
    np.testing.assert_allclose(loaded.scores, scores.scores, atol=1e-7)


def test_effect_size_is_the_mean_of_absolute_means_over_the_combination() -> None:
    needle = np.array([[[0.5, -0.2]], [[-0.1, -0.4]]])  # means 0.2 and -0.3
    text = np.array([[[0.0, 0.1]]])
    attention = np.array([[[9.0, 9.0]], [[9.0, 9.0]]])
    scores = make_scores(
        {"patching": {"needle": needle, "text": text}, "attention": {"needle": attention}},
        combination=Combination(("patching",)),
    )
    np.testing.assert_allclose(scores.mean_effects("patching", "needle"), [[0.2, -0.3]])
    np.testing.assert_allclose(scores.effect_size, [[0.1, 0.2]])


def test_another_combination_needs_no_rerun(scores: HeadScores) -> None:
    alone = scores.with_combination(Combination(("attention",), consistency=False, normalise=False))
    means = scores.effects["attention"]["needle"].mean(axis=0)
    np.testing.assert_allclose(alone.scores, np.abs(means))
    with pytest.raises(UserError, match="names scorer 'zero'"):
        scores.with_combination(Combination(("zero",)))


def test_a_constant_map_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    scores = make_scores({"s": {"p": np.full((2, 1, 2), 0.3)}})
    assert scores.scores.tolist() == [[0.0, 0.0]]
    assert caplog.text.count("none stands out") == 1


def test_dropped_pairs_are_counted() -> None:
    record = ProbeRecord("p", "c", "logit_difference", 4, (0, 3), (2.0, 0.1, -0.3, 1.5), 64, 0)
    assert record.num_dropped == 2


EFFECTS = ("effects", "patching", "needle")


def put(*keys: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the JSON: the last of ``keys`` is the value, those before lead to its place."""

    def change(data: Any) -> None:
        for key in keys[:-2]:
            data = data[key]
        data[keys[-2]] = keys[-1]

    return change


def drop(*keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (put("schema_version", 1), "has schema version 1; this release reads version 2"),
        (put("kind", "head_plan"), "holds 'head_plan', but a file of kind 'head_scores' is needed"),
        (put("surprise", 1), "unknown key surprise; known here: shape, teacher_config_h"),
        (drop("probes"), "key probes is missing"),
        (drop("scores"), "key scores is missing"),
        (drop("shape", "head_dim"), r"key shape\.head_dim is missing"),
        (put("shape", "num_query_groups", 3), "4 heads are not divisible by 3 query groups"),
        (put("shape", "num_heads", "4"), r"shape\.num_heads is '4'; an integer is needed"),
        (put("shape", "num_layers", 0), r"shape\.num_layers is 0; it must be 1 or more"),
        (put("probes", 0, "colour", 1), r"unknown key probes\[0\]\.colour"),
        (put("probes", 0, 3), r"probes\[0\] is 3; a JSON object is needed"),
        (put("probes", {}), "probes is {}; a list is needed"),
        (put("effects", [1]), r"effects is \[1\]; a JSON object is needed"),
        (put("effects", "patching", [1]), r"effects\.patching is \[1\]; a JSON object is needed"),
        (put("teacher_config_hash", 5), "teacher_config_hash is 5; text is needed"),
        (put("teacher_weights_hash", 5), "teacher_weights_hash is 5; text is needed"),
        (put("combination", None), "combination is None; a JSON object is needed"),
        (put("combination", "scorers", ["zero"]), "names scorer 'zero', but the effects are of"),
        (put(*EFFECTS, 0, 1, 2, float("nan")), "not valid JSON: NaN is no number of JSON"),
        (put(*EFFECTS, 2, 0, 0, float("inf")), "not valid JSON: Infinity is no number of JSON"),
        (put(*EFFECTS, 0, 1, 2, "0.5"), r"effects\.patching\.needle is no array of numbers"),
        (put(*EFFECTS, 0, 1, 2, None), r"effects\.patching\.needle is no array of numbers"),
        (drop(*EFFECTS, 0, 1, 2), r"effects\.patching\.needle is no array of numbers: "),
        (drop(*EFFECTS, 2), r"effects of patching on 'needle' .* have shape \(2, 2, 4\), not \(3"),
        (put("shape", "num_layers", 3), r"have shape \(3, 2, 4\), not \(3, 3, 4\)"),
        (put("effects", "patching", "riddle", []), "no such sub-probe among needle, needles, text"),
        (put("probes", 1, "name", "needle"), "two sub-probes of the head scores have the same"),
        (put("probes", 0, "kept", [0, 1, 3]), "'needle' of the head scores has 3 pairs, which 3 g"),
        (put("probes", 0, "kept", [0, 1, 1]), r"kept pairs \[0, 1, 1\] do not fit"),
        (put("probes", 0, "gaps", [1.0]), "which 1 gaps"),
        (put("probes", 0, "kept", []), "the sub-probe keeps no pair, so it has no effects"),
        (put("probes", 0, "kept", None), r"probes\[0\]\.kept is None; a list is needed"),
    ],
)
def test_a_bad_file_is_one_sentence_that_names_it(
    change: Callable[[dict[str, Any]], None], sentence: str, scores: HeadScores, tmp_path: Path
) -> None:
    data = json.loads(json.dumps(scores.to_dict()))
    change(data)
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=rf"scores\.json\b.*{sentence}") as raised:
        HeadScores.load(path)
    assert "\n" not in str(raised.value)


def test_bad_arrays_are_refused_before_they_reach_a_file(scores: HeadScores) -> None:
    effects = {"patching": {"needle": np.full((3, 2, 4), np.nan)}}
    with pytest.raises(UserError, match="effects of patching on 'needle'.*not finite"):
        dataclasses.replace(scores, effects=effects)
    assert not scores.scores.flags.writeable
