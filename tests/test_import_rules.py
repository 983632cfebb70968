"""Tests that hold the architecture: who may import whom."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from kit.source_files import PACKAGE, SourceFile, find_imports, library, source_files

# What each part of megatron_hydra imports of the others, and nothing else: nothing points up, and a
# line that no import uses any more is taken out.
ALLOWED_PARTS: dict[str, set[str]] = {
    "errors": set(),
    "disk": {"errors"},
    "files": {"disk", "errors"},
    "provenance": {"files"},
    "unfinished": {"disk", "errors", "files", "schema"},
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
        "provenance", "certify", "export", "unfinished",
    },
    "report": {"errors", "files", "head_plan", "selection", "evaluation"},
    "study": {
        "errors", "files", "head_plan", "processes", "progress", "provenance", "schema", "teachers",
        "tasks", "selection", "training", "evaluation", "export", "report", "api",
    },
}  # fmt: skip
# The same of what stands outside of megatron_hydra, folder by folder, other packages counted in.
ALLOWED_OUTSIDE: dict[str, set[str]] = {
    "kernels/hydra_kernels": set(),
    "kernels/hydra_kernels/device": {"triton"},
    "kernels/hydra_kernels/gradients": set(),
    "kernels/hydra_kernels/measure": {"torch", "triton"},
    "kernels/hydra_kernels/packed": {"torch"},
    "kernels/hydra_kernels/warm_up": {
        "hydra_kernels.gated_delta_rule", "hydra_kernels.head_fusion",
        "hydra_kernels.la_preparation", "torch",
    },
    "kernels/hydra_kernels/gated_delta_rule": {
        "fla", "flash_qla", "hydra_kernels.device", "hydra_kernels.packed", "torch",
    },
    "kernels/hydra_kernels/head_fusion": {
        "hydra_kernels.device", "hydra_kernels.gradients", "torch", "triton",
    },
    "kernels/hydra_kernels/la_preparation": {
        "hydra_kernels.device", "hydra_kernels.gradients", "hydra_kernels.packed", "torch",
        "triton",
    },
    "kernels/hydra_kernels/linear_kl": {
        "hydra_kernels.device", "hydra_kernels.loss_options", "torch", "triton",
    },
    "kernels/hydra_kernels/window_attention": {"hydra_kernels.packed", "torch"},
    "kernels/benchmarks": {
        "fla", "hydra_kernels.head_fusion", "hydra_kernels.la_preparation",
        "hydra_kernels.linear_kl", "hydra_kernels.measure", "liger_kernel", "megatron", "torch",
        "transformer_engine",
    },
    "tools/hydra_tools": {
        "hydra_kernels.gated_delta_rule", "hydra_kernels.warm_up", "megatron_hydra",
        "megatron_hydra.api", "megatron_hydra.certify", "megatron_hydra.cpu",
        "megatron_hydra.errors", "megatron_hydra.evaluation", "megatron_hydra.export",
        "megatron_hydra.files", "megatron_hydra.head_plan", "megatron_hydra.processes",
        "megatron_hydra.provenance", "megatron_hydra.report", "megatron_hydra.schema",
        "megatron_hydra.selection", "megatron_hydra.study", "megatron_hydra.tasks",
        "megatron_hydra.teachers", "megatron_hydra.training", "megatron_hydra.unfinished",
        "megatron_hydra.yaml_text",
        "numpy", "torch", "tqdm",
    },
    "tools/benchmarks": {
        "hydra_kernels.gated_delta_rule", "hydra_kernels.linear_kl", "hydra_kernels.measure",
        "hydra_tools", "matplotlib", "megatron", "megatron_hydra.cpu", "megatron_hydra.errors",
        "megatron_hydra.export", "megatron_hydra.files", "megatron_hydra.head_plan",
        "megatron_hydra.model", "megatron_hydra.parallel", "megatron_hydra.report",
        "megatron_hydra.selection", "megatron_hydra.tasks", "megatron_hydra.teachers",
        "megatron_hydra.training", "megatron_hydra.transfer", "modelopt", "nemo", "numpy",
        "psutil", "safetensors", "torch", "transformers",
    },
    "examples/api": {"megatron_hydra.api", "megatron_hydra.selection", "megatron_hydra.training"},
    "examples/lm_eval": set(),
    "examples/nemo_run": {"megatron_hydra.errors", "megatron_hydra.training", "nemo_run"},
    "examples/quickstart": {
        "megatron_hydra.errors", "megatron_hydra.files", "megatron_hydra.tasks", "tokenizers",
        "torch", "tqdm", "transformers",
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
        "tools/benchmarks/",
        "examples/quickstart/make_teacher.py",
    ),
}
NEVER_AT_MODULE_LEVEL = {"flash_attn", "apex", "transformer_engine", "fla", "flash_qla"}


@pytest.fixture(scope="module")
def files() -> list[SourceFile]:
    return source_files()


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


def test_kernels_tools_and_examples_import_what_is_said_alone(files: list[SourceFile]) -> None:
    outside = [file for file in library(files) if file.part is None and file.path != PACKAGE]
    wrong, unused = [], {room: set(allowed) for room, allowed in ALLOWED_OUTSIDE.items()}
    for file in outside:
        place = file.path.removesuffix(".py").removesuffix("/__init__")
        room = max((r for r in unused if f"{place}/".startswith(f"{r}/")), key=len, default=None)
        assert room is not None, f"{file.path}: say here what it may import"
        name = Path(room).name
        own = {name, f"hydra_kernels.{name}"}
        own |= {Path(other.path).stem for other in outside if other.path.startswith(f"{room}/")}
        for item in file.imports:
            # Of this repository's packages the part is named, of others the package alone.
            levels = 2 if item.package in ("megatron_hydra", "hydra_kernels") else 1
            module = ".".join(item.module.split(".")[:levels])
            unused[room].discard(module)
            if module not in own | sys.stdlib_module_names | ALLOWED_OUTSIDE[room]:
                wrong.append(f"{file.path}:{item.line} {item.module}")
    assert not wrong, wrong
    assert not any(unused.values()), unused


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


def test_importing_the_package_does_not_import_megatron(files: list[SourceFile]) -> None:
    """The CPU module must be installed before megatron is imported."""
    (init,) = (file for file in files if file.path == PACKAGE)
    assert init.imports == ()
