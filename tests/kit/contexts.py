"""The inference contexts that a piece of work decodes with, which it makes and lets go itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from megatron.core.inference.contexts import StaticInferenceContext

from megatron_hydra.model import generation


def contexts_of(work: Callable[[], object]) -> list[StaticInferenceContext]:
    """Do it, and return every context that was made meanwhile, with what it then holds."""
    contexts = []

    def keep(*sizes: int) -> StaticInferenceContext:
        contexts.append(StaticInferenceContext(*sizes))
        return contexts[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "StaticInferenceContext", keep)
        work()
    return contexts
