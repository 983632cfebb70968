"""Control rankings: what each puts first, and that every head has a rank of its own."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_hydra.errors import UserError
from megatron_hydra.selection.scorers.controls import CONTROLS, control_effects


def first(effects: np.ndarray, count: int) -> set[tuple[int, int]]:
    """Layer and head of the ``count`` largest effects."""
    order = np.argsort(-effects[0], axis=None)[:count]
    return {(int(i) // effects.shape[2], int(i) % effects.shape[2]) for i in order}


@pytest.mark.parametrize("name", CONTROLS)
def test_every_head_has_a_rank_of_its_own(name: str) -> None:
    """Catches: ties, which a plan would break by something else than the control."""
    effects = control_effects(name, 5, 6)
    assert effects.shape == (1, 5, 6)
    np.testing.assert_allclose(np.sort(effects, axis=None), np.arange(1, 31) / 30)


def test_fixed_takes_the_same_heads_of_every_layer() -> None:
    effects = control_effects("fixed", 5, 6)
    assert first(effects, 10) == {(layer, head) for layer in range(5) for head in (0, 1)}


def test_every_nth_takes_whole_layers() -> None:
    effects = control_effects("every_nth", 8, 3)
    assert first(effects, 6) == {(layer, head) for layer in (3, 7) for head in range(3)}
    effects = control_effects("every_nth", 7, 3, every=3)
    assert first(effects, 6) == {(layer, head) for layer in (2, 5) for head in range(3)}
    assert first(effects, 7) - first(effects, 6) == {(0, 0)}


def test_random_follows_its_seed_and_favours_no_head() -> None:
    """Catches: a seed not used, a lot drawn per layer."""
    same, again, other = (control_effects("random", 5, 6, seed=seed) for seed in (3, 3, 4))
    assert (same == again).all() and (same != other).any()
    mean = np.mean([control_effects("random", 5, 6, seed=seed) for seed in range(2000)], axis=0)
    np.testing.assert_allclose(mean, 31 / 60, atol=0.04)
    per_layer = {
        len({layer for layer, _ in first(control_effects("random", 5, 6, seed=s), 5)})
        for s in range(50)
    }
    assert len(per_layer) > 1


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(UserError, match="unknown control 'rand'; known controls: random, fixed"):
        control_effects("rand", 2, 4)
    with pytest.raises(UserError, match="every layer number 9; allowed: 1 to 8"):
        control_effects("every_nth", 8, 3, every=9)
