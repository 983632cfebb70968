"""Where the kernels run: what the operators share about devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def check_device(x: Tensor, impl: str) -> None:
    """Raise ValueError unless x is where `impl`'s kernels run: CUDA, or Triton's interpreter.

    fla asks for CUDA at its import, so the interpreter is for our own kernels, "triton", alone.
    """
    if x.is_cuda:
        return
    if impl == "triton":
        from triton import knobs

        if knobs.runtime.interpret:
            return
    raise ValueError(
        f"impl={impl!r} runs on CUDA tensors alone, got {x.device.type}; "
        "on a CPU name impl='reference'"
    )
