"""The report's templates: how they are read, and how they write figures. All text is escaped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from megatron_hydra.evaluation.results import format_perplexity
from megatron_hydra.report import units
from megatron_hydra.selection.cost import state_format

_TASK_NAMES = {
    "single": "Single needle",
    "multi_key": "Multi-key needle",
    **{f"niah_single_{n}": f"Single needle S{n}" for n in (1, 2, 3)},
    **{f"niah_multikey_{n}": f"Multi-key needle MK{n}" for n in (1, 2, 3)},
    "niah_multivalue": "Multi-value needle MV",
    "niah_multiquery": "Multi-query needle MQ",
    "vt": "Variable tracking VT",
    "cwe": "Common words CWE",
    "fwe": "Frequent words FWE",
}


def render(template: str, values: Mapping[str, Any]) -> str:
    """A template of this package filled with ``values``, as HTML.

    Raises:
        jinja2.UndefinedError: If the template reads a value that is not there.
    """
    return _environment().get_template(template).render(values)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=units.format_bytes,
        count="{:,}".format,
        flops=units.format_flops,
        large=units.format_large,
        percent=_percent,
        perplexity=format_perplexity,
        state_format=state_format,
        task=_task_name,
        time=units.format_time,
    )
    return environment


def _percent(share: float, digits: int = 1) -> str:
    """``94.0`` for 0.94: the sign is the template's."""
    return f"{100 * share:.{digits}f}"


def _task_name(task: str) -> str:
    return _TASK_NAMES.get(task, task.replace("_", " ").capitalize())
