"""Loss by position: what a model makes of more and more text before the token that it predicts.

Free of PyTorch at import, so that the report starts quickly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from megatron_hydra.errors import UserError
from megatron_hydra.evaluation.lengths import check_held_out, check_window
from megatron_hydra.schema import Count, Limits

FIRST_BUCKET = 64
"""Positions of the first bucket; each further one ends at twice as many."""


@dataclass(frozen=True)
class PositionLoss:
    """A bucket of positions. A token's position is the number of tokens before it in its window.

    Attributes:
        first: Position.
        last: Position, in the bucket too.
        num_tokens: That were predicted, over all windows.
        loss_nats: Their mean next-token loss.
    """

    first: Count
    last: Count
    num_tokens: Count
    loss_nats: Annotated[float, Limits(least=0)]


def position_windows(
    text_tokens: Sequence[int], length: int, max_tokens: int
) -> list[Sequence[int]]:
    """Cut held-out text into whole windows, of which each token is predicted once.

    Args:
        text_tokens: Held-out text.
        length: Tokens that a window predicts.
        max_tokens: That all windows predict, at most.

    Returns:
        Windows of `length + 1` tokens, each beginning with the last of the one before.

    Raises:
        UserError: If the text, or `max_tokens`, is too short for one window.
    """
    check_window(length, max_tokens)
    check_held_out(length, len(text_tokens))
    number = min(len(text_tokens) - 1, max_tokens) // length
    return [text_tokens[i * length : (i + 1) * length + 1] for i in range(number)]


def loss_by_position(losses: Sequence[float], num_windows: int) -> tuple[PositionLoss, ...]:
    """Bucket the losses of windows: positions 1 to 64, to 128, to 256 and so on.

    Args:
        losses: In nats, of positions 1, 2, ..., each the mean over the windows.
        num_windows: Of which they are the means.

    Raises:
        UserError: If a loss is not finite.
    """
    if not all(map(math.isfinite, losses)):
        raise UserError(f"the model's loss on text at {len(losses)} tokens is not finite")
    found, start = [], 0
    while start < len(losses):
        part = losses[start : max(FIRST_BUCKET, 2 * start)]
        mean = max(0.0, math.fsum(part) / len(part))
        found.append(PositionLoss(start + 1, start + len(part), num_windows * len(part), mean))
        start += len(part)
    return tuple(found)
