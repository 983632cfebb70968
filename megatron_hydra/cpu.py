"""Megatron's CUDA-only calls on a machine without a GPU: the one place that maps them to the CPU.

Megatron-core asks for `torch.cuda` at many places that have nothing to do with kernels: rotary
frequencies, gradient buffers, the model-parallel RNG, checkpoint staging. On a machine without
CUDA :func:`install_if_needed` answers those calls with the CPU. It must run before megatron is
imported, because megatron binds several of these names when it is imported.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_REWRITTEN = frozenset(("cuda", "pin_memory", "to", "type"))
_installed: _CudaToCpu | None = None


def install_if_needed() -> bool:
    """Map `torch.cuda` calls to the CPU where no GPU is present; return whether that is so.

    Does nothing where CUDA is available, so every entry point may call it. Idempotent.

    Raises:
        RuntimeError: If megatron was imported before.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if _installed is None:
        if "megatron.core" in sys.modules:
            raise RuntimeError("megatron_hydra.cpu.install_if_needed() must run before megatron")
        _replace_cuda_functions()
        # PyTorch warns of a look at `.grad` of what is no leaf. Megatron's schedule looks there, by
        # way of the mode below, which the warning then names.
        warnings.filterwarnings("ignore", message=r"The \.grad attribute", module=__name__)
        _installed = _CudaToCpu()
        _installed.__enter__()
    return True


class _Stream:
    """A stream or event on a device with one queue: everything is already in order."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        raise RuntimeError("CUDA events do not measure time on a machine without a GPU")

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def _nothing(self, *args: Any, **kwargs: Any) -> None: ...

    wait_stream = wait_event = synchronize = record = wait = _nothing


class _CpuGenerators:
    """Stands for `torch.cuda.default_generators`: every device's generator is the CPU's."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator


class _CudaToCpu(TorchFunctionMode):
    """Rewrites `device="cuda"`, `.cuda()`, `.to("cuda")`, pinned memory and tensor type names."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        else:
            kwargs = {}
        name = getattr(func, "__name__", "")
        if name in _REWRITTEN:  # most are not: millions of calls come here
            if name == "type":
                return _tensor_type(func, args, kwargs)
            if name != "to":
                return args[0]
            args = tuple(_CPU if _is_cuda(value) else value for value in args)
        return func(*args, **kwargs)


def _is_cuda(value: Any) -> bool:
    return isinstance(value, (str, torch.device)) and str(value).startswith("cuda")


def _tensor_type(func: Any, args: tuple, kwargs: dict) -> Any:
    # Megatron buckets gradients by the names of the CUDA tensor types.
    if len(args) > 1 and isinstance(args[1], str):
        return func(args[0], args[1].replace("torch.cuda.", "torch."), **kwargs)
    result = func(*args, **kwargs)
    return result.replace("torch.", "torch.cuda.") if isinstance(result, str) else result


def _replace_cuda_functions() -> None:
    cuda = torch.cuda
    answers: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "current_stream": _Stream,
        "default_stream": _Stream,
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "initial_seed": torch.initial_seed,
        "max_memory_allocated": lambda *a, **k: 0,
        "memory_allocated": lambda *a, **k: 0,
        "get_device_capability": lambda *a, **k: (0, 0),
        "is_current_stream_capturing": lambda: False,
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Stream,
        "default_generators": _CpuGenerators(),
        "_lazy_call": lambda function, **k: function(),
        # One function object a name: torch.compile keeps a table of them and refuses repeats.
        "synchronize": lambda *a, **k: None,
        "set_device": lambda device: None,
        "empty_cache": lambda: None,
        "_lazy_init": lambda: None,
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    cuda.random.get_rng_state = cuda.get_rng_state
    cuda.random.set_rng_state = cuda.set_rng_state
    torch.nn.Module.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
