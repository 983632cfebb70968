"""The CPU image of docker/Dockerfile.cpu, and the quickstart's first steps in it.

Built by buildah, which needs no daemon, on a base of this machine's Debian in place of the
registry's `python:3.11-slim`. Catches: an image that does not build from a clean clone, lacks a
file or a program, or runs as it would in nobody's container alone.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.cluster import ROOT, call

BASE, IMAGE = "localhost/hydra-test-base", "localhost/hydra-test-cpu"
PACKAGES = "python3,python3-venv,python3-dev,python-is-python3,python3-pip,ca-certificates"

# As Docker has it: the container's name is an address, and `--user` any number.
_AS_USER = """echo "127.0.0.1 $(hostname)" >> /etc/hosts
exec setpriv --reuid=12345 --regid=12345 --clear-groups bash -ec "$0" """


def package_settings() -> list[str]:
    """What pip is told here, as options of buildah: files, folders of packages, variables."""
    told = call(sys.executable, "-m", "pip", "config", "debug").splitlines()
    named = [line.strip().removesuffix(", exists: True") for line in told if "exists: True" in line]
    values = call(sys.executable, "-m", "pip", "config", "list").replace("'", " ").split()
    named += [value.removeprefix("file://").partition("=")[2] or value for value in values]
    places = {Path(name.removeprefix("file://")) for name in named} | {Path("/etc/ssl/certs")}
    # An index's pages point to files beside it.
    places = {place.parent if place.name == "simple" else place for place in places}
    found = sorted(place for place in places if place.is_absolute() and place.exists())
    options = [f"--volume={place}:{place}:ro" for place in found]
    return options + [
        f"--env={name}={os.environ[name]}" for name in os.environ if name[:4] == "PIP_"
    ]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """A container of the image, and the options to run in it."""
    os.environ["BUILDAH_ISOLATION"] = "chroot"  # needs no more than root
    folder = tmp_path_factory.mktemp("image")
    release = call("sh", "-c", ". /etc/os-release; echo $VERSION_CODENAME").strip()
    known = call("apt-cache", "policy", "base-files")  # where this machine has its Debian from
    address = re.findall(rf" (\S+) {release}/main ", known)[0]
    options = ("--variant=minbase", f"--include={PACKAGES}")
    call("debootstrap", *options, release, f"{folder}/base", address)
    for path in Path("/etc/apt/sources.list.d").iterdir():
        (folder / "base/etc/apt/sources.list.d" / path.name).write_bytes(path.read_bytes())
    container = call("buildah", "from", "scratch").strip()
    call("buildah", "add", "-q", container, f"{folder}/base", "/")
    path = "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    call("buildah", "config", "--env", path, container)
    call("buildah", "commit", "-q", "--rm", container, BASE)
    call("git", "clone", "--quiet", str(ROOT), f"{folder}/clone")
    settings = package_settings()
    file, clone = f"{folder}/clone/docker/Dockerfile.cpu", f"{folder}/clone"
    options = ("--pull-never", f"--from={BASE}", *settings)
    call("buildah", "bud", *options, "-f", file, "-t", IMAGE, clone)
    container = call("buildah", "from", "--pull-never", IMAGE).strip()
    yield container, settings
    call("buildah", "rm", container)
    call("buildah", "rmi", "--force", IMAGE, BASE)


def test_the_quickstarts_first_steps_run_in_the_image(
    image: tuple[str, list[str]], tmp_path: Path
) -> None:
    """As far as its converted hybrid, as a user whom the image does not know, into their folder."""
    container, settings = image
    (tmp_path / "runs").mkdir()
    os.chown(tmp_path / "runs", 12345, 12345)
    mounted = f"--volume={tmp_path}/runs:/workspace/megatron_hydra/runs"

    def in_image(script: str) -> str:
        options = [*settings, mounted, "--user=root"]
        return call("buildah", "run", *options, container, "--", "sh", "-c", _AS_USER, script)

    default = call("buildah", "run", *settings, container, "--", "id", "-un")
    assert default.strip() == "hydra" and in_image("id -u").strip() == "12345"
    assert "megatron-core" in in_image(".venv/bin/megatron-hydra doctor || true")
    # Two folders below the repository, as run.sh itself.
    in_image(
        "mkdir runs/steps; sed '/^previous=/,$d' examples/quickstart/run.sh > runs/steps/first.sh"
    )
    in_image('PATH="$PWD/.venv/bin:$PATH" bash runs/steps/first.sh')
    assert json.loads((tmp_path / "runs/quickstart/converted/model.json").read_text())
    assert (tmp_path / "runs/quickstart/pareto.json").stat().st_uid == 12345
