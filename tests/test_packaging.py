"""The package as it is installed: what the wheel holds, what it asks for, what an image checks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = {"megatron_hydra": ".", "hydra_kernels": "kernels", "hydra_tools": "tools"}
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "requirements/cpu.txt").read_text(), re.MULTILINE
    )
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy, so that nothing is left beside the sources."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    for package, folder in PACKAGES.items():
        shutil.copytree(
            ROOT / folder / package,
            copy / folder / package,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, "dist"], cwd=copy, check=True, capture_output=True, text=True
    )
    return zipfile.ZipFile(next((copy / "dist").glob("*.whl")))


def test_the_wheel_holds_every_file_of_the_packages(wheel: zipfile.ZipFile) -> None:
    expected = {
        str(path.relative_to(ROOT / folder))
        for package, folder in PACKAGES.items()
        for path in (ROOT / folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert any(not name.endswith(".py") for name in expected), "else this test shows too little"
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


def _asked_for(wheel: zipfile.ZipFile, extra: str) -> list[Requirement]:
    """What the wheel asks for, alone and with an extra."""
    name = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
    found = Metadata.from_email(wheel.read(name), validate=False).requires_dist or []
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": extra})]


def test_the_tested_versions_are_those_that_are_asked_for(wheel: zipfile.ZipFile) -> None:
    requirements = _asked_for(wheel, "nemo")
    assert len(requirements) > 15
    for requirement in requirements:
        pin = PINS[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), requirement


_LOAD = """
import gc, sys
gc.disable()
from megatron_hydra import cpu
cpu.install_if_needed()
import megatron_hydra.nemo.training
from torch.utils.tensorboard import SummaryWriter
sys.stdout.write("LOADED " + " ".join({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.slow
@pytest.mark.exhaustive  # imports all of NeMo anew
def test_the_nemo_extra_asks_for_all_that_training_imports(wheel: zipfile.ZipFile) -> None:
    """An environment made by pip alone has no more than what somebody asks for."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in PACKAGES.values())
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _LOAD],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    modules = run.stdout.rpartition("LOADED ")[2].split()
    owners = packages_distributions()
    loaded = {canonicalize_name(name) for module in modules for name in owners.get(module, ())}
    assert {"nemo-toolkit", "megatron-core", "torch", "pandas"} <= loaded
    loaded &= PINS.keys()  # not what setuptools carries within itself
    asked_for = _with_requirements(_asked_for(wheel, "nemo"))
    assert loaded <= asked_for, sorted(loaded - asked_for)


def _with_requirements(requirements: Iterable[Requirement]) -> set[str]:
    """Names of the requirements, of what they require in turn, and so on."""
    waiting, seen = list(requirements), set()
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            children = map(Requirement, requires(name) or ())
        except PackageNotFoundError:
            continue
        waiting += [
            child
            for child in children
            if child.marker is None
            or any(child.marker.evaluate({"extra": extra}) for extra in extras or {""})
        ]
    return {name for name, _ in seen}


def _check_versions(*words: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "docker/check_versions.py"
    return subprocess.run([sys.executable, script, *words], capture_output=True, text=True)


def test_the_cpu_images_own_check_passes_here() -> None:
    """The line of Dockerfile.cpu, in this environment, which is made of the same pins."""
    dockerfile = (ROOT / "docker/Dockerfile.cpu").read_text()
    line = re.search(r"grep .*?check_versions\.py", dockerfile, re.DOTALL)
    assert line is not None
    command = line[0].replace("\\\n", " ").replace(".venv/bin/python", f"-t {sys.executable}")
    run = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("==") == 4, "xargs -t shows the packages"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the packages"),
        (["transformers==1.0"], f"transformers is {PINS['transformers']}: 1.0 is needed"),
        (["no-such-package==1.0"], "no-such-package is missing: 1.0 is needed"),
        # A distribution whose module is not where the distribution is installed.
        ([f"pyyaml=={PINS['pyyaml']}"], "pyyaml is imported from None"),
    ],
)
def test_an_image_with_other_packages_is_refused(words: list[str], message: str) -> None:
    run = _check_versions(f"megatron-core=={PINS['megatron-core']}", *words) if words else (
        _check_versions()
    )  # fmt: skip
    assert run.returncode == 1
    assert message in run.stderr
    assert "megatron" not in run.stderr
