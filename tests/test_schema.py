"""Tests of reading YAML: what is given twice, what is no number, and paths as people write them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_hydra.errors import UserError
from megatron_hydra.schema import PathText, read_config


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
        ("a: {place: ''}\n", r"a\.place is empty: name a path; the current folder is \."),
        ("a: {places: [x, ' ']}\n", r"a\.places is empty: name a path"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(file: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(file, text)
