"""Random states of a checkpoint: what is drawn after they are set is what was drawn before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from megatron_hydra.training import random_states  # noqa: E402


class _GeneratorTracker:
    """As Transformer Engine's tracker, whose generators CUDA graphs hold on to."""

    def __init__(self) -> None:
        self.states = {"model-parallel-rng": torch.Generator().manual_seed(1)}

    def get_states(self) -> dict[str, Any]:
        return dict(self.states)


def test_a_tracker_of_generators_keeps_its_generators(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    tracker = _GeneratorTracker()
    monkeypatch.setattr(random_states, "get_cuda_rng_tracker", lambda: tracker)
    (generator,) = tracker.states.values()
    states = random_states.random_states()
    torch.save(states["tracker"], tmp_path / "states")  # as tensors: generators cannot be loaded
    expected = torch.rand(3, generator=generator)
    states["tracker"] = torch.load(tmp_path / "states", weights_only=True)
    random_states.set_random_states(states)
    assert torch.equal(torch.rand(3, generator=generator), expected)
    assert tracker.states == {"model-parallel-rng": generator}
