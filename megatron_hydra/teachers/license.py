"""What a teacher's folder says of its licence, and how that is said of what is made from it."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_hydra.errors import UserError
from megatron_hydra.schema import from_json

logger = logging.getLogger(__name__)

_FILE_NAMES = re.compile(r"(licen[cs]e|copying)([_-][\w-]+)?(\.(txt|md))?", re.IGNORECASE)
_FRONT_MATTER = re.compile(r"---\s*\n(.*?\n)---\s*(\n|$)", re.DOTALL)
_LONGEST_LINE = 120  # characters


@dataclass(frozen=True)
class License:
    """A folder's own words; what it does not say is empty.

    Attributes:
        ids: `license` in the front matter of README.md: the hub's word, such as `apache-2.0`.
        name: Its `license_name`, which goes with `other`.
        link: Its `license_link`.
        file: Name of the file that has the text.
        first_line: Of that file.
    """

    ids: tuple[str, ...]
    name: str
    link: str
    file: str
    first_line: str

    @property
    def front_matter(self) -> str:
        """The lines of a model card's YAML header, each ended; none without the hub's word."""
        if not self.ids:
            return ""
        values = {
            "license": self.ids[0] if len(self.ids) == 1 else list(self.ids),
            "license_name": self.name,
            "license_link": self.link if "://" in self.link else "",  # no file of this folder
        }
        # JSON's texts and lists are YAML's too, whatever is in them.
        return "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items() if value)

    @property
    def sentence(self) -> str:
        """For people."""
        said = []
        if self.ids:
            beside = ", ".join(filter(None, (self.name, self.link)))
            said.append(f"README.md says `{', '.join(self.ids)}`" + (beside and f" ({beside})"))
        if self.file:
            said.append(f'{self.file} begins "{self.first_line}"')
        if not said:
            return "The teacher's folder states no licence."
        return f"Of the teacher's folder {' and '.join(said)}."


def license_of(meta: Mapping[str, Any], where: str) -> License | None:
    """What a checkpoint's model.json has of its teacher's; None if unknown.

    Raises:
        UserError: If a key or value is not allowed; names `where`.
    """
    found = meta.get("teacher_license")
    return None if found is None else from_json(License, found, f"the teacher_license in {where}")


def read_license(folder: str | os.PathLike[str]) -> License | None:
    """What a Hugging Face folder says of its licence; None if what may say it is no YAML.

    Raises:
        UserError: If a file that would say it cannot be read.
    """
    folder = Path(folder)
    header = _front_matter(folder / "README.md")
    found = (header or {}).get("license") or []
    ids = tuple(map(str, found if isinstance(found, list) else [found]))
    name, link = (str((header or {}).get(key) or "") for key in ("license_name", "license_link"))
    files = sorted(
        path for path in folder.iterdir() if _FILE_NAMES.fullmatch(path.name) and path.is_file()
    )
    for path in files:
        if lines := [line.strip() for line in _text(path).splitlines() if line.strip()]:
            return License(ids, name, link, path.name, lines[0][:_LONGEST_LINE])
    return None if header is None else License(ids, name, link, "", "")


def _front_matter(path: Path) -> Mapping[str, Any] | None:
    match = _FRONT_MATTER.match(_text(path)) if path.is_file() else None
    if match is None:
        return {}
    try:
        found = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError) as error:  # the latter of a date that is none
        logger.warning(
            "%s: its front matter, which may name a licence, is no YAML: %s",
            path,
            " ".join(str(error).split()),
        )
        return None
    return found if isinstance(found, Mapping) else {}


def _text(path: Path) -> str:
    """Of a file that people wrote, in whatever encoding."""
    try:
        return path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
