"""`megatron-hydra preprocess`: text, with or without retrieval, to a Megatron indexed dataset."""

from __future__ import annotations

import argparse
import random
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_hydra.errors import UserError
from megatron_hydra.files import check_outputs, versions

_RETRIEVAL_ARGUMENTS = ("seq_length", "num_documents")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "--input",
        type=Path,
        help="a text file, or .jsonl with a text field a line (default: Python's documentation)",
    )
    parser.add_argument(
        "--tokenizer", required=True, type=Path, help="tokenizer, model or checkpoint folder"
    )
    parser.add_argument("--out", required=True, type=Path, help="prefix of the files to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    mixed = parser.add_argument_group("documents of one length, with retrieval")
    mixed.add_argument(
        "--retrieval-fraction", type=float, metavar="F", help="share of retrieval documents"
    )
    mixed.add_argument("--seq-length", type=int, metavar="L", help="tokens a document")
    mixed.add_argument("--num-documents", type=int, metavar="N")
    mixed.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Write the dataset; print what it holds."""
    _check(args)
    from megatron_hydra import cpu

    cpu.install_if_needed()
    from megatron_hydra.conversion.qwen3 import load_tokenizer
    from megatron_hydra.nemo.indexed_dataset import (
        check_dataset_output,
        dataset_files,
        write_indexed_dataset,
    )

    check_outputs(dataset_files(args.out), (args.input, args.tokenizer))
    check_dataset_output(args.out, args.overwrite)
    tokenizer = load_tokenizer(args.tokenizer)
    mixed = args.retrieval_fraction is not None
    documents = _mixed_documents(args, tokenizer) if mixed else _plain_documents(args, tokenizer)
    total = args.num_documents if mixed else None
    num_documents, num_tokens = write_indexed_dataset(
        args.out,
        tqdm(documents, desc="documents", total=total, unit="document"),
        len(tokenizer),
        {
            "command": shlex.join(["megatron-hydra", *sys.argv[1:]]),
            "seed": args.seed,
            "versions": versions(),
        },
        args.overwrite,
    )
    print(f"dataset: {args.out} ({num_documents:,} documents, {num_tokens:,} tokens)")
    return 0


def _check(args: argparse.Namespace) -> None:
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


def _plain_documents(args: argparse.Namespace, tokenizer: Any) -> Iterator[list[int]]:
    """Each text with the end-of-document token after it."""
    from megatron_hydra.nemo.indexed_dataset import read_texts
    from megatron_hydra.selection.text import local_text

    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {args.tokenizer} has no end-of-text token")
    texts = read_texts(args.input, tokenizer.eos_token) if args.input else iter([local_text()])
    for text in texts:
        tokens = _encode(tokenizer, text)
        if tokens:
            yield [*tokens, tokenizer.eos_token_id]


def _mixed_documents(args: argparse.Namespace, tokenizer: Any) -> Iterator[list[int]]:
    """Documents of equal length, so that training samples and documents coincide."""
    from megatron_hydra.selection.text import local_text, read_text, split_held_out
    from megatron_hydra.selection.training_documents import (
        make_text_document,
        make_training_document,
    )

    text = read_text(args.input) if args.input else local_text()
    tokens, _ = split_held_out(_encode(tokenizer, text))
    rng = random.Random(args.seed)
    for _ in range(args.num_documents):
        if rng.random() < args.retrieval_fraction:
            yield make_training_document(rng, tokenizer, tokens, args.seq_length).tokens
        else:
            yield make_text_document(rng, tokens, args.seq_length).tokens


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
