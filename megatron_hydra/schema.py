"""Configurations and files as dataclasses: read from YAML or JSON, checked by their fields' types.

A field's type says all that it may be: `Literal["a", "b"]`, `int | None`, `tuple[float, ...]`,
another dataclass, or `Annotated[int, Limits(least=1)]`. A YAML file may leave out what has a
default; a JSON file, which a program wrote, has every key but those marked :data:`MAY_LACK`.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from megatron_hydra.errors import UserError
from megatron_hydra.files import expand, read_json

PathText = Annotated[str, expand]
"""The type of a field that holds a path: `~` and `$NAME` in it are replaced."""
MAY_LACK: Mapping[str, Any] = {"may_lack": True}
"""Metadata of a field that JSON files of earlier releases lack; its default is what they meant."""

Config = TypeVar("Config")

_WORDS = {float: "a number", int: "an integer", bool: "true or false", str: "text"}
_LONGEST_SHOWN = 80  # characters of a value in a message


@dataclass(frozen=True)
class Limits:
    """What a number or a text may be, as part of its type; a list's are those of its items.

    Attributes:
        least: It may be this or more.
        above: It is above this.
        most: It may be this or less.
        below: It is below this.
        choices: It is one of these.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()

    def check(self, value: Any, name: str) -> None:
        """Raise a UserError if ``value`` is not allowed; not-a-number is in no range."""
        if self.choices and value not in self.choices:
            raise UserError(_not_among(value, name, self.choices))
        if not (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        ):
            raise UserError(f"{name} is {_shown(value)}; it must be {self.words}")

    @property
    def words(self) -> str:
        """The range as a reader would say it."""
        if self.least is not None and self.most is not None:
            return f"{_figure(self.least)} to {_figure(self.most)}"
        parts = (
            (self.least, "{} or more"),
            (self.above, "above {}"),
            (self.most, "at most {}"),
            (self.below, "below {}"),
        )
        return ", and ".join(text.format(_figure(x)) for x, text in parts if x is not None)


Count = Annotated[int, Limits(least=1)]
"""The type of a field that counts something of which there is one at least."""
Share = Annotated[float, Limits(least=0, most=1)]
"""The type of a field that is a part of a whole."""


@dataclass(frozen=True)
class ReadBy:
    """As part of a field's type: a function of value and name reads it, in place of this file."""

    function: Callable[[Any, str], Any]


def read_config(
    cls: type[Config],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> Config:
    """Read a YAML file, apply `section.key=value` overrides and check keys and values.

    Args:
        cls: A dataclass whose fields are dataclasses, one per section; their types are the check.
        path: The YAML file, which may name another that holds its `defaults`, see
            :func:`~megatron_hydra.yaml_text.read_yaml`; None starts from nothing.
        overrides: Each `section.key=value`; the value is read as YAML.
        values: `section.key` -> value, applied between the file and the overrides.

    Raises:
        UserError: If the file cannot be read, or a key or value is not allowed.
    """
    raw = {} if path is None else _read_yaml(cls, path)
    for key, value in (values or {}).items():
        section, _, name = key.partition(".")
        raw[section] = {**(raw.get(section) or {}), name: value}
    for override in overrides:
        _apply_override(raw, override)
    built: Config = _YAML.build(cls, raw, "")
    return built


def load_json(
    cls: type[Config],
    path: str | os.PathLike[str],
    kind: str,
    schema_version: int,
    unread: Sequence[str] = (),
) -> Config:
    """Read a JSON file that says it is ``kind`` of ``schema_version``; see :func:`from_json`.

    Raises:
        UserError: If the file cannot be read, is of another kind or version, or a key or value is
            not allowed; names the file.
    """
    data = read_json(path, kind, schema_version)
    return from_json(cls, data, os.fspath(path), ("schema_version", "kind", *unread))


def from_json(cls: type[Config], data: Any, where: str, unread: Sequence[str] = ()) -> Config:
    """Build a dataclass of JSON values, checked by the types of its fields.

    Args:
        cls: The dataclass.
        data: What :func:`~dataclasses.asdict`, and JSON after it, made of one.
        where: What the data are, for messages: a file, or `the budget in the head plan`.
        unread: Keys that stand beside the fields and are not read.

    Raises:
        UserError: If a key is unknown or missing, or a value is not allowed; starts with ``where``.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where} is {_shown(data)}; a JSON object is needed")
    with named(where):
        for key in unread:
            if key not in data:
                raise UserError(f"key {key} is missing")
        rest = {key: value for key, value in data.items() if key not in unread}
        built: Config = _JSON.build(cls, rest, "")
        return built


@contextmanager
def named(where: str) -> Iterator[None]:
    """Put ``where`` before the sentence of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def check_fields(made: Any, cls: type | None = None) -> None:
    """Check the fields of a dataclass that was made in Python as if it were read from JSON.

    Args:
        made: The dataclass.
        cls: The class whose fields are checked, if not all of them.

    Raises:
        UserError: On the first value that its field's type does not allow.
    """
    for name, kind in _hints(cls or type(made)).items():
        _JSON.convert(kind, getattr(made, name), name)


@dataclass(frozen=True)
class _Reader:
    """Values of one format to Python's: YAML is written by people, JSON by programs.

    A class's `FORMER_KEYS` are keys that earlier releases wrote, and that nothing reads any more.
    """

    key: str
    mapping: str
    is_yaml: bool

    def build(self, cls: type, raw: Any, where: str) -> Any:
        if raw is None and self.is_yaml:
            raw = {}
        if not isinstance(raw, Mapping):
            raise UserError(f"{where} is {_shown(raw)}; {self.mapping} needed")
        hints, former = _hints(cls), getattr(cls, "FORMER_KEYS", ())
        for key in raw:
            if key not in hints and key not in former:
                raise UserError(self._unknown_key(list(hints), str(key), where))
        values = {}
        for item in fields(cls):
            name = f"{where}.{item.name}" if where else item.name
            if item.name in raw:
                values[item.name] = self.convert(hints[item.name], raw[item.name], name)
            elif not self._may_lack(item):
                raise UserError(f"{self.key} {name} is missing")
        return cls(**values)

    def _may_lack(self, item: Field[Any]) -> bool:
        if self.is_yaml:
            return item.default is not MISSING or item.default_factory is not MISSING
        return "may_lack" in item.metadata

    def _unknown_key(self, known: list[str], key: str, where: str) -> str:
        above, key = f"{where}." if where else "", key if key.isprintable() else repr(key)
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        if near:
            return f"unknown {self.key} {above}{key}: did you mean {above}{near[0]}?"
        return f"unknown {self.key} {above}{key}; known here: {', '.join(known)}"

    def convert(self, kind: Any, value: Any, name: str) -> Any:
        """The value as its type has it, checked."""
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is Annotated:
            return self._annotated(arguments, value, name)
        if isinstance(kind, type) and is_dataclass(kind):
            if isinstance(value, kind):  # made in Python
                return value
            return self.build(kind, value, name)
        if origin in (typing.Union, types.UnionType):
            (kind,) = (option for option in arguments if option is not type(None))
            return None if value is None else self.convert(kind, value, name)
        if origin is Literal:
            if not any(value == one and type(value) is type(one) for one in arguments):
                raise UserError(_not_among(value, name, arguments))
            return value
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return self._mapping(arguments, value, name)
        if isinstance(origin, type) and issubclass(origin, Sequence):
            return self._sequence(origin, arguments, value, name)
        return value if kind is Any else self._scalar(kind, value, name)

    def _annotated(self, arguments: tuple[Any, ...], value: Any, name: str) -> Any:
        kind, rule = arguments
        if isinstance(rule, ReadBy):
            return rule.function(value, name)
        value = self.convert(kind, value, name)
        if isinstance(rule, Limits):
            rule.check(value, name)
            return value
        return str(rule(value, name))

    def _mapping(self, kinds: tuple[Any, ...], value: Any, name: str) -> dict[Any, Any]:
        key_kind, kind = kinds
        if not isinstance(value, Mapping):
            raise UserError(f"{name} is {_shown(value)}; {self.mapping} needed")
        found: dict[Any, Any] = {}
        for key, item in value.items():
            text = str(key)
            if key_kind is int and not (text.isascii() and text.isdigit()):
                raise UserError(f"{name} has the key {text!r}; its keys must be whole numbers")
            found[key_kind(text)] = self.convert(kind, item, f"{name}.{text}")
        return found

    def _sequence(self, origin: type, kinds: tuple[Any, ...], value: Any, name: str) -> Any:
        if not isinstance(value, list | tuple):
            raise UserError(f"{name} is {_shown(value)}; a list is needed")
        if len(kinds) > 1 and kinds[1] is not Ellipsis:
            if len(value) != len(kinds):
                raise UserError(f"{name} is {_shown(value)}; a list of {len(kinds)} is needed")
        else:
            kinds = (kinds[0],) * len(value)
        found = [
            self.convert(kind, item, f"{name}[{index}]")
            for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
        ]
        return tuple(found) if origin is tuple else found

    def _scalar(self, kind: type, value: Any, name: str) -> Any:
        if kind is float and not isinstance(value, bool):
            try:  # YAML 1.1 reads 1e-3, without a dot, as text
                if self.is_yaml and math.isfinite(float(value)):
                    return float(value)
                if isinstance(value, int | float) and math.isfinite(float(value)):
                    return value
            except (TypeError, ValueError, OverflowError):
                pass
        elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
        raise UserError(f"{name} is {_shown(value)}; {_WORDS[kind]} is needed")


_YAML = _Reader("config key", "key: value lines are", is_yaml=True)
_JSON = _Reader("key", "a JSON object is", is_yaml=False)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields, in their order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {item.name: hints[item.name] for item in fields(cls)}


def _not_among(value: Any, name: str, choices: Sequence[Any]) -> str:
    return f"{name} is {_shown(value)}; allowed: {', '.join(map(str, choices))}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 1]}…"


def _figure(value: float) -> str:
    """A limit as people write it: 2^31, 1e30."""
    if isinstance(value, int) and value >= 2**20 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return f"{value:g}".replace("e+", "e")


def _read_yaml(cls: type, path: str | Path) -> dict[str, Any]:
    from megatron_hydra.yaml_text import read_yaml

    return read_yaml(path, list(_hints(cls)))


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The nested sections of `section.key=value` overrides; values are YAML, the last one counts.

    Raises:
        UserError: For an override of another form.
    """
    raw: dict[str, Any] = {}
    for override in overrides:
        _apply_override(raw, override)
    return raw


def flat(options: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Nested sections as `section.key` and value; an empty section is a value."""
    for key, value in options.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def as_overrides(options: Mapping[str, Any]) -> list[str]:
    """Nested sections as `section.key=value`; keys that stand in no section are left out."""
    return [
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in flat(options)
        if "." in key
    ]


def _apply_override(raw: dict[str, Any], override: str) -> None:
    from megatron_hydra.yaml_text import parse_yaml

    if len(override) > 1 and override[0] == override[-1] == "'":
        # NeMo-Run's local executor quotes as for a shell, and uses none.
        override = override[1:-1]
    key, equals, text = override.partition("=")
    *sections, name = key.split(".")
    if not (equals and sections and all((*sections, name))):
        raise UserError(f"override {override!r} must read section.key=value")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        reason = getattr(error.__cause__, "problem", None) or error
        raise UserError(
            f"the value of override {override!r} is not valid YAML: {reason}"
        ) from error
    target = raw
    for section in sections:
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise UserError(f"{section} in override {override!r} is no section")
    target[name] = value
