"""Tests that hold the architecture: who may import whom, and the shape of the source tree."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_hydra.model.mixers.costs import LA_KINDS

ROOT = Path(__file__).parents[1]
SOURCE_FOLDERS = ("megatron_hydra", "kernels", "tools", "tests", "examples")

# What each part of megatron_hydra imports of the others, and nothing else: nothing points up, and a
# line that no import uses any more is taken out.
ALLOWED_PARTS: dict[str, set[str]] = {
    "errors": set(),
    "disk": {"errors"},
    "files": {"disk", "errors"},
    "provenance": {"files"},
    "unfinished": {"errors", "files", "schema"},
    "yaml_text": {"errors", "files"},
    "schema": {"errors", "files", "yaml_text"},
    "head_plan": {"errors", "files", "schema"},
    "cpu": set(),
    "processes": set(),
    "progress": set(),
    "parallel": {"errors"},
    "model": {"errors", "head_plan", "schema"},
    "teachers": {
        "errors", "files", "head_plan", "parallel", "processes", "progress", "schema", "model",
        "unfinished",
    },
    "tasks": {"errors"},
    "transfer": {"errors", "model"},
    "selection": {
        "errors", "files", "head_plan", "parallel", "progress", "schema", "model", "tasks",
        "unfinished",
    },
    "training": {
        "disk", "errors", "files", "head_plan", "schema", "model", "teachers", "tasks", "transfer",
        "selection",
    },
    "nemo": {
        "disk", "errors", "head_plan", "model", "provenance", "teachers", "tasks", "transfer",
        "selection", "training",
    },
    "evaluation": {
        "errors", "files", "head_plan", "progress", "schema", "model", "teachers", "tasks",
        "transfer", "selection", "unfinished",
    },
    "export": {"errors", "files", "head_plan", "progress", "model", "teachers", "unfinished"},
    "certify": {
        "errors", "files", "head_plan", "parallel", "schema", "model", "teachers", "export",
    },
    "api": {
        "cpu", "disk", "errors", "files", "head_plan", "parallel", "model", "teachers", "tasks",
        "selection", "evaluation", "report", "schema", "training", "nemo", "processes", "progress",
        "provenance", "certify", "export",
    },
    "report": {"errors", "files", "head_plan", "selection", "evaluation"},
    "study": {
        "errors", "files", "head_plan", "processes", "progress", "provenance", "schema", "teachers",
        "tasks", "selection", "training", "evaluation", "export", "report", "api",
    },
}  # fmt: skip
STANDARD_LIBRARY_ONLY = (
    "errors.py",
    "disk.py",
    "files.py",
    "schema.py",
    "head_plan.py",
    "model/__init__.py",
    "model/mixers/__init__.py",
    "model/mixers/costs.py",
    "model/options.py",
    "model/placement.py",
    "model/parallel_sizes.py",
)
# Scores and plans are read, combined, planned and compared where PyTorch is not installed: these
# files of selection import one another, the foundation and numerics, and nothing else.
PLANNING = (
    "combination",
    "scores",
    "uncertainty",
    "cost",
    "shape",
    "budget",
    "optimiser",
    "explanation",
    "windows",
    "policy",
    "pareto",
    "comparison",
)
NUMERICS = {"numpy", "scipy"}
# Third-party packages and the only places that may import them.
CONFINED = {
    "nemo": (
        "megatron_hydra/nemo/",
        "tools/benchmarks/training_step.py",  # as a peer
    ),
    "lightning": ("megatron_hydra/nemo/",),
    "pytorch_lightning": ("megatron_hydra/nemo/",),
    "transformers": (
        "megatron_hydra/teachers/",
        "megatron_hydra/export/",
        "tools/",
        "examples/quickstart/make_teacher.py",
    ),
}
NEVER_AT_MODULE_LEVEL = {"flash_attn", "apex", "transformer_engine", "fla", "flash_qla"}
MAX_LINES = 400


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


@pytest.fixture(scope="module")
def files() -> list[SourceFile]:
    found = [read(p) for folder in SOURCE_FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]
    assert len(found) > 20, "the walk must see the repository"
    return found


def library(files: list[SourceFile]) -> list[SourceFile]:
    return [file for file in files if not file.is_test]


def test_the_walk_sees_every_kind_of_import() -> None:
    source = """
import a.b
from c import d
from . import e
from ..f import g
if TYPE_CHECKING:
    import hidden
else:
    import h
try:
    import i
except ImportError:
    pass
class K:
    import j
def function():
    import k
"""
    found = list(find_imports(ast.parse(source), "pack.sub"))
    modules = ["a.b", "c.d", "pack.sub.e", "pack.f.g", "h", "i", "j", "k"]
    assert [item.module for item in found] == modules
    assert [item.module for item in found if not item.at_module_level] == ["k"]


def test_parts_import_what_stands_below_them_alone(files: list[SourceFile]) -> None:
    wrong, unused = [], {part: set(allowed) for part, allowed in ALLOWED_PARTS.items()}
    for file in library(files):
        if file.part is None:
            continue
        assert file.part in ALLOWED_PARTS, f"{file.path}: say here what {file.part} may import"
        for item in file.imports:
            if item.package in ("hydra_tools", "tests"):
                wrong.append(f"{file.path}:{item.line} {item.module}")
            if item.module in ("megatron_hydra", "megatron_hydra.__version__"):
                continue
            part = item.module.split(".")[1] if item.package == "megatron_hydra" else file.part
            unused[file.part].discard(part)
            if part not in ALLOWED_PARTS[file.part] | {file.part}:
                wrong.append(f"{file.path}:{item.line} {item.module}")
    assert not wrong, wrong
    assert not any(unused.values()), unused


def test_foundation_needs_the_standard_library_only(files: list[SourceFile]) -> None:
    allowed = sys.stdlib_module_names | {"megatron_hydra"}
    by_path = {file.path: file for file in files}
    for name in STANDARD_LIBRARY_ONLY:
        packages = {item.package for item in by_path[f"megatron_hydra/{name}"].imports}
        assert packages <= allowed, f"{name} imports {packages - allowed}"


def test_planning_needs_no_pytorch(files: list[SourceFile]) -> None:
    own = [f"megatron_hydra.{name[:-3].replace('/', '.')}" for name in STANDARD_LIBRARY_ONLY]
    own += [f"megatron_hydra.selection.{name}" for name in PLANNING]
    paths = {f"megatron_hydra/selection/{name}.py" for name in PLANNING}
    assert paths <= {file.path for file in files}
    wrong = [
        f"{file.path}:{item.line} {item.module}"
        for file in files
        if file.path in paths
        for item in file.imports
        if item.package not in sys.stdlib_module_names | NUMERICS
        and not {item.module, item.module.rpartition(".")[0]} & set(own)
    ]
    assert not wrong, wrong


def test_confined_packages_stay_where_they_belong(files: list[SourceFile]) -> None:
    wrong = [
        f"{file.path}:{item.line} {item.module}"
        for file in library(files)
        for item in file.imports
        if item.package in CONFINED and not file.path.startswith(CONFINED[item.package])
    ]
    assert not wrong, wrong


def test_kernels_know_nothing_of_megatron(files: list[SourceFile]) -> None:
    forbidden = {"megatron", "megatron_hydra", "hydra_tools", "nemo", "lightning", "transformers"}
    wrong = [
        f"{file.path}:{item.line} {item.module}"
        for file in files
        if file.path.startswith("kernels/hydra_kernels/")
        for item in file.imports
        if item.package in forbidden
    ]
    assert not wrong, wrong


def test_optional_gpu_packages_are_imported_where_they_are_used(files: list[SourceFile]) -> None:
    wrong = [
        f"{file.path}:{item.line} {item.module}"
        for file in files
        for item in file.imports
        if item.package in NEVER_AT_MODULE_LEVEL and item.at_module_level
    ]
    assert not wrong, wrong


def test_verbs_import_no_verbs(files: list[SourceFile]) -> None:
    from hydra_tools.cli import VERBS

    wrong = [
        f"{file.path}:{item.line} {item.module}"
        for file in files
        if file.path.startswith("tools/hydra_tools/") and Path(file.path).stem != "cli"
        for item in file.imports
        if item.package == "hydra_tools" and set(item.module.split(".")) & {*VERBS}
    ]
    assert not wrong, wrong


def test_fixtures_and_benchmarks_stay_out_of_the_library(files: list[SourceFile]) -> None:
    benchmarks = {Path(file.path).stem for file in files if "/benchmarks/" in file.path}
    wrong = [
        f"{file.path}:{item.line} {item.module}"
        for file in library(files)
        if "/benchmarks/" not in file.path
        for item in file.imports
        if item.package in {"kit", *benchmarks}
    ]
    assert not wrong, wrong


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


def test_importing_the_package_does_not_import_megatron(files: list[SourceFile]) -> None:
    """The CPU module must be installed before megatron is imported."""
    (init,) = (file for file in files if file.path == "megatron_hydra/__init__.py")
    assert init.imports == ()


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
    rooms.remove("megatron_hydra/__init__.py")  # what the command says of itself
    for room in rooms:
        if room.startswith("kernels/") and room != "kernels/hydra_kernels/__init__.py":
            continue
        text = ast.get_docstring(ast.parse((ROOT / room).read_text(encoding="utf-8"))) or ""
        assert len(re.findall(r"\.(?=\s|$)", text)) > 1, room


def test_every_test_file_has_a_name_of_its_own() -> None:
    """Folders of tests are no packages: pytest would take two files of one name for the same."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, number in names.items() if number > 1]
