"""Where a kernel's backward writes its gradients: to memory of its own or of its caller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def gradient_memory(
    inputs: Sequence[Tensor | None],
    empty_gradients: Callable[[], list[Tensor]] | None,
    empty_like: Callable[[Tensor], Tensor],
) -> list[Tensor | None]:
    """A tensor for the gradient of each input, None for None.

    Args:
        inputs: What they are the gradients of.
        empty_gradients: Makes those of all inputs that are not None; None for `empty_like`'s.
        empty_like: Makes that of one input.
    """
    given = [x for x in inputs if x is not None]
    made = iter(map(empty_like, given) if empty_gradients is None else empty_gradients())
    return [None if x is None else next(made) for x in inputs]
