"""Tests of reading YAML: what is given twice, what is no number, and paths as people write them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_hydra.errors import UserError
from megatron_hydra.yaml_config import PathText, read_config


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
