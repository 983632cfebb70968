"""A model's CUDA graphs are let go of as a whole.

One that is left hangs the end of a run, and what a runner still holds is memory that is lost.
"""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import torch

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from megatron.core.transformer import cuda_graphs  # noqa: E402

from megatron_hydra.model.build import release_cuda_graphs  # noqa: E402


class _Graph:
    is_reset = False

    def reset(self) -> None:
        self.is_reset = True


class _Layer(torch.nn.Module):
    """A layer whose forward pass is captured, and its backward pass if that has run."""

    def __init__(self, graphs: list[_Graph]) -> None:
        super().__init__()
        # Its constructor wants a GPU.
        self.cudagraph_manager = cuda_graphs.CudaGraphManager.__new__(cuda_graphs.CudaGraphManager)
        torch.nn.Module.__init__(self.cudagraph_manager)
        forward, backward = [*graphs, None][:2]
        static = (torch.zeros(2),)
        runner = SimpleNamespace(
            fwd_graph=forward,
            bwd_graph=backward,
            fwd_graph_outputs=static,
            fwd_graph_output_surface=static,
            base_module=self,
        )
        self.cudagraph_manager.cudagraph_runners = [runner]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Replay.apply(self.cudagraph_manager.cudagraph_runners[0], x)


class _Replay(torch.autograd.Function):
    """As Megatron's: returns the runner's own tensors, and its node keeps the runner."""

    @staticmethod
    def forward(ctx, runner, x):
        ctx.runner = runner
        (output,) = runner.fwd_graph_output_surface
        return output

    @staticmethod
    def backward(ctx, grad):
        return None, grad


def test_every_graph_is_reset_and_another_model_can_be_captured(monkeypatch) -> None:
    record = cuda_graphs._CudagraphGlobalRecord
    monkeypatch.setattr(record, "cudagraph_created", True)
    graphs = [_Graph() for _ in range(3)]
    model = torch.nn.Sequential(_Layer(graphs[:2]), torch.nn.Linear(2, 2), _Layer(graphs[2:]))
    release_cuda_graphs(model)
    assert all(graph.is_reset for graph in graphs)
    assert not record.cudagraph_created
    assert all(not layer.cudagraph_manager.cudagraph_runners for layer in (model[0], model[2]))


def test_released_layers_are_freed() -> None:
    model = torch.nn.Sequential(*(_Layer([_Graph()]) for _ in range(3)))
    model(torch.zeros(2, requires_grad=True)).sum().backward()
    layers = [weakref.ref(layer) for layer in model]
    release_cuda_graphs(model)
    del model
    gc.collect()
    assert [layer() for layer in layers] == [None] * 3
