"""Megatron's CUDA-only calls on a machine without a GPU: the one place that maps them to the CPU.

Megatron-core asks for `torch.cuda` at many places that have nothing to do with kernels: rotary
frequencies, gradient buffers, the model-parallel RNG, checkpoint staging. On a machine without
CUDA :func:`install_if_needed` answers those calls with the CPU. It must run before megatron is
imported, because megatron binds several of these names when it is imported.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from typing import Any

import torch
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_installed = False


def install_if_needed() -> bool:
    """Map `torch.cuda` calls to the CPU where no GPU is present; return whether that is so.

    Does nothing where CUDA is available, so every entry point may call it. Idempotent.

    Raises:
        RuntimeError: If megatron was imported before.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if not _installed:
        if "megatron.core" in sys.modules:
            raise RuntimeError("megatron_hydra.cpu.install_if_needed() must run before megatron")
        _replace_cuda_functions()
        _replace_tensor_functions()
        # Megatron's schedule looks at `.grad` of what is no leaf, of which PyTorch warns.
        warnings.filterwarnings("ignore", message=r"The \.grad attribute", module=r"megatron\.core")
        _installed = True
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


def _on_cpu(function: Any) -> Any:
    """A function that makes or moves tensors, told the CPU where it is told CUDA."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return call


def _moved_to_cpu(function: Any) -> Any:
    """`Tensor.to`, which takes a device by place too."""

    @functools.wraps(function)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *(_CPU if _is_cuda(value) else value for value in args), **kwargs)

    return _on_cpu(to)


def _is_cuda(value: Any) -> bool:
    return isinstance(value, (str, torch.device)) and str(value).startswith("cuda")


def _typed_as_on_cuda(function: Any) -> Any:
    """`Tensor.type`: Megatron buckets gradients by the names of the CUDA tensor types."""

    @functools.wraps(function)
    def type_(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], str):
            return function(self, args[0].replace("torch.cuda.", "torch."), *args[1:], **kwargs)
        result = function(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.") if isinstance(result, str) else result

    return type_


def _replace_tensor_functions() -> None:
    """All that can be asked for a tensor on a device.

    Each by itself: a mode that sees every call of PyTorch's would take more time than small
    operators do.
    """
    for function in _device_constructors():
        name = function.__name__
        if getattr(torch, name, None) is function:
            setattr(torch, name, _on_cpu(function))
    for name in dir(torch):
        if name.endswith("_like"):
            setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor = torch.Tensor
    for name in dir(tensor):
        if name.startswith("new_"):
            setattr(tensor, name, _on_cpu(getattr(tensor, name)))
    tensor.to = _moved_to_cpu(tensor.to)  # type: ignore[method-assign]
    tensor.type = _typed_as_on_cuda(tensor.type)  # type: ignore[method-assign]
    tensor.pin_memory = lambda self, *a, **k: self  # type: ignore[method-assign]


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
