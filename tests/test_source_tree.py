"""Tests that hold the shape of the source tree: files, rooms, and what each alone knows."""

from __future__ import annotations

import ast
import re
from collections import Counter

import pytest
from kit.source_files import PACKAGE, ROOT, SourceFile, library, source_files

from megatron_hydra.model.mixers.costs import LA_KINDS

MAX_LINES = 400


@pytest.fixture(scope="module")
def files() -> list[SourceFile]:
    return source_files()


def test_a_kind_of_head_is_known_by_name_in_its_own_files_alone(files: list[SourceFile]) -> None:
    """Full attention apart: plans name it. Exported code stands alone, with a list of its own; a
    teacher's config.json has a key that is called as a kind is."""
    own = ("megatron_hydra/model/mixers/", "megatron_hydra/export/configuration_hydra.py",
           "megatron_hydra/export/mixers_hydra.py", "megatron_hydra/teachers/config_json.py",
    )  # fmt: skip
    found: dict[str, set[str]] = {kind: set() for kind in LA_KINDS}
    for file in library(files):
        tree = ast.parse((ROOT / file.path).read_text(encoding="utf-8"))
        texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in found and id(node) not in texts:
                found[node.value].add(file.path)
    wrong = {kind: [p for p in paths if not p.startswith(own)] for kind, paths in found.items()}
    assert all(found.values()) and not any(wrong.values()), wrong


@pytest.mark.parametrize("folder", ["kernels", "tools", "tests", "examples"])
def test_folders_of_packages_are_no_packages(folder: str) -> None:
    """A top-level package named ``kernels`` would shadow Hugging Face's."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_files_are_short_and_say_what_they_own(files: list[SourceFile]) -> None:
    wrong = []
    for file in files:
        text = (ROOT / file.path).read_text(encoding="utf-8")
        if len(text.splitlines()) >= MAX_LINES:
            wrong.append(f"{file.path}: {len(text.splitlines())} lines")
        if text and not text.startswith('"""'):
            wrong.append(f"{file.path}: the first line must say what the file owns")
    assert not wrong, wrong


def test_every_room_says_what_it_owns_and_what_it_does_not(files: list[SourceFile]) -> None:
    """In two sentences or more; of an operator's folder its api says it."""
    rooms = [file.path for file in library(files) if file.path.endswith("/__init__.py")]
    rooms.remove(PACKAGE)  # what the command says of itself
    for room in rooms:
        if room.startswith("kernels/") and room != "kernels/hydra_kernels/__init__.py":
            continue
        text = ast.get_docstring(ast.parse((ROOT / room).read_text(encoding="utf-8"))) or ""
        assert len(re.findall(r"\.(?=\s|$)", text)) > 1, room


def test_every_test_file_has_a_name_of_its_own() -> None:
    """Folders of tests are no packages: pytest would take two files of one name for the same."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, number in names.items() if number > 1]
