"""Configurations as dataclasses: read from YAML, changed by `a.b=c` overrides, checked by type."""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

from megatron_hydra.errors import UserError
from megatron_hydra.files import expand

PathText = Annotated[str, expand]
"""The type of a field that holds a path: `~` and `$NAME` in it are replaced."""

Config = TypeVar("Config")

_OTHER_BASE = re.compile(r"[-+]?0[0-7_]+$|[^:]+:")


def read_config(
    cls: type[Config],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> Config:
    """Read a YAML file, apply `section.key=value` overrides and check keys and types.

    Args:
        cls: A dataclass whose fields are dataclasses, one a section; their types are the check.
        path: The YAML file; None starts from nothing.
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
    built: Config = _build(cls, raw, where="")
    return built


def _read_yaml(cls: type, path: str | Path) -> dict[str, Any]:
    try:
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold the sections {_names(cls)}")
    return raw


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's safe loader without its surprises: each is refused, and a date is text.

    It takes the last of two like keys, and by YAML 1.1 reads 010 as 8 and 1:30 as 90.
    """

    yaml_implicit_resolvers: typing.ClassVar = {
        first: [item for item in items if item[0] != "tag:yaml.org,2002:timestamp"]
        for first, items in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refusal(
                    key,
                    "braces or brackets stand where a key belongs: a template that is not filled "
                    "in, or quotes are missing",
                )
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise _refusal(key, f"the key {key.value!r} is given twice")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """An integer or a float, as anybody reads it."""
        if _OTHER_BASE.match(node.value):
            raise _refusal(
                node,
                f"{node.value} would be read as a number of base 8 or 60: write it without "
                "a leading zero or colons, or in quotes if it is text",
            )
        is_float = node.tag.endswith("float")
        construct = self.construct_yaml_float if is_float else self.construct_yaml_int
        try:
            number: int | float = construct(node)
        except ValueError as error:  # thousands of digits
            raise _refusal(node, str(error)) from error
        return number


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def _refusal(node: yaml.Node, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, name = key.split(".")
    if not (equals and sections and all((*sections, name))):
        raise UserError(f"override {override!r} must read section.key=value")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(
            f"the value of override {override!r} is not valid YAML: {reason}"
        ) from error
    target = raw
    for section in sections:
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise UserError(f"config section {section} must hold key: value lines")
    target[name] = value


def _build(cls: type, raw: Any, where: str) -> Any:
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise UserError(f"config section {where} must hold key: value lines")
    known = {item.name: item for item in fields(cls)}
    for key in raw:
        if key not in known:
            raise UserError(_unknown_key(cls, str(key), where))
    hints = typing.get_type_hints(cls, include_extras=True)
    values = {}
    for name, item in known.items():
        full_name = f"{where}.{name}" if where else name
        if name in raw:
            values[name] = _convert(hints[name], raw[name], full_name)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise UserError(f"config key {full_name} is missing: it has no default")
    return cls(**values)


def _unknown_key(cls: type, key: str, where: str) -> str:
    full_name = f"{where}.{key}" if where else key
    near = difflib.get_close_matches(key, _name_list(cls), n=1, cutoff=0.5)
    if near:
        nearest = f"{where}.{near[0]}" if where else near[0]
        return f"unknown config key {full_name}: did you mean {nearest}?"
    return f"unknown config key {full_name}; known here: {_names(cls)}"


def _name_list(cls: type) -> list[str]:
    return [item.name for item in fields(cls)]


def _names(cls: type) -> str:
    return ", ".join(_name_list(cls))


def _convert(kind: Any, value: Any, name: str) -> Any:
    origin = typing.get_origin(kind)
    if origin is Annotated:
        kind, convert = typing.get_args(kind)
        return str(convert(_convert(kind, value, name), name))
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__"):
        return _build(kind, value, name)
    if origin in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        return None if value is None else _convert(options[0], value, name)
    if origin is Literal:
        if value not in typing.get_args(kind):
            allowed = ", ".join(str(choice) for choice in typing.get_args(kind))
            raise UserError(f"{name} is {value!r}; allowed: {allowed}")
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{name} is {value!r}; key: value lines are needed")
        kind = typing.get_args(kind)[1]
        return {str(k): _convert(kind, item, f"{name}.{k}") for k, item in value.items()}
    if origin is list:
        if not isinstance(value, list):
            raise UserError(f"{name} is {value!r}; a list is needed")
        return [_convert(typing.get_args(kind)[0], item, name) for item in value]
    return _convert_scalar(kind, value, name)


def _convert_scalar(kind: type, value: Any, name: str) -> Any:
    if kind is float and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-3, without a dot, as text
            number = float(value)
            if math.isfinite(number):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    words = {float: "a number", int: "an integer", bool: "true or false", str: "text"}
    raise UserError(f"{name} is {value!r}; {words[kind]} is needed")
