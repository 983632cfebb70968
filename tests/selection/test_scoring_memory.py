"""Long samples fit: what scoring holds grows with the length, never with its square."""

from __future__ import annotations

import resource

import pytest
import torch
from kit.distributed import run_distributed

pytestmark = pytest.mark.dist

LENGTH = 16384
SCORE_MATRIX_BYTES = 4 * LENGTH**2  # of one head, in float32: 1 GiB


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check_a_fresh_process() -> None:
    """Score one pair whose needle stands in the middle; the peak of a process never falls."""
    from kit.circuits import random_teacher

    from megatron_hydra.parallel import initialize_model_parallel
    from megatron_hydra.selection.scorers.activation_patching import ActivationPatching
    from megatron_hydra.selection.scorers.base import collate
    from megatron_hydra.selection.scorers.path_patching import PathPatching
    from megatron_hydra.tasks.needles import CounterfactualPair, Sample
    from megatron_hydra.tasks.probes import Probe

    initialize_model_parallel()
    model = random_teacher(dtype=torch.float32, seq_length=LENGTH).eval()
    tokens = torch.randint(10, 16, (LENGTH - 1,)).tolist()
    middle = LENGTH // 2
    twins = [Sample([*tokens[:middle], a, *tokens[middle + 1 :]], [a]) for a in (3, 7)]
    probe = Probe("long", "retrieval", [CounterfactualPair(*twins)], LENGTH, 0)
    before = peak_bytes()
    for scorer in (ActivationPatching(), PathPatching()):
        if isinstance(scorer, PathPatching):
            scorer.targets = frozenset({(1, 0), (1, 3)})
        effects = scorer.measure(model, collate(probe, [0], [1.0]))
        assert effects.isfinite().all()
    assert peak_bytes() - before < SCORE_MATRIX_BYTES / 4


def test_a_pair_of_16k_tokens_takes_less_than_one_score_matrix() -> None:
    run_distributed(check_a_fresh_process, 1)
