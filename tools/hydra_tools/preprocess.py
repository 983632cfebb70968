"""`megatron-hydra preprocess`: text, with or without retrieval, to a Megatron indexed dataset."""

from __future__ import annotations

import argparse
import random
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hydra_tools.progress import meter, progress
from megatron_hydra.disk import check_space
from megatron_hydra.errors import UserError
from megatron_hydra.files import check_outputs, versions
from megatron_hydra.tasks.text_files import (
    FILES_HELP,
    add_text_options,
    find_texts,
    read_pieces,
    text_options,
)
from megatron_hydra.teachers.tokenizer import find_tokenizer, load_tokenizer
from megatron_hydra.training.indexed_dataset import check_dataset_output, dataset_files

_RETRIEVAL_ARGUMENTS = ("seq_length", "num_documents")
_LEAST_TOKEN_BYTES = 2

Pieces = Iterator[tuple[np.ndarray, bool]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "--input", nargs="+", help=f"{FILES_HELP} (default: Python's documentation)"
    )
    parser.add_argument(
        "--tokenizer", required=True, type=Path, help="tokenizer, model or checkpoint folder"
    )
    parser.add_argument("--out", required=True, type=Path, help="prefix of the files to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    add_text_options(parser)
    parser.add_argument(
        "--end-of-document",
        metavar="TOKEN",
        help="token after each document, at which a plain text file is divided too (default: "
        "<|endoftext|> where the tokenizer has it, else its eos_token)",
    )
    parser.add_argument(
        "--special-tokens-as-text",
        action="store_true",
        help="take special tokens that are spelt in the text, <|im_end|> for example, for text, "
        "and each plain text file for one document; without this option they become those tokens",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="processes that tokenise; the dataset is the same for any number (default: 1)",
    )
    mixed = parser.add_argument_group("documents of one length, with retrieval")
    mixed.add_argument(
        "--retrieval-fraction", type=float, metavar="F", help="share of retrieval documents"
    )
    mixed.add_argument("--seq-length", type=int, metavar="L", help="tokens a document")
    mixed.add_argument("--num-documents", type=int, metavar="N")
    mixed.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Write the dataset; print what it holds."""
    files = _check(args)
    num_bytes = sum(path.stat().st_size for path in files)
    if files:
        source = files[0] if len(files) == 1 else f"{len(files)} files"
        print(f"text: {source}, {num_bytes / 2**20:,.1f} MiB", flush=True)
    from megatron_hydra import cpu

    cpu.install_if_needed()
    from megatron_hydra.teachers.token_ids import end_of_document, num_token_ids
    from megatron_hydra.training.indexed_dataset import write_pieces

    tokenizer = load_tokenizer(args.tokenizer)
    end = end_of_document(tokenizer, args.end_of_document)
    make = _plain_documents if args.retrieval_fraction is None else _mixed_documents
    num_documents, num_tokens = write_pieces(
        args.out,
        make(args, files, tokenizer, end),
        num_token_ids(tokenizer),
        {
            "command": shlex.join(["megatron-hydra", *sys.argv[1:]]),
            "seed": args.seed,
            "versions": versions(),
        },
        args.overwrite,
        end,
    )
    print(f"dataset: {args.out} ({num_documents:,} documents, {num_tokens:,} tokens)")
    return 0


def _check(args: argparse.Namespace) -> list[Path]:
    """Check all that is known before the slow imports; return the files to read."""
    _check_retrieval(args)
    if args.processes < 1:
        raise UserError(f"--processes is {args.processes}; it must be 1 or more")
    names = args.input or ()
    files = find_texts(names, text_options(args))
    check_outputs(dataset_files(args.out), (*names, *files, args.tokenizer))
    check_dataset_output(args.out, args.overwrite)
    find_tokenizer(args.tokenizer)
    if args.retrieval_fraction is not None:
        check_space(args.out, args.num_documents * args.seq_length * _LEAST_TOKEN_BYTES)
    return files


def _check_retrieval(args: argparse.Namespace) -> None:
    if args.retrieval_fraction is None:
        for name in _RETRIEVAL_ARGUMENTS:
            if getattr(args, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} needs --retrieval-fraction")
        return
    if not 0.0 <= args.retrieval_fraction <= 1.0:
        raise UserError(f"--retrieval-fraction is {args.retrieval_fraction}; allowed: 0 to 1")
    for name in _RETRIEVAL_ARGUMENTS:
        value = getattr(args, name)
        if value is None or value < 1:
            raise UserError(
                f"--retrieval-fraction needs --{name.replace('_', '-')} of 1 or more, not {value}"
            )


def _plain_documents(
    args: argparse.Namespace, files: Sequence[Path], tokenizer: Any, end: tuple[str, int]
) -> Pieces:
    """Each text with the end-of-document token after it."""
    separator = None if args.special_tokens_as_text else end[0]
    # Nothing is known of a pipe's size.
    total = (sum(path.stat().st_size for path in files) or None) if files else 0
    with meter("text", "B", total, unit_scale=True, unit_divisor=1024) as shown:
        texts = (
            read_pieces(files, text_options(args), separator, shown.update)
            if files
            else iter([(_local_text(), True)])
        )
        last = None
        for tokens, is_end in _encode(args, tokenizer, texts):
            last = tokens[-1] if len(tokens) else last
            is_open = is_end and last not in (None, end[1])  # else empty, or it has its end
            yield (np.append(tokens, end[1]) if is_open else tokens), is_end
            last = None if is_end else last


def _mixed_documents(
    args: argparse.Namespace, files: Sequence[Path], tokenizer: Any, end: tuple[str, int]
) -> Pieces:
    """Documents of equal length, so that training samples and documents coincide."""
    from megatron_hydra.tasks.text import read_text, split_held_out
    from megatron_hydra.tasks.training_documents import (
        make_text_document,
        make_training_document,
    )

    text = read_text(files, text_options(args)) if files else _local_text()
    pieces = [tokens for tokens, _ in _encode(args, tokenizer, [(text, True)])]
    tokens, _ = split_held_out(np.concatenate(pieces).tolist())
    rng = random.Random(args.seed)
    for _ in progress(range(args.num_documents), "documents", "document"):
        if rng.random() < args.retrieval_fraction:
            document = make_training_document(rng, tokenizer, tokens, args.seq_length, end=end[1])
        else:
            document = make_text_document(rng, tokens, args.seq_length, end[1])
        yield np.array(document.tokens), True


def _local_text() -> str:
    from megatron_hydra.tasks.text import stand_in_text

    return stand_in_text("--input")


def _encode(args: argparse.Namespace, tokenizer: Any, texts: Any) -> Pieces:
    from hydra_tools.encoding import encode_pieces

    return encode_pieces(tokenizer, texts, args.special_tokens_as_text, args.processes)
