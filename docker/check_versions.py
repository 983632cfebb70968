"""Fails an image's build when a package is not the version meant, or another copy shadows it.

python docker/check_versions.py megatron-core==0.16.1 transformers==4.57.6
"""

import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

# The module that a distribution must be imported as, where the name is another.
MODULES = {
    "megatron-core": "megatron.core",
    "nemo-toolkit": "nemo",
    "fla-core": "fla",
    "flash-qla": "flash_qla",
}


def fault(requirement: str) -> str | None:
    """What is wrong with a package (``name==version``), or None."""
    name, _, wanted = requirement.partition("==")
    module = MODULES.get(name, name)
    try:
        found = version(name)
    except PackageNotFoundError:
        return f"{name} is missing: {wanted} is needed"
    if found != wanted:
        return f"{name} is {found}: {wanted} is needed"
    spec = importlib.util.find_spec(module)
    installed = Path(str(distribution(name).locate_file(module.replace(".", "/")))).resolve()
    origin = Path(spec.origin).resolve().parent if spec and spec.origin else None
    if origin != installed:
        return f"{module} is imported from {origin}, but {name} {found} is in {installed}"
    return None


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("check_versions.py: name the packages, as in transformers==4.57.6")
    faults = [text for text in map(fault, sys.argv[1:]) if text]
    sys.exit("\n".join(faults) if faults else 0)
