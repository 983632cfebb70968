"""The lengths that models are measured at, where the user names none: those they were made for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_hydra.errors import UserError

LONGEST_UNASKED = 8192
"""Tokens; longer lengths take long, and are measured when asked for or trained on."""
_SHARES = (4, 2, 1)
_MULTIPLES = {1: "the training length", 2: "twice", 4: "four times"}


@dataclass(frozen=True)
class Reach:
    """How far a model goes, by its folder.

    Attributes:
        built_for: Tokens that it can take: `max_position_embeddings`, or what it was trained on if
            that is more.
        trained_on: Tokens of a sample in its last training; None if the folder does not say.
    """

    built_for: int
    trained_on: int | None = None


class Choice(NamedTuple):
    """A length or lengths in tokens, and whence they come, in words."""

    lengths: tuple[int, ...]
    words: str


def training_length(models: Mapping[str, Reach]) -> Choice:
    """The longest length that a model says it was trained on, else what all are built for."""
    trained = {name: reach.trained_on for name, reach in models.items() if reach.trained_on}
    if not trained:
        built_for = _built_for(models)
        words = f"{built_for:,} tokens, what the models are built for: no folder names its own"
        return Choice((built_for,), words)
    name = max(trained, key=lambda name: trained[name])
    return Choice((trained[name],), f"{trained[name]:,} tokens, by the folder of {name!r}")


def default_lengths(models: Mapping[str, Reach], trained_on: int | None, most: int) -> Choice:
    """Lengths at which models show what they were made for.

    Args:
        models: All that are compared; each length should suit all.
        trained_on: The training length, if one is known: it, its double and its fourfold, as far
            as the models are built for them. Else what they are built for, its half and its
            quarter, from :data:`LONGEST_UNASKED` down.
        most: Tokens of the held-out text; longer lengths are left out, but for the first.
    """
    built_for = _built_for(models)
    if trained_on is None:
        longest = min(built_for, LONGEST_UNASKED, most)
        lengths = tuple(max(1, longest // share) for share in _SHARES)
        words = "what the models are built for"
        if longest < built_for:
            words = f"up to {longest:,} of the {built_for:,} tokens that the models are built for"
        return Choice(tuple(dict.fromkeys(lengths)), words)
    limit = min(built_for, most)
    lengths = tuple(trained_on * n for n in _MULTIPLES if n == 1 or trained_on * n <= limit)
    words = ", ".join(list(_MULTIPLES.values())[: len(lengths)])
    if len(lengths) < len(_MULTIPLES):
        why = "the models are built for" if limit == built_for else "there is text for"
        words += f"; no longer, as {limit:,} tokens are what {why}"
    return Choice(lengths, words)


def tell_beyond(
    name: str, built_for: int | None, lengths: Sequence[int], tell: Callable[[str], None]
) -> None:
    """Tell which lengths are more tokens than the model is built for, if its folder says that."""
    beyond = [length for length in lengths if built_for is not None and length > built_for]
    if beyond:
        tell(
            f"{name} is built for {built_for} tokens: its results at "
            f"{', '.join(map(str, beyond))} tokens are beyond that"
        )


def check_window(longest: int, max_tokens: int) -> None:
    """Raise a UserError if the tokens to predict are fewer than one window of the longest."""
    if longest > max_tokens:
        raise UserError(
            f"--perplexity-tokens is {max_tokens}, less than one window of {longest} tokens: ask "
            f"for {longest} or more, or for --lengths up to {max_tokens}"
        )


def check_held_out(longest: int, num_tokens: int) -> None:
    """Raise a UserError if held-out text of so many tokens has not one window of the longest."""
    if longest > num_tokens - 1:
        raise UserError(
            f"a length of {longest} tokens needs {longest + 1} tokens of held-out text, and there "
            f"are {num_tokens}: ask for --lengths up to {max(0, num_tokens - 1)}, or give "
            "more --text"
        )


def _built_for(models: Mapping[str, Reach]) -> int:
    return min(reach.built_for for reach in models.values())
