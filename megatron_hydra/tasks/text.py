"""Running text for haystacks, training and calibration: where it comes from and how it is drawn."""

from __future__ import annotations

import ast
import functools
import logging
import os
import random
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from megatron_hydra.errors import UserError
from megatron_hydra.tasks.broken_lines import BrokenLines
from megatron_hydra.tasks.text_files import TextOptions, find_texts, read_pieces

_DEFAULT_OPTIONS = TextOptions()
MIN_TEXT_CHARACTERS = 20_000
STAND_IN = "Python's documentation, a stand-in: no text was named"
"""What provenance says of :func:`stand_in_text`."""

_logger = logging.getLogger(__name__)


def stand_in_text(option: str) -> str:
    """:func:`local_text` where a user named no text, with a warning.

    Args:
        option: What names a text, as the warning says it.
    """
    if os.environ.get("RANK", "0") == "0":  # once, not on every rank of torchrun
        _logger.warning(
            "no text was named, and Python's documentation stands in for it: name a file of text "
            "like what the model is for with %s",
            option,
        )
    return local_text()


@functools.cache  # reading it takes seconds
def local_text() -> str:
    """English text that every CPython carries; the same for a given Python version.

    The language reference of ``pydoc`` and the docstrings of the standard library's top-level
    modules, about 1.3 million characters.

    Raises:
        UserError: If this Python has no standard library sources.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("this Python carries no pydoc topics: name a text file instead") from error
    parts = [topics[name] for name in sorted(topics)]
    folder = Path(sysconfig.get_path("stdlib"))
    modules = [path for path in sorted(folder.glob("*.py")) if path.stem in sys.stdlib_module_names]
    if not modules:
        raise UserError(f"{folder} holds no standard library sources: name a text file instead")
    for path in modules:
        parts.extend(_docstrings(path))
    return "\n\n".join(parts)


def read_text(
    names: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    options: TextOptions = _DEFAULT_OPTIONS,
    num_characters: int | None = None,
    broken: BrokenLines | None = None,
) -> str:
    """Read files to serve as haystack and language-model text, documents a blank line apart.

    Args:
        names: One or several files, folders or patterns.
        options: How they are read.
        num_characters: So many are enough; what follows them may be left unread.
        broken: As :func:`~megatron_hydra.tasks.text_files.read_pieces` takes it.

    Raises:
        UserError: As :func:`~megatron_hydra.tasks.text_files.read_pieces`, or if the text is
            too short.
    """
    files = find_texts([names] if isinstance(names, str | os.PathLike) else names, options)
    enough = None if num_characters is None else max(num_characters, MIN_TEXT_CHARACTERS)
    documents = [""]
    num_read = 0
    for piece in read_pieces(files, options, broken=broken):
        documents[-1] += piece.text
        documents.extend([""] * piece.is_end)
        num_read += len(piece.text.strip())
        if enough is not None and num_read >= enough:
            break
    text = "\n\n".join(document for document in documents if document)
    if len(text.strip()) < MIN_TEXT_CHARACTERS:
        raise UserError(
            f"the text of {files[0] if len(files) == 1 else f'{len(files)} files'} has "
            f"{len(text.strip())} characters; at least {MIN_TEXT_CHARACTERS} are needed"
        )
    return text


def split_held_out(text_tokens: Sequence[int]) -> tuple[list[int], list[int]]:
    """Cut text into 100 blocks and hold every tenth out: (training tokens, held-out tokens)."""
    edges = [len(text_tokens) * i // 100 for i in range(101)]
    training: list[int] = []
    held_out: list[int] = []
    for i, (start, stop) in enumerate(pairwise(edges)):
        (held_out if i % 10 == 9 else training).extend(text_tokens[start:stop])
    return training, held_out


def draw_text(rng: random.Random, text_tokens: Sequence[int], num_tokens: int) -> list[int]:
    """Draw a running piece of ``num_tokens`` tokens; UserError if the text is shorter."""
    check_text(text_tokens, num_tokens)
    start = rng.randint(0, len(text_tokens) - num_tokens)
    return list(text_tokens[start : start + num_tokens])


def check_text(text_tokens: Sequence[int], num_tokens: int) -> None:
    """Raise a UserError if the text has fewer tokens than are needed."""
    if num_tokens > len(text_tokens):
        raise UserError(
            f"the text has {len(text_tokens)} tokens, but {num_tokens} are needed: give more text "
            "or ask for a shorter length"
        )


def _docstrings(path: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, documented):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
