"""Pieces of text to token ids: in this process or in several, the same ids in the same order."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import numpy as np

from megatron_hydra.errors import UserError
from megatron_hydra.processes import end_with_parent
from megatron_hydra.teachers.token_ids import cut_pieces, encode

_BATCH_CHARACTERS = 2**18
_BATCH_PIECES = 1024

Texts = list[tuple[str, bool]]
Tokens = list[tuple[np.ndarray, bool]]


def encode_pieces(
    tokenizer: Any,
    pieces: Iterable[tuple[str, bool]],
    special_as_text: bool = False,
    num_processes: int = 1,
) -> Iterator[tuple[np.ndarray, bool]]:
    """The ids of documents, piece by piece, in as little memory as their texts allow.

    Args:
        tokenizer: transformers' tokenizer.
        pieces: Running parts of documents; True where a document ends.
        special_as_text: Take special tokens that are spelt in a text for text.
        num_processes: Processes that encode; 1 is this one, on all cores that the tokenizer uses.

    Raises:
        UserError: If a process was killed.
    """
    if num_processes > 1:
        # Set before the tokenizer's first use: threads of its own would not survive a fork.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    batches = _batches(cut_pieces(tokenizer, pieces, special_as_text))
    encoded: Iterator[Tokens]
    if num_processes == 1:
        encoded = (_encode_batch(tokenizer, special_as_text, batch) for batch in batches)
    else:
        encoded = _in_processes(tokenizer, special_as_text, batches, num_processes)
    for batch in encoded:
        yield from batch


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[Texts]:
    batch: Texts = []
    num_characters = 0
    for piece in pieces:
        batch.append(piece)
        num_characters += len(piece[0])
        if num_characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_PIECES:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _encode_batch(tokenizer: Any, special_as_text: bool, batch: Texts) -> Tokens:
    ids = encode(tokenizer, [text for text, _ in batch], special_as_text)
    return [
        (np.array(tokens, np.int64), is_end) for tokens, (_, is_end) in zip(ids, batch, strict=True)
    ]


_worker: tuple[Any, bool]
"""Of a process that encodes: its tokenizer and whether special tokens are text."""


def _start_worker(tokenizer: Any, special_as_text: bool, parent: int) -> None:
    global _worker
    _worker = (tokenizer, special_as_text)
    # Each holds the others' pipes open: none would hear that the first process was killed.
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _work(batch: Texts) -> Tokens:
    return _encode_batch(*_worker, batch)


def _in_processes(
    tokenizer: Any, special_as_text: bool, batches: Iterable[Texts], num_processes: int
) -> Iterator[Tokens]:
    # Forked, so that none loads the tokenizer anew.
    pool = ProcessPoolExecutor(
        num_processes,
        get_context("fork"),
        _start_worker,
        (tokenizer, special_as_text, os.getpid()),
    )
    waiting: deque[Future[Tokens]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_work, batch))
            if len(waiting) > 2 * num_processes:  # no more of the text in memory than that
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {num_processes} processes was killed, most likely for want of memory: ask "
            "for fewer"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
