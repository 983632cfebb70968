"""The page of a training's keys is what the dataclasses say now.

Catches: a key, value, default or meaning that was changed without the page, and a key that nobody
has explained.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from megatron_hydra.model.options import HydraFields
from megatron_hydra.training.config import RunConfig
from megatron_hydra.training.config_reference import _MODEL_FIELDS, config_reference, meanings

PAGE = Path(__file__).parents[2] / "docs/configuration.md"
COMMAND = "python -m megatron_hydra.training.config_reference > docs/configuration.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == config_reference(), f"make it anew: {COMMAND}"


def test_the_page_has_every_key_once_and_no_empty_cell() -> None:
    found = []
    for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        section = part.partition("\n")[0]
        for row in re.findall(r"^\| `.*$", part, re.M):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
            assert len(cells) == 4 and all(cells), row
            found.append(f"{section}.{cells[0].strip('`*')}")
    sections = get_type_hints(RunConfig)
    assert found == [f"{name}.{item.name}" for name in sections for item in fields(sections[name])]


def test_the_page_tells_ranges_choices_and_what_may_change() -> None:
    """By hand, so that a page and a generator that are wrong together are noticed."""
    rows = re.findall(r"^\| (`.*?) \| (.*?) \| (.*?) \|", PAGE.read_text(encoding="utf-8"), re.M)
    for row in (
        ("`paths`", "list of: path", "must be given"),
        ("`kl`", "`forward`, `reverse`, `jsd`", "`forward`"),
        ("`timeout_minutes`*", "number, above 0, and at most 1440", "`30.0`"),
        ("`recompute_layers`*", "integer, 1 or more, and below 2^31, or null", "`null`"),
        ("`async_save`*", "`true` or `false`", "`false`"),
    ):
        assert row in rows


def test_the_models_fields_are_read_from_the_class_that_has_them() -> None:
    told = meanings(*_MODEL_FIELDS)
    assert len(told) > 10 and set(told) <= {item.name for item in fields(HydraFields)}
