"""Fails an image's build when a package is not the version meant, or another copy shadows it."""

import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

# Distribution -> version, and the module that it must be imported as.
WANTED = {
    "megatron-core": ("0.16.1", "megatron.core"),
    "nemo-toolkit": ("2.7.3", "nemo"),
    "lightning": ("2.4.0", "lightning"),
    "transformers": ("4.57.6", "transformers"),
    "fla-core": ("0.6.0", "fla"),
}


def fault(name: str) -> str | None:
    """What is wrong with a package, or None."""
    wanted, module = WANTED[name]
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
    faults = [text for text in map(fault, WANTED) if text]
    sys.exit("\n".join(faults) if faults else 0)
