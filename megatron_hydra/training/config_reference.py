"""The page of all keys of a training's YAML, made from the dataclasses that read it.

`python -m megatron_hydra.training.config_reference > docs/configuration.md` makes it anew. A key's
meaning stands in one place, the string below its field.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_hydra.model import options
from megatron_hydra.schema import Limits
from megatron_hydra.training.config import MAY_CHANGE, RunConfig

_HEAD = """\
# Configuration of a training
Every key of the YAML file of `megatron-hydra train --config`, section by section.
`section.key=value` on the command line changes single values; a file may name another as its
`defaults` (see [files](files.md#yaml-files)). `megatron-hydra train --config FILE --print-config`
prints what results, every default spelled out, and ends.

A key marked with * may be changed when a run goes on. All others are held to what it began with:
of data, teacher and first weights the contents, wherever they lie.

This page is made from `megatron_hydra/training/config.py`, and a test holds it to that file.
"""
# Where `model` changes the model's own fields, their meaning is told there.
_MODEL_FIELDS = Path(options.__file__), "HydraFields"
_WORDS = {int: "integer", float: "number", bool: "`true` or `false`", str: "text"}


def config_reference() -> str:
    """The page as Markdown: a table per section of :class:`RunConfig`.

    Raises:
        ValueError: If a key has no meaning.
    """
    sections = typing.get_type_hints(RunConfig)
    return "\n".join(
        [_HEAD, *(_section(item.name, sections[item.name]) for item in fields(RunConfig))]
    )


def _section(name: str, cls: type) -> str:
    inherited = meanings(*_MODEL_FIELDS) if name == "model" else {}
    own = meanings(Path(inspect.getfile(cls)), cls.__name__)
    hints = typing.get_type_hints(cls, include_extras=True)
    rows = []
    for item in fields(cls):
        told = [found.get(item.name, "") for found in (inherited, own)]
        told.append(item.metadata.get("none", ""))
        if not any(told):
            raise ValueError(f"{cls.__name__}.{item.name} has no string below it that explains it")
        changes = {name, f"{name}.{item.name}"} & set(MAY_CHANGE)
        cells = (
            f"`{item.name}`" + "*" * bool(changes),
            _values(hints[item.name]),
            _default(item),
            _in_yaml(" ".join(filter(None, told))),
        )
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    head = "| key | values | default | meaning |\n|---|---|---|---|"
    return (
        f"## {name}\n{_in_yaml(_one_line(cls.__doc__ or ''))}\n\n{head}\n" + "\n".join(rows) + "\n"
    )


def meanings(file: Path, class_name: str) -> dict[str, str]:
    """What the strings below a dataclass's fields say, by field, each on one line.

    Args:
        file: The Python file that holds the class.
        class_name: Its name there.
    """
    module = ast.parse(file.read_text(encoding="utf-8"))
    (cls,) = (
        node for node in module.body if isinstance(node, ast.ClassDef) and node.name == class_name
    )
    return dict(_strings_below_fields(cls))


def _strings_below_fields(cls: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for item, below in zip(cls.body, cls.body[1:], strict=False):
        if (
            isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            yield item.target.id, _one_line(below.value.value)


def _values(kind: Any) -> str:
    """What a field may hold, in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        inner, rule = arguments
        return f"{_values(inner)}, {rule.words}" if isinstance(rule, Limits) else "path"
    if origin in (typing.Union, types.UnionType):
        (inner,) = (option for option in arguments if option is not type(None))
        return f"{_values(inner)}, or null"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"list of: {_values(arguments[0])}"
    return _WORDS[kind]


def _default(item: Field[Any]) -> str:
    if item.default_factory is not MISSING:
        return f"`{json.dumps(item.default_factory())}`"
    if item.default is MISSING:
        return "must be given"
    value = item.default
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _in_yaml(text: str) -> str:
    return re.sub(r"\bNone\b", "null", text)


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.stdout.write(config_reference())
