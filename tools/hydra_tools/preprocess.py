"""`megatron-hydra preprocess`: text, with or without retrieval, to a Megatron indexed dataset."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from hydra_tools.progress import meter, progress
from megatron_hydra.api.preprocess import Retrieval, Source, preprocess
from megatron_hydra.errors import UserError
from megatron_hydra.tasks.text_files import (
    FILES_HELP,
    add_text_options,
    text_options,
)
from megatron_hydra.training.document_lengths import describe_lengths

_RETRIEVAL_ARGUMENTS = ("seq_length", "num_documents")


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
        "<|endoftext|> or <|end_of_text|> where the tokenizer has it, else its eos_token)",
    )
    parser.add_argument(
        "--special-tokens-as-text",
        action="store_true",
        help="take special tokens that are spelt in the text, <|im_end|> for example, for text, "
        "and each plain text file for one document; without this option they become those tokens",
    )
    parser.add_argument(
        "--max-broken-lines",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N JSON lines and parquet rows that hold no text, and say at the end "
        "which (default: 0, the first ends the command)",
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
    mixed.add_argument("--seq-length", type=int, metavar="L", help="tokens per document")
    mixed.add_argument("--num-documents", type=int, metavar="N")
    mixed.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Write the dataset; print what it holds."""
    retrieval = _retrieval(args)
    texts = tuple(args.input or ())
    source = Source(
        texts,
        text_options(args),
        args.end_of_document,
        args.special_tokens_as_text,
        args.max_broken_lines,
    )
    bars: list[Any] = []
    with ExitStack() as stack:

        def on_bytes(num: int, total: int) -> None:
            if not bars:
                bar = meter("text", "B", total or None, unit_scale=True, unit_divisor=1024)
                bars.append(stack.enter_context(bar))
            bars[0].update(num)

        done = preprocess(
            args.tokenizer,
            args.out,
            source,
            retrieval,
            num_processes=args.processes,
            overwrite=args.overwrite,
            progress=progress,
            on_bytes=on_bytes,
            tell=partial(print, flush=True),
        )
    print(f"dataset: {done.prefix} ({done.num_documents:,} documents, {done.num_tokens:,} tokens)")
    if done.broken.found:
        print(done.broken.in_words())
    print(describe_lengths([str(done.prefix)]))
    return 0


def _retrieval(args: argparse.Namespace) -> Retrieval | None:
    if args.retrieval_fraction is None:
        for name in _RETRIEVAL_ARGUMENTS:
            if getattr(args, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} needs --retrieval-fraction")
        return None
    for name in _RETRIEVAL_ARGUMENTS:
        value = getattr(args, name)
        if value is None or value < 1:
            raise UserError(
                f"--retrieval-fraction needs --{name.replace('_', '-')} of 1 or more, not {value}"
            )
    return Retrieval(args.retrieval_fraction, args.seq_length, args.num_documents, args.seed)
