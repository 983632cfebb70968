"""YAML files and text as Python's values, without the surprises of YAML 1.1."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_hydra.errors import UserError
from megatron_hydra.files import expand

DEFAULTS = "defaults"
_OTHER_BASE = re.compile(r"[-+]?0[0-7_]+$|[^:]+:")


def read_yaml(
    path: str | Path, sections: Sequence[str], above: Sequence[Path] = (), said_by: str = ""
) -> dict[str, Any]:
    """A file's sections, with those of the file that it names as its `defaults`.

    `defaults: ../other/stage1.yaml`, a path from this file's folder, stands beside the sections.
    The keys of that file, which may have defaults of its own, count where this one does not say
    otherwise: mappings are joined key by key, all else is replaced.

    Args:
        path: The file.
        sections: That it may have, for messages.
        above: Files that led here.
        said_by: What named the file, for messages.

    Raises:
        UserError: If a file cannot be read, is no YAML, holds no sections, or leads back to itself.
    """
    path, place = Path(path), Path(path).resolve()
    if place in above:
        raise UserError(f"{said_by}{path} leads back to itself")
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{said_by}cannot read the config {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold the sections {', '.join(sections)}")
    if DEFAULTS not in raw:
        return raw
    named = raw.pop(DEFAULTS)
    if not isinstance(named, str):
        raise UserError(f"{DEFAULTS} in {path} is {named!r}; the path of a config is needed")
    said_by = f"{DEFAULTS} in {path}: "
    defaults = path.parent / expand(named, said_by.removesuffix(": "))
    return _joined(read_yaml(defaults, sections, (*above, place), said_by), raw)


def _joined(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A section that is left empty changes nothing."""
    joined = dict(defaults)
    for key, value in own.items():
        below = joined.get(key)
        if isinstance(below, Mapping) and (value is None or isinstance(value, Mapping)):
            joined[key] = _joined(below, value or {})
        else:
            joined[key] = value
    return joined


def parse_yaml(text: str) -> Any:
    """Read YAML text.

    Raises:
        ValueError: In one line, for text that is no YAML or that people and YAML 1.1 read unlike.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


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
