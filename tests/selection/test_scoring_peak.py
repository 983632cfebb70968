"""The memory that scoring is said to need, against every byte that it takes."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from kit import circuits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_hydra.errors import UserError
from megatron_hydra.selection.scorers import activations, path_patching
from megatron_hydra.selection.scorers.activation_patching import ActivationPatching
from megatron_hydra.selection.scorers.base import collate
from megatron_hydra.selection.scorers.path_patching import PathPatching
from megatron_hydra.selection.scoring_memory import check_memory, scoring_peak_bytes

# How much of the peak is to be found: where the forward is the peak, the mask that attention makes
# on a CPU, and not on a GPU, is a quarter.
SCORERS = {"activation_patching": (ActivationPatching, 0.7), "path_patching": (PathPatching, 0.9)}

pytestmark = pytest.mark.usefixtures("one_rank_of_module")


class CountedStorage(TorchDispatchMode):
    """Counts the bytes of all storages made inside that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._known:
            return
        self._known.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("stream_bytes", [2**18, 2**30])
@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_the_prediction_holds(
    scorer: str, stream_bytes: int, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches what grows with length, heads, layers or vocabulary and is not counted."""
    monkeypatch.setattr(activations, "MAX_STREAM_BYTES", stream_bytes)
    monkeypatch.setattr(activations, "MAX_POSITIONS", 1024)
    monkeypatch.setattr(activations, "MAX_LOGIT_ROWS", 64)
    model = circuits.random_teacher(
        dtype=torch.float32, num_layers=6, ffn_hidden_size=3 * circuits.HIDDEN
    )
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    probe = circuits.random_probe(2, 500, readout="log_probability")
    make, share = SCORERS[scorer]
    measurer = make()
    if isinstance(measurer, PathPatching):
        measurer.targets = frozenset({(5, 1), (3, 0), (3, 2)})
    pairs = range(min(len(probe.pairs), max(1, batch_tokens // probe.length_tokens)))
    batch = collate(probe, pairs, [1.0] * len(pairs))
    # A mask of a tensor's own class cannot be made inside, and no mask is stored on a GPU.
    masks = {num: torch.ones(num, 502).tril(502 - num).bool() for num in (3, 499, 500)}
    monkeypatch.setattr(path_patching, "causal_lower_right", lambda num, _: masks[num])
    with CountedStorage() as counted:
        measurer.measure(model, batch)
    predicted = scoring_peak_bytes(model, [probe], [scorer], batch_tokens) - weights
    assert share * counted.peak < predicted < 1.1 * counted.peak


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    check_memory(2**30, 2**30)
    with pytest.raises(
        UserError, match=r"needs about 2.0 GiB of the device's 1.0: lower run.batch"
    ):
        check_memory(2**31, 2**30)
