"""`megatron-hydra doctor`: what it finds of machines that lack something, told by stand-ins."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hydra.api import doctor


def test_a_package_that_is_absent_or_of_another_version_is_named() -> None:
    def version(name: str) -> str:
        if name == "jinja2":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.15.0" if name == "megatron-core" else importlib.metadata.version(name)

    lacking = [found for found in doctor.package_findings(("",), version) if found.state != "ok"]
    assert [(found.what, found.mend) for found in lacking] == [
        ("megatron-core is 0.15.0; <0.17,>=0.16.1 is needed", "pip install -e ."),
        ("jinja2 is not installed", "pip install -e ."),
    ]


def test_what_the_tests_run_with_fits() -> None:
    (found,) = doctor.package_findings(("", "nemo"))
    assert found.state == "ok" and "nemo-toolkit 2.7.3" in found.what and "pytest" not in found.what


@pytest.mark.parametrize(
    ("address", "interface", "state"),
    [("127.0.1.1", "", "beware"), ("127.0.1.1", "ib0", "ok"), ("10.0.0.7", "", "ok"),
     ("", "", "missing")],
)  # fmt: skip
def test_a_machine_that_others_cannot_reach_by_its_name(
    monkeypatch: pytest.MonkeyPatch, address: str, interface: str, state: str
) -> None:
    def resolve(name: str) -> str:
        if not address:
            raise OSError("no such name")
        return address

    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    if interface:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    (found,) = doctor.name_findings(resolve, "node0")
    assert found.state == state
    assert bool(found.mend) is (state != "ok") and "node0" in found.what


def test_its_first_line_comes_before_anything_slow() -> None:
    program = (
        "import sys; from hydra_tools import cli; code = cli.main(['doctor']); "
        "print({'torch', 'megatron', 'nemo', 'numpy', 'transformers'} & set(sys.modules), code)"
    )
    said = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    ).stdout.splitlines()  # fmt: skip
    assert said[0].startswith("ok      Python 3.")
    is_missing = any(line.startswith("missing") for line in said)
    assert said[-1] == f"set() {int(is_missing)}"
