"""Tests of the reader: YAML as people write it, JSON as programs do, and what fields may hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest

from megatron_hydra.errors import UserError
from megatron_hydra.schema import (
    MAY_LACK,
    Limits,
    PathText,
    ReadBy,
    as_overrides,
    check_fields,
    from_json,
    load_json,
    read_config,
    read_overrides,
)


@dataclass
class Section:
    rate: float = 1.0
    place: PathText | None = None
    places: list[PathText] = field(default_factory=list)
    text: str = ""


@dataclass
class Config:
    a: Section = field(default_factory=Section)
    b: Section = field(default_factory=Section)


def read(path: Path, text: str, *overrides: str) -> Config:
    path.write_text(text, encoding="utf-8")
    return read_config(Config, path, overrides)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("a: {rate: 1}\nb: {}\na: {rate: 2}\n", "a"),
        ("a:\n  rate: 1\n  text: x\n  rate: 2\n", "rate"),
    ],
)
def test_what_is_given_twice_is_refused(file: Path, text: str, key: str) -> None:
    with pytest.raises(UserError, match=rf"is not valid YAML: .*'{key}' is given twice"):
        read(file, text)


def test_merged_keys_may_be_given_anew(file: Path) -> None:
    config = read(file, "a: &a {rate: 2, text: x}\nb: {<<: *a, rate: 3}\n")
    assert (config.b.rate, config.b.text) == (3.0, "x")


def test_a_file_takes_from_its_defaults_what_it_does_not_say(file: Path) -> None:
    """From two files above, by paths from where each lies; overrides count most."""
    above = file.parent / "above"
    above.mkdir()
    (above / "first.yaml").write_text("a: {rate: 2, text: x, places: [p, q]}\nb: {rate: 5}\n")
    (above / "second.yaml").write_text("defaults: first.yaml\na: {rate: 3}\nb: {place: there}\n")
    config = read(file, "defaults: above/second.yaml\na: {places: [r]}\nb:\n", "b.text=y")
    assert config.a == Section(3.0, None, ["r"], "x")
    assert config.b == Section(5.0, "there", [], "y")
    assert read(file, "defaults: above/second.yaml\nb: {place: null}\n").b.place is None
    same = read(file, f"defaults: {above}/second.yaml\n")
    assert same == read_config(Config, above / "second.yaml")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("defaults: other.yaml\n", r"defaults in \S+/other.yaml: \S+config.yaml leads back"),
        ("defaults: config.yaml\n", r"defaults in \S+/config.yaml: \S+config.yaml leads back"),
        ("defaults: nowhere.yaml\n", r"defaults in \S+config.yaml: cannot read the config \S+nowh"),
        (
            "defaults: [other.yaml]\n",
            r"defaults in \S+config.yaml is \['other.yaml'\]; the path of",
        ),
        ("defaults: ''\n", r"defaults in \S+config.yaml is empty: name a path"),
        ("defaults: broken.yaml\n", r"broken.yaml is not valid YAML"),
        ("defaults: text.yaml\n", r"text.yaml must hold the sections a, b"),
        ("defaults: unknown.yaml\n", r"unknown config key a.rat: did you mean a.rate"),
    ],
)
def test_defaults_that_cannot_be_read_are_one_sentence(
    file: Path, text: str, sentence: str
) -> None:
    for name, other in (
        ("other", "defaults: config.yaml\n"),
        ("broken", "a: ["),
        ("text", "a"),
        ("unknown", "a: {rat: 1}\n"),
    ):
        (file.parent / f"{name}.yaml").write_text(other)
    with pytest.raises(UserError, match=sentence) as raised:
        read(file, text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "nan", "1e999"])
def test_a_number_is_finite(file: Path, value: str) -> None:
    for arguments in ((f"a: {{rate: {value}}}\n",), ("", f"a.rate={value}")):
        with pytest.raises(UserError, match=r"a\.rate is .*; a number is needed"):
            read(file, arguments[0] or "a: {}\n", *arguments[1:])


def test_paths_are_expanded_and_other_text_is_not(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUNS", "/runs")
    text = "a: {place: ~/x, places: [$RUNS/y, z], text: ~/$RUNS}\n"
    config = read(file, text, "b.place=${RUNS}/w")
    assert config.a.place == "/home/me/x"
    assert config.a.places == ["/runs/y", "z"]
    assert config.a.text == "~/$RUNS"
    assert config.b.place == "/runs/w"
    with pytest.raises(UserError, match=r"b\.place is \$NO/x, but \$NO is not set"):
        read(file, text, "b.place=$NO/x")


@pytest.mark.parametrize("value", ["010", "-017", "1:30", "1:30.5", "0_7"])
def test_a_number_of_another_base_is_refused(file: Path, value: str) -> None:
    for text, *override in ((f"a: {{rate: {value}}}\n",), ("a: {}\n", f"a.rate={value}")):
        with pytest.raises(UserError, match=f"not valid YAML: .*{value} would be read as a number"):
            read(file, text, *override)
    config = read(file, f"a: {{text: '{value}', rate: 1_000}}\n", "b.rate=0.5", "a.place='010'")
    assert (config.a.text, config.a.rate, config.b.rate, config.a.place) == (
        value,
        1000,
        0.5,
        "010",
    )


def test_a_date_is_text(file: Path) -> None:
    config = read(file, "a: {text: 2026-13-45, place: 2026-01-31}\n", "b.place=2026-02-01")
    assert (config.a.text, config.a.place, config.b.place) == (
        "2026-13-45", "2026-01-31", "2026-02-01",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {rate: {{ rate }}}\n", "not valid YAML: braces or brackets stand where a key belongs"),
        ("a: {? [x] : 1}\n", "not valid YAML: braces or brackets stand where a key belongs"),
        (f"a: {{rate: 1{'0' * 5000}}}\n", "not valid YAML: Exceeds the limit"),
        ("a: {text: !!python/object/apply:os.getpid []}\n", "could not determine a constructor"),
        ("a: {place: ''}\n", r"a\.place is empty: name a path; the current folder is \."),
        ("a: {places: [x, ' ']}\n", r"a\.places\[1\] is empty: name a path"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(file: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(file, text)


@dataclass(frozen=True)
class Item:
    """Of a file that a program writes."""

    FORMER_KEYS: ClassVar = ("old",)
    kind: Literal["a", "b"]
    size: Annotated[int, Limits(least=1)]
    share: Annotated[float, Limits(above=0, most=1)] | None


@dataclass(frozen=True)
class File:
    items: tuple[Item, ...]
    pair: tuple[float, int]
    by_length: Mapping[int, float]
    seeds: list[Annotated[int, Limits(least=0, below=2**32)]]
    names: Mapping[str, Annotated[str, Limits(choices=("x", "y"))]]
    even: Annotated[int, ReadBy(lambda value, name: 2 * value)]
    anything: Any = None
    later: bool = field(default=True, metadata=MAY_LACK)


FILE = {
    "items": [{"kind": "a", "size": 1, "share": None}, {"kind": "b", "size": 2, "share": 1}],
    "pair": [0.5, 3],
    "by_length": {"512": 1.5},
    "seeds": [0, 2**32 - 1],
    "names": {"first": "x"},
    "even": 4,
    "anything": {"a": [1]},
    "later": False,
}


def test_json_is_read_by_type() -> None:
    found = from_json(File, FILE, "file")
    assert found.items == (Item("a", 1, None), Item("b", 2, 1.0))
    assert (found.pair, found.by_length, found.even) == ((0.5, 3), {512: 1.5}, 8)
    assert from_json(Item, asdict(found.items[1]), "item") == found.items[1]


def test_keys_of_earlier_releases_may_be_there_or_not() -> None:
    item = {"kind": "a", "size": 1, "share": None, "old": 3}
    assert from_json(Item, item, "item") == Item("a", 1, None)
    assert from_json(File, {key: FILE[key] for key in FILE if key != "later"}, "file").later


@pytest.mark.parametrize(
    ("keys", "value", "sentence"),
    [
        (("item",), [], "unknown key item: did you mean items?"),
        (("items", 1, "colour"), 1, "unknown key items[1].colour; known here: kind, size, share"),
        (("items", 0), None, "items[0] is None; a JSON object is needed"),
        (("items", 0), {"kind": "a", "size": 1}, "key items[0].share is missing"),
        (("items",), {}, "items is {}; a list is needed"),
        (("items", 0, "kind"), "c", "items[0].kind is 'c'; allowed: a, b"),
        (("items", 0, "kind"), ["a"], "items[0].kind is ['a']; allowed: a, b"),
        (("items", 0, "size"), True, "items[0].size is True; an integer is needed"),
        (("items", 0, "size"), 1.0, "items[0].size is 1.0; an integer is needed"),
        (("items", 0, "size"), 0, "items[0].size is 0; it must be 1 or more"),
        (("items", 1, "share"), 0, "items[1].share is 0; it must be above 0, and at most 1"),
        (("items", 1, "share"), "0.5", "items[1].share is '0.5'; a number is needed"),
        (("items", 1, "share"), 10**400, f"items[1].share is 1{'0' * 78}…; a number is needed"),
        (("pair",), [1], "pair is [1]; a list of 2 is needed"),
        (("pair", 1), None, "pair[1] is None; an integer is needed"),
        (("by_length",), [1], "by_length is [1]; a JSON object is needed"),
        (("by_length", "-3"), 1, "by_length has the key '-3'; its keys must be whole numbers"),
        (("by_length", "512"), "x", "by_length.512 is 'x'; a number is needed"),
        (("seeds", 1), 2**32, "seeds[1] is 4294967296; it must be 0 or more, and below 2^32"),
        (("names", "first"), "z", "names.first is 'z'; allowed: x, y"),
        (("later",), 0, "later is 0; true or false is needed"),
    ],
)
def test_each_fault_of_a_file_is_one_sentence(
    tmp_path: Path, keys: tuple[Any, ...], value: object, sentence: str
) -> None:
    data = json.loads(json.dumps({"kind": "thing", "schema_version": 3, **FILE}))
    place = data
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path = tmp_path / "thing.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError) as caught:
        load_json(File, path, "thing", 3)
    assert str(caught.value) == f"{path}: {sentence}"


def test_defaults_do_not_stand_in_for_what_a_file_lacks() -> None:
    with pytest.raises(UserError, match=r"^the file: key anything is missing$"):
        from_json(File, {key: FILE[key] for key in FILE if key != "anything"}, "the file")
    with pytest.raises(UserError, match=r"^the file: key extra is missing$"):
        from_json(File, FILE, "the file", unread=("extra",))
    with pytest.raises(UserError, match=r"^the file is 3; a JSON object is needed$"):
        from_json(File, 3, "the file")


def test_what_was_made_in_python_is_held_to_the_same_types() -> None:
    check_fields(Item("a", 1, 0.5))
    with pytest.raises(UserError, match=r"^size is -1; it must be 1 or more$"):
        check_fields(Item("a", -1, 0.5))
    with pytest.raises(UserError, match=r"^share is nan; a number is needed$"):
        check_fields(Item("a", 1, float("nan")))


def test_sections_as_overrides_are_read_as_what_they_were() -> None:
    sections = {
        "optim": {"lr": 0.25, "schedule": "on: é"},
        "data": {"paths": ["a", "b,c"], "by": {"x": {"y": None, "z": {}}}},
        "empty": {"is": True},
    }
    assert read_overrides(as_overrides(sections)) == sections
    assert as_overrides({"alone": 1, "none": {}}) == []
    small = as_overrides(
        {"a": {"rate": 3e-05}}
    )  # which YAML takes for text, and its field does not
    assert read_config(Config, None, small).a.rate == 3e-05
