"""The Python files of the repository, and what each of them imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE_FOLDERS = ("megatron_hydra", "kernels", "tools", "tests", "examples")
PACKAGE = "megatron_hydra/__init__.py"


@dataclass(frozen=True)
class Import:
    """One imported module."""

    module: str  # dotted, absolute
    line: int
    at_module_level: bool

    @property
    def package(self) -> str:
        return self.module.split(".")[0]


@dataclass(frozen=True)
class SourceFile:
    """A Python file of the repository and what it imports."""

    path: str  # relative to the root, with forward slashes
    imports: tuple[Import, ...]

    @property
    def is_test(self) -> bool:
        return self.path.startswith("tests/")

    @property
    def part(self) -> str | None:
        """The part of megatron_hydra that the file belongs to."""
        parts = Path(self.path).parts
        is_part = parts[0] == "megatron_hydra" and parts[1] != "__init__.py"
        return parts[1].removesuffix(".py") if is_part else None


def find_imports(tree: ast.AST, package: str, top: bool = True) -> Iterator[Import]:
    """Imports of a file in ``package``; those for type checkers alone are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            for alias in node.names:  # the name may be a module: megatron_hydra import cpu
                yield Import(f"{base}.{alias.name}", node.lineno, top)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from find_imports(ast.Module(node.orelse, []), package, top)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from find_imports(node, package, top and not inside)


def read(path: Path) -> SourceFile:
    relative = path.relative_to(ROOT)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return SourceFile(relative.as_posix(), tuple(find_imports(tree, ".".join(relative.parts[:-1]))))


def source_files() -> list[SourceFile]:
    """All of them, in order."""
    found = [read(p) for folder in SOURCE_FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]
    assert len(found) > 20, "the walk must see the repository"
    return found


def library(files: list[SourceFile]) -> list[SourceFile]:
    return [file for file in files if not file.is_test]
