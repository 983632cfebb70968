"""What is asked of a tokenizer: a text's ids piece by piece, a document's end, the largest id."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from megatron_hydra.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")
"""The token between documents where a tokenizer has it: chat tokenizers end a *turn* with their
`eos_token`."""

PIECE_CHARACTERS = 2**16
"""Of a long document in one piece; a tokenizer takes some 180 bytes of memory per character."""

_LINE_START = re.compile(r"\n(?=\S)")
_WORD_END = re.compile(r"\w(?=\W)")
_SEEN_CHARACTERS = 256
_TRIED_CUTS = 8


def end_of_document(tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> tuple[str, int]:
    """The token that ends a document: its text and its id.

    Args:
        tokenizer: transformers' tokenizer.
        name: The token's text; None: the first of :data:`ENDS_OF_TEXT` that it has, or
            `eos_token` where it has none.

    Raises:
        UserError: If the tokenizer has no such token.
    """
    vocabulary = tokenizer.get_vocab()
    if name is not None and name not in vocabulary:
        raise UserError(f"the tokenizer has no token {name!r} to end documents with")
    for token in (name, *ENDS_OF_TEXT, tokenizer.eos_token):
        if token is not None and token in vocabulary:
            return str(token), vocabulary[token]
    raise UserError(
        f"the tokenizer has none of {', '.join(ENDS_OF_TEXT)} and no eos_token: name the token "
        "that ends documents (--end-of-document, data.end_of_document)"
    )


def ends_of_generation(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a generated text: a turn's and a document's; empty without either."""
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # Without an end texts go on to the length that is asked for.
    with contextlib.suppress(UserError):
        ends.append(end_of_document(tokenizer)[1])
    return list(dict.fromkeys(ends))


def num_token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id that can occur, plus one; more than there are tokens where ids have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special_as_text: bool = False
) -> list[list[int]]:
    """The ids of each text.

    Args:
        tokenizer: transformers' tokenizer.
        texts: Whole texts, or pieces of :func:`cut_pieces`.
        special_as_text: Take special tokens that are spelt in a text for text.
    """
    found = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=special_as_text,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = found["input_ids"]
    return ids


def cut_pieces(
    tokenizer: PreTrainedTokenizerBase,
    pieces: Iterable[tuple[str, bool]],
    special_as_text: bool = False,
    num_characters: int = PIECE_CHARACTERS,
) -> Iterator[tuple[str, bool]]:
    """Cut long documents where the tokenizer parts them too, so that the ids stay the same.

    A cut is made at the start of a line or after a word, and only where the text around it has the
    same ids with and without: a tokenizer that parts nowhere, or marks the start of each text, gets
    the whole document.

    Args:
        tokenizer: transformers' tokenizer.
        pieces: Running parts of documents, cut anywhere; True where a document ends.
        special_as_text: As for :func:`encode`.
        num_characters: Least length of a piece that is not its document's last.
    """
    rest, tried = "", 0
    for text, is_end in pieces:
        rest += text
        start = 0
        while len(rest) - max(start, tried) > 2 * num_characters:
            tried = max(start, tried) + num_characters
            cut = _safe_cut(tokenizer, rest, tried, special_as_text)
            if cut is not None:
                yield rest[start:cut], False
                start = cut
        rest, tried = rest[start:], max(0, tried - start)
        if is_end:
            yield rest, True
            rest, tried = "", 0


def _safe_cut(
    tokenizer: PreTrainedTokenizerBase, text: str, start: int, special_as_text: bool
) -> int | None:
    """The first place from ``start`` on where a cut changes no id; None if none is found."""
    for pattern in (_LINE_START, _WORD_END):
        places = pattern.finditer(text, start, len(text) - _SEEN_CHARACTERS)
        for place in islice(places, _TRIED_CUTS):
            cut = place.end()
            left, right = (
                text[max(0, cut - _SEEN_CHARACTERS) : cut],
                text[cut : cut + _SEEN_CHARACTERS],
            )
            whole, *parts = encode(tokenizer, [left + right, left, right], special_as_text)
            if whole == parts[0] + parts[1]:
                return cut
    return None
