"""Every scorer with heads spread over tensor-parallel ranks, against one rank.

Catches: a head looked for on the wrong rank or on all, effects that are not gathered, a collective
that only the rank with the head enters (the run would hang), gradients that are not summed over
ranks, query groups that several ranks share, their biases.
"""

from __future__ import annotations

import pytest
import torch
from kit.distributed import run_distributed
from torch import Tensor, nn

pytestmark = pytest.mark.dist

# Targets on both ranks, on the first alone, on the second alone, and none.
TARGETS = frozenset({(3, 0), (3, 3), (2, 1), (1, 2)})


def teacher(num_groups: int, tied: bool, tp_size: int) -> nn.Module:
    from kit.circuits import random_teacher

    # Either draw has heads on both ranks that every scorer sees.
    return random_teacher(
        0 if tied else 9,
        num_layers=4,
        num_query_groups=num_groups,
        share_embeddings_and_output_weights=tied,
        tensor_model_parallel_size=tp_size,
        qk_layernorm=not tied,
        add_qkv_bias=tied,
    )


def effects_of_all_scorers(model: nn.Module, gaps: list[float]) -> dict[str, Tensor]:
    """Effects of each model-based scorer on the random probe, by name."""
    from kit.circuits import random_probe

    from megatron_hydra.selection.scorers.ablation import (
        MeanAblation,
        WindowAblation,
        ZeroAblation,
    )
    from megatron_hydra.selection.scorers.activation_patching import ActivationPatching
    from megatron_hydra.selection.scorers.attention_score import AttentionScore
    from megatron_hydra.selection.scorers.attribution_patching import AttributionPatching
    from megatron_hydra.selection.scorers.base import collate
    from megatron_hydra.selection.scorers.path_patching import PathPatching

    batch = collate(random_probe(), range(3), gaps)
    path_patching, attribution = PathPatching(), AttributionPatching(num_rechecked=3)
    path_patching.targets = TARGETS
    simple = (
        ActivationPatching(),
        AttentionScore(),
        ZeroAblation(),
        MeanAblation(),
        WindowAblation(4),
    )
    found = {x.name: x.measure(model, batch) for x in (*simple, path_patching, attribution)}
    attribution.start_round({})
    attribution.start_round({attribution.name: {"random": found[attribution.name]}})
    return found | {"rechecked": attribution.measure(model, batch)}


def check_rank(cases: list[tuple[int, bool, list[float], dict[str, Tensor]]]) -> None:
    """All models and scorers on one start of the ranks, which takes longer than the checks."""
    from megatron_hydra.parallel import initialize_model_parallel

    initialize_model_parallel(tensor=2)
    for num_groups, tied, gaps, expected in cases:
        found = effects_of_all_scorers(teacher(num_groups, tied, tp_size=2), gaps)
        assert list(found) == list(expected)
        for name, values in found.items():
            torch.testing.assert_close(
                values, expected[name], rtol=0, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_two_ranks_equal_one() -> None:
    from kit.circuits import batch_with_gaps, random_probe

    from megatron_hydra.parallel import initialize_model_parallel

    initialize_model_parallel()
    cases = []
    for num_groups, tied in ((2, False), (1, True)):
        model = teacher(num_groups, tied, tp_size=1)
        gaps = batch_with_gaps(model, random_probe()).gaps.tolist()
        expected = effects_of_all_scorers(model, gaps)
        for name, values in expected.items():
            of_ranks = values.abs().unflatten(-1, (2, 2)).amax(dim=(0, 1, 3))
            assert of_ranks.min() > 0.01, f"{name}: the heads of one rank do nothing"
        cases.append((num_groups, tied, gaps, expected))
    run_distributed(check_rank, 2, cases)
