"""What Triton would compile: launches of our kernels recorded instead of run, without a GPU."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from megatron_hydra.cpu import install_if_needed

Launch = tuple[str, tuple[tuple[str, str], ...], str]
"""A kernel's name, what Triton specialises each argument to, and its options."""


@contextmanager
def recorded_launches() -> Iterator[set[Launch]]:
    """Record what would be launched on an H100; outputs stay what memory held.

    For a process without `TRITON_INTERPRET`, in which the kernels are made for a GPU.
    """
    import hydra_kernels.head_fusion.triton_head_fusion
    import hydra_kernels.la_preparation.triton_la_preparation  # noqa: F401
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime import jit

    backend = make_backend(GPUTarget("cuda", 90, 32))
    binders: dict[int, Any] = {}
    launches: set[Launch] = set()

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if id(kernel) not in binders:
            binders[id(kernel)] = jit.create_function_from_signature(
                kernel.signature, kernel.params, backend
            )
        _, specialization, options = binders[id(kernel)](*args, **kwargs, debug=False)
        arguments = zip(kernel.arg_names, map(str, specialization), strict=True)
        launches.add((kernel.fn.__name__, tuple(arguments), str(options)))

    # The kernels are made: now it lets tensors of a CPU through.
    with (
        patch.object(jit.JITFunction, "run", record),
        patch.dict(os.environ, TRITON_INTERPRET="1"),
    ):
        yield launches


def call_in_process(_rank: int, module: str, function: str) -> None:
    """Call a function without arguments of a module, which is imported here: with Megatron."""
    install_if_needed()
    getattr(importlib.import_module(module), function)()


def unknown(launches: set[Launch], known: set[Launch]) -> list[str]:
    """Of launches that are not among the known ones, in what they differ from the nearest."""
    found = []
    for name, arguments, options in sorted(launches - known):
        others = [other for other in known if other[0] == name]
        differences = [
            {
                argument: (ours, theirs)
                for (argument, ours), (_, theirs) in zip(arguments, other[1], strict=True)
                if ours != theirs
            }
            | ({"options": (options, other[2])} if options != other[2] else {})
            for other in others
        ]
        found.append(f"{name}: {min(differences, key=len) if others else 'never launched'}")
    return found
