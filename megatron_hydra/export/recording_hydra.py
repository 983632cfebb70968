"""Steps into a static cache, recorded as a CUDA graph: nothing of Python is left in them.

Copied into every exported folder: imports PyTorch and transformers alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cache_hydra import HydraCache
from .stream_hydra import CACHE

Run = Callable[..., Any]
Recorder = Callable[[Run], tuple[Callable[[], None], Any]]


_RECORDING = threading.Lock()


def cuda_graph(run: Run, device: torch.device) -> tuple[Callable[[], None], Any]:
    """What runs it again, at the same addresses, and its output there.

    Other threads may use the device meanwhile, as beside PyTorch's own graphs.
    """
    graph = torch.cuda.CUDAGraph()
    with _RECORDING, torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            output = run()
    return graph.replay, output


class RecordedSteps:
    """The calls of one `generate`, of which steps into its static cache are recorded.

    torch.compile's own CUDA graphs look before each call whether every module, setting and weight
    is what was compiled for, some 2 ms at 28 layers. Here only what changes between the steps of a
    `generate` is looked at: its inputs and its cache.

    Args:
        call: The compiled model, without CUDA graphs of its own.
        record: Runs what it is given once, in a way that can be repeated.
    """

    def __init__(self, call: Run, record: Recorder) -> None:
        self._call, self._record = call, record
        self._forget()

    def _forget(self, mark: Any = None) -> None:
        """Give a record's memory back, and wait for a step of this mark."""
        self._mark = mark
        self._held: dict[str, Tensor] = {}
        self._replay: Callable[[], None] | None = None
        self._output: Any = None

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """As the model's forward; a first step of its kind runs as it is, which may compile it."""
        if args:  # `generate` names all
            return self._call(*args, **inputs)
        tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
        mark = _mark(inputs, tensors)
        if mark is None or mark != self._mark:
            self._forget(mark)
            return self._call(**inputs)
        if self._replay is None:
            self._held = {name: x.clone() for name, x in tensors.items()}
            given = inputs | self._held
            self._replay, self._output = self._record(lambda: self._call(**given))
        for name, x in tensors.items():
            self._held[name].copy_(x)
        self._replay()
        # The next step writes over the logits.
        return type(self._output)(**{**self._output, "logits": self._output["logits"].clone()})


def _mark(inputs: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """What a record is of use for; None of what is no step, or returns more."""
    cache, tokens = inputs.get(CACHE), inputs.get("input_ids")
    if not (isinstance(cache, HydraCache) and tokens is not None):
        return None
    returns_more = inputs.get("output_hidden_states") or inputs.get("labels") is not None
    returns_more = returns_more or inputs.get("return_dict") is False
    if returns_more or not cache.takes_step(tokens.shape[1]):
        return None
    shapes = {name: (x.shape, x.dtype, x.device) for name, x in tensors.items()}
    others = {name: x for name, x in inputs.items() if name not in tensors}
    kept = [x for layer in cache.layers for x in (*layer.tensors(), layer.num_tokens)]
    return shapes, others, [x.data_ptr() for x in kept]
