"""`megatron-hydra evaluate`: models on needles and text, or on generation tasks; or by torchrun."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from hydra_tools import launch
from hydra_tools.named_folders import named_folders
from hydra_tools.progress import progress
from megatron_hydra.api.evaluate import PERPLEXITY_TOKENS, Questions, evaluate
from megatron_hydra.api.generate import Prompts, check_prompts, generate
from megatron_hydra.errors import UserError
from megatron_hydra.evaluation.generation import generation_table
from megatron_hydra.evaluation.lengths import LONGEST_UNASKED
from megatron_hydra.evaluation.results import format_table
from megatron_hydra.selection.cost import SERVE_DTYPES
from megatron_hydra.tasks.generation import GENERATION_TASKS
from megatron_hydra.tasks.needles import TASKS
from megatron_hydra.tasks.text import STAND_IN
from megatron_hydra.tasks.text_files import FILES_HELP, add_text_options, text_options
from megatron_hydra.tasks.wording import WORDINGS
from megatron_hydra.teachers.model_folder import is_checkpoint_folder

NEEDLES = "single,multi_key"
_GENERATION_ONLY = ("wording", "batch_size", "dump", "trust_remote_code", "tp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "--model",
        action="append",
        metavar="NAME=FOLDER",
        help="a model and its name in the results; give as many as are to be compared",
    )
    parser.add_argument("--out", type=Path, help="the results to write (JSON)")
    parser.add_argument(
        "--tasks",
        metavar="LIST",
        help=f"of {', '.join(TASKS)}, multi_key:N; the first one's needle grid is kept "
        f"(default: {NEEDLES}). By generation of {', '.join(GENERATION_TASKS)} (default: all)",
    )
    parser.add_argument(
        "--lengths",
        type=_lengths,
        metavar="N,N,…",
        help="in tokens (default: the training length, twice and four times that, as far as the "
        "models are built for them; where none is known, up to what they are built for, "
        f"{LONGEST_UNASKED} at most)",
    )
    parser.add_argument(
        "--training-length",
        type=int,
        metavar="N",
        help="noted in the results (default: the longest that a hybrid's folder names, else what "
        "the models are built for)",
    )
    parser.add_argument(
        "--serve-dtype",
        choices=tuple(SERVE_DTYPES),
        default="bf16",
        help="number format of the caches of all models when they serve, in which bytes are told "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--num-samples", type=int, default=100, metavar="N", help="of each task at each length"
    )
    parser.add_argument("--depths", type=int, metavar="N", help="of the needle grid (default: 5)")
    parser.add_argument("--seed", type=int, default=1, help="of the samples")
    parser.add_argument(
        "--text",
        nargs="+",
        default=[],
        help=f"haystacks and perplexity text, of which a tenth, held out, is used: {FILES_HELP} "
        "(default: Python's documentation, which stands in for text like what the models are for)",
    )
    add_text_options(parser)
    parser.add_argument(
        "--perplexity-tokens",
        type=int,
        metavar="N",
        help=f"predicted at most (default: {PERPLEXITY_TOKENS}, or one window of the longest); "
        "by generation: by position, in windows of the longest (default: none)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    _add_generation_arguments(parser)


def _add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation by generation")
    group.add_argument(
        "--generate",
        action="store_true",
        help="the models of --model, checkpoints or Hugging Face folders, answer RULER-style "
        "tasks by the text that they generate, greedily: checkpoints under Megatron, on the ranks "
        "of torchrun -m hydra_tools.evaluate too",
    )
    group.add_argument(
        "--hf",
        action="append",
        metavar="[NAME=]FOLDER",
        help="in place of --model, or with --generate beside it: a Hugging Face folder, of "
        "`export` or another, that answers so by transformers; give as many as are to be compared",
    )
    group.add_argument(
        "--wording",
        choices=tuple(WORDINGS),
        help="of the prompts: RULER's (default), or short, as the needles of `preprocess`",
    )
    group.add_argument("--batch-size", type=int, metavar="N", help="prompts answered together")
    group.add_argument(
        "--tp",
        type=int,
        metavar="N",
        help="tensor-parallel ranks that hold a model; the others share the prompts (default: all)",
    )
    group.add_argument(
        "--dump", type=Path, metavar="FILE", help="write the prompts (JSON lines), for any engine; "
        "without --out nothing else"
    )  # fmt: skip
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run a folder's model code even if it is not what this release exports",
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate every model on the same samples; write the results; print a table."""
    launch.check_launcher("evaluate")
    check_arguments(args)
    return _generate(args) if _generates(args) else _evaluate(args)


def _evaluate(args: argparse.Namespace) -> int:
    questions = Questions(
        tasks=tuple((args.tasks or NEEDLES).split(",")),
        lengths=args.lengths,
        training_length=args.training_length,
        num_samples=args.num_samples,
        num_depths=5 if args.depths is None else args.depths,
        seed=args.seed,
        texts=tuple(args.text),
        text_options=text_options(args),
        perplexity_tokens=args.perplexity_tokens,
    )
    evaluation = evaluate(
        _checkpoints(args),
        args.out,
        questions,
        serve_dtype=args.serve_dtype,
        overwrite=args.overwrite,
        progress=progress,
        tell=print,
    )
    table = format_table(evaluation.models, args.serve_dtype)
    print("accuracy in % with 95% interval\n" + table)
    if not args.text:
        print(f"text: {STAND_IN} (--text)")
    print(f"\nevaluation: {args.out}")
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """See that options stand with their kind of evaluation; of generation, what is asked too.

    Raises:
        UserError: If they do not, or a task or a number is not allowed.
    """
    if not (args.model or args.hf) or (args.model and args.hf and not args.generate):
        raise UserError(
            "name the models with --model, or with --hf to have them generate text; "
            "--generate takes both"
        )
    wrong, owner = _GENERATION_ONLY, "--generate or --hf"
    if _generates(args):
        wrong, owner = ("depths", "training_length"), "--model without --generate"
    elif os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("several ranks evaluate by generation alone: give --generate")
    for name in wrong:
        if getattr(args, name) not in (None, False):
            raise UserError(f"--{name.replace('_', '-')} is for {owner}")
    if args.out is None and not args.dump:
        raise UserError("--out is missing: name the file of the results")
    if _generates(args):
        check_prompts(_prompts(args), args.batch_size)


def _generates(args: argparse.Namespace) -> bool:
    return bool(args.generate or args.hf)


def _prompts(args: argparse.Namespace) -> Prompts:
    return Prompts(
        tasks=tuple(args.tasks.split(",")) if args.tasks else tuple(GENERATION_TASKS),
        lengths=args.lengths,
        num_samples=args.num_samples,
        perplexity_tokens=args.perplexity_tokens,
        seed=args.seed,
        wording=args.wording or "ruler",
        texts=tuple(args.text),
        text_options=text_options(args),
    )


def _generate(args: argparse.Namespace) -> int:
    found = generate(
        _models(args),
        args.out,
        _prompts(args),
        dump=args.dump,
        batch_size=args.batch_size,
        tensor_parallel=args.tp,
        trust_remote_code=args.trust_remote_code,
        serve_dtype=args.serve_dtype,
        overwrite=args.overwrite,
        progress=progress,
        tell=print,
    )
    if launch.rank() != 0:
        return 0
    if args.dump:
        print(f"prompts: {args.dump}")
    if found is not None:
        print(f"{generation_table(found)}\n\nevaluation: {args.out}")
    return 0


def _models(args: argparse.Namespace) -> dict[str, Path]:
    """Those of --hf, then those of --model."""
    folders = named_folders("--hf", args.hf or (), "model")
    for folder in folders.values():
        if is_checkpoint_folder(folder):
            raise UserError(
                f"{folder} is a checkpoint folder: `export` makes a Hugging Face folder of it; "
                "or name it with --model and --generate"
            )
    others = _checkpoints(args)
    if twice := sorted(folders.keys() & others.keys()):
        raise UserError(f"--hf and --model both name {twice[0]!r}: each model needs its own name")
    return folders | others


def _checkpoints(args: argparse.Namespace) -> dict[str, Path]:
    """Those of --model."""
    return named_folders("--model", args.model or (), "model", "teacher=models/qwen")


def _lengths(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of lengths: write 256,512")
    lengths = tuple(int(word) for word in words)
    if len(set(lengths)) < len(lengths):
        raise argparse.ArgumentTypeError(f"{text!r} names a length twice")
    return lengths


if __name__ == "__main__":
    sys.exit(launch.main("evaluate"))
