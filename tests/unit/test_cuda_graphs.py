"""A model's CUDA graphs are let go of as a whole: one that is left hangs the end of a run."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from megatron.core.transformer import cuda_graphs  # noqa: E402

from megatron_hydra.model import release_cuda_graphs  # noqa: E402


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
        runner = SimpleNamespace(fwd_graph=forward, bwd_graph=backward)
        self.cudagraph_manager.cudagraph_runners = [runner]


def test_every_graph_is_reset_and_another_model_can_be_captured(monkeypatch) -> None:
    record = cuda_graphs._CudagraphGlobalRecord
    monkeypatch.setattr(record, "cudagraph_created", True)
    graphs = [_Graph() for _ in range(3)]
    model = torch.nn.Sequential(_Layer(graphs[:2]), torch.nn.Linear(2, 2), _Layer(graphs[2:]))
    release_cuda_graphs(model)
    assert all(graph.is_reset for graph in graphs)
    assert not record.cudagraph_created
    assert all(not layer.cudagraph_manager.cudagraph_runners for layer in (model[0], model[2]))
