"""`doctor`: what is installed here, what is missing or slow, and what mends it.

Each check is a function that returns findings; nothing slow is imported, and nothing is changed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from packaging.requirements import Requirement

# What a machine with GPUs has beside what every machine has.
_GPU_EXTRAS = ("te", "flash-qla")
_SHARED_MEMORY_BYTES = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        state: `missing` keeps something from running; `beware` something else than most need, or
            makes it slow.
        what: What was found, in words.
        mend: A command or a setting that mends it; empty where nothing is to be mended.
    """

    state: Literal["ok", "missing", "beware"]
    what: str
    mend: str = ""


def doctor() -> Iterator[Finding]:
    """Look at this machine, one thing after the other."""
    yield Finding("ok", f"Python {platform.python_version()} on {platform.node()}")
    gpus = _gpus()
    yield from _gpu_findings(gpus)
    yield from package_findings(("", "nemo", *(_GPU_EXTRAS if gpus else ())))
    yield from compiler_findings()
    yield from name_findings()
    yield from shared_memory_findings()


def package_findings(
    extras: tuple[str, ...], version: Callable[[str], str] = importlib.metadata.version
) -> Iterator[Finding]:
    """The packages that this one requires, with those extras; all that fit are one finding.

    Args:
        extras: Their names; empty: what is required always.
        version: Tells a package's, or raises PackageNotFoundError.
    """
    fitting = []
    for extra in extras:
        mend = f"pip install -e .[{extra}]" if extra else "pip install -e ."
        for requirement in _required(extra):
            try:
                found = version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                yield Finding("missing", f"{requirement.name} is not installed", mend)
                continue
            if requirement.specifier.contains(found, prereleases=True):
                fitting.append(f"{requirement.name} {found}")
            else:
                sentence = f"{requirement.name} is {found}; {requirement.specifier} is needed"
                yield Finding("missing", sentence, mend)
    if fitting:
        yield Finding("ok", f"{len(fitting)} packages: {', '.join(fitting)}")


def _required(extra: str) -> Iterator[Requirement]:
    """The requirements that an extra adds; for no extra, those of always."""
    try:
        required = importlib.metadata.requires("megatron-hydra") or ()
    except importlib.metadata.PackageNotFoundError:
        required = ("megatron-hydra",)  # run from its sources, without having been installed
    for text in required:
        requirement = Requirement(text)
        is_always = requirement.marker is None
        if is_always != bool(extra) and (
            is_always or requirement.marker.evaluate({"extra": extra})
        ):
            yield requirement


def _gpus() -> list[str]:
    """The GPUs' names, by NVIDIA's own tool."""
    try:
        asked = [
            "nvidia-smi",
            "--query-gpu=name,memory.total,driver_version",
            "--format=csv,noheader",
        ]
        said = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return said.strip().splitlines()


def _gpu_findings(gpus: list[str]) -> Iterator[Finding]:
    if not gpus:
        yield Finding("ok", "no GPU (nvidia-smi finds none): what needs none runs")
        return
    names = ", ".join(dict.fromkeys(gpus))
    yield Finding("ok", f"{len(gpus)} GPUs: {names} (name, memory, driver)")
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        yield Finding("missing", "CUDA_VISIBLE_DEVICES is empty", "unset CUDA_VISIBLE_DEVICES")


def compiler_findings(which: Callable[[str], str | None] = shutil.which) -> Iterator[Finding]:
    """A C++ compiler, with which Megatron builds the index of its datasets, and Triton kernels."""
    if which("g++") is None:
        sentence = "no C++ compiler: Megatron builds a helper of its datasets with g++ and make"
        yield Finding("missing", sentence, "apt-get install g++ make")
    elif which("make") is None:
        yield Finding("missing", "no make, with which Megatron builds", "apt-get install make")
    else:
        yield Finding("ok", "g++ and make")


def name_findings(
    resolve: Callable[[str], str] = socket.gethostbyname, name: str | None = None
) -> Iterator[Finding]:
    """How this machine knows itself, by which ranks of other machines are told where it is.

    Args:
        resolve: A name to an address; raises OSError.
        name: Of this machine.
    """
    name = name or socket.gethostname()
    set_by = [key for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if key in os.environ]
    mend = "export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0 (the network to use)"
    try:
        address = resolve(name)
    except OSError:
        yield Finding(
            "missing", f"{name} cannot look up its own name", f"a line in /etc/hosts, or {mend}"
        )
        return
    if address.startswith("127.") and not set_by:
        sentence = f"{name} knows itself as {address}, where other machines do not reach it"
        yield Finding("beware", f"{sentence}: of no matter on one machine", mend)
    else:
        names = f", {' and '.join(set_by)} set" if set_by else ""
        yield Finding("ok", f"{name} is {address}{names}")


def shared_memory_findings(path: str = "/dev/shm") -> Iterator[Finding]:
    """The memory by which workers hand on batches, of which containers have little."""
    try:
        size = shutil.disk_usage(path).total
    except OSError:
        return
    if size < _SHARED_MEMORY_BYTES:
        sentence = f"{path} has {size / 2**20:.0f} MiB, which data.num_workers can fill"
        yield Finding("beware", sentence, "docker run --shm-size=8g, or data.num_workers=0")
    else:
        yield Finding("ok", f"{path} has {size / 2**30:.0f} GiB")
