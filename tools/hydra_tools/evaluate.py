"""``megatron-hydra evaluate``: needle tasks, perplexity and cache size of a list of models."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from megatron_hydra.errors import UserError
from megatron_hydra.evaluation.perplexity import perplexity, text_windows
from megatron_hydra.evaluation.results import (
    Evaluation,
    ModelResult,
    NeedleGrid,
    count_right,
    format_table,
)
from megatron_hydra.evaluation.ruler import (
    TaskSample,
    answered_right,
    make_task_samples,
    needle_depths,
)
from megatron_hydra.files import check_output, check_outputs, versions
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.cost import ModelShape, cache_bytes_per_token, state_bytes
from megatron_hydra.selection.needles import TASKS, NeedleTask, find_task
from megatron_hydra.selection.text import local_text, read_text, split_held_out
from megatron_hydra.selection.text_files import (
    FILES_HELP,
    add_text_options,
    find_texts,
    text_options,
)

if TYPE_CHECKING:
    from torch import Tensor

_COMPARED_CHARACTERS = 20_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "--model",
        required=True,
        action="append",
        metavar="NAME=FOLDER",
        help="a model and its name in the results; give as many as are to be compared",
    )
    parser.add_argument("--out", required=True, type=Path, help="the results to write (JSON)")
    parser.add_argument(
        "--tasks",
        default="single,multi_key",
        metavar="LIST",
        help=f"of {', '.join(TASKS)}, multi_key:N; the first one's needle grid is kept "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--lengths", type=_lengths, default=(256, 512, 1024), metavar="N,N,…", help="in tokens"
    )
    parser.add_argument(
        "--training-length", type=int, default=256, metavar="N", help="noted in the results"
    )
    parser.add_argument(
        "--num-samples", type=int, default=100, metavar="N", help="of each task at each length"
    )
    parser.add_argument("--depths", type=int, default=5, metavar="N", help="of the needle grid")
    parser.add_argument("--seed", type=int, default=1, help="of the samples")
    parser.add_argument(
        "--text",
        nargs="+",
        default=[],
        help=f"haystacks and perplexity text, of which a tenth, held out, is used: {FILES_HELP} "
        "(default: Python's documentation)",
    )
    add_text_options(parser)
    parser.add_argument(
        "--perplexity-tokens", type=int, default=16384, metavar="N", help="predicted at most"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(args: argparse.Namespace) -> int:
    """Evaluate every model on the same samples; write the results; print a table."""
    folders = parse_models(args.model)
    texts = find_texts(args.text, text_options(args))
    check_outputs([args.out], (*folders.values(), *args.text, *texts))
    check_output(args.out, args.overwrite, "file")
    if args.training_length < 1:
        raise UserError(f"--training-length is {args.training_length}; it must be above 0")
    tasks, depths = parse_tasks(args.tasks), needle_depths(args.depths)
    from megatron_hydra import cpu

    cpu.install_if_needed()
    from megatron_hydra.parallel import initialize_model_parallel

    for folder in folders.values():
        _check_readable(folder)
    text = read_text(texts, text_options(args)) if texts else local_text()
    tokenizer = _common_tokenizer(folders, text)
    # Held out, as far as the models were trained on the same text.
    _, held_out = split_held_out(tokenizer.encode(text, add_special_tokens=False))
    samples = make_task_samples(
        tokenizer, held_out, tasks, args.lengths, args.num_samples, depths, args.seed
    )
    windows = text_windows(held_out, args.lengths, args.perplexity_tokens)

    initialize_model_parallel()
    results = [
        _evaluate(name, folder, samples, windows, args.lengths) for name, folder in folders.items()
    ]
    provenance = {
        "command": shlex.join(["megatron-hydra", *sys.argv[1:]]),
        "text": " ".join(args.text) or "Python's documentation",
        "perplexity_tokens": len(windows) - 1,
        "seed": args.seed,
        "models": {name: _origin(folder) for name, folder in folders.items()},
        "versions": versions(),
    }
    Evaluation(tuple(results), args.training_length, provenance).save(args.out, args.overwrite)
    print("accuracy in % with 95% interval\n" + format_table(results))
    print(f"\nevaluation: {args.out}")
    return 0


def parse_models(arguments: Sequence[str]) -> dict[str, Path]:
    """Read ``NAME=FOLDER`` arguments.

    Raises:
        UserError: For an argument without ``=`` or a repeated name.
    """
    folders: dict[str, Path] = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not (name and equals and folder):
            raise UserError(f"--model {argument!r} must be NAME=FOLDER, as in teacher=models/qwen")
        if name in folders:
            raise UserError(f"--model names {name!r} twice: each model needs its own name")
        folders[name] = Path(folder)
    return folders


def parse_tasks(text: str) -> list[NeedleTask]:
    """Read a list of needle tasks, ``single,multi_key:4``; each stands once.

    Raises:
        UserError: For an unknown task or a repetition.
    """
    tasks: dict[str, NeedleTask] = {}
    for word in text.split(","):
        task = find_task(word)
        if task.name in tasks:
            raise UserError(f"--tasks names {word!r} twice: {text!r}")
        tasks[task.name] = task
    return list(tasks.values())


def _lengths(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of lengths: write 256,512")
    lengths = tuple(int(word) for word in words)
    if len(set(lengths)) < len(lengths):
        raise argparse.ArgumentTypeError(f"{text!r} names a length twice")
    return lengths


def _check_readable(folder: Path) -> None:
    """Read a model's small files, so that a bad folder is named before anything takes long."""
    from megatron_hydra.conversion.checkpoint import is_checkpoint_folder, read_metadata
    from megatron_hydra.conversion.qwen3 import read_qwen3_config

    if not is_checkpoint_folder(folder):
        read_qwen3_config(folder)
    elif read_metadata(folder)["kind"] == "hybrid":
        HeadPlan.load(folder / "plan.json")


def _origin(folder: Path) -> dict[str, Any]:
    """How a model and its plan came to be, as far as its folder says."""
    from megatron_hydra.conversion.checkpoint import is_checkpoint_folder, read_metadata

    if not is_checkpoint_folder(folder):
        return {"path": str(folder)}
    meta = read_metadata(folder)
    origin = {"path": str(folder), "weights": meta["provenance"]}
    if meta["kind"] == "hybrid":
        plan = HeadPlan.load(folder / "plan.json").provenance
        origin["plan"] = {key: value for key, value in plan.items() if key != "explanation"}
    return origin


def _common_tokenizer(folders: Mapping[str, Path], text: str) -> Any:
    """The models' tokenizer; samples are shared, so all must encode text alike."""
    from megatron_hydra.conversion.qwen3 import load_tokenizer

    tokenizers = {name: load_tokenizer(folder) for name, folder in folders.items()}
    first = next(iter(tokenizers))
    expected = tokenizers[first].encode(text[:_COMPARED_CHARACTERS], add_special_tokens=False)
    for name, tokenizer in tokenizers.items():
        if tokenizer.encode(text[:_COMPARED_CHARACTERS], add_special_tokens=False) != expected:
            raise UserError(
                f"models {first!r} and {name!r} have different tokenizers: "
                "models evaluated together share their samples"
            )
    return tokenizers[first]


def _evaluate(
    name: str,
    folder: Path,
    samples: Sequence[TaskSample],
    windows: Tensor,
    lengths: Sequence[int],
) -> ModelResult:
    from megatron_hydra.conversion.checkpoint import load_any_model

    loaded = load_any_model(folder)
    model, config, plan = loaded.model.eval(), loaded.config, loaded.plan
    shape = ModelShape.from_config(config)
    beyond = [length for length in lengths if length > config.seq_length]
    if beyond:
        print(
            f"{name} is built for {config.seq_length} tokens: its results at "
            f"{', '.join(map(str, beyond))} tokens are beyond that"
        )

    def progress(items: Any, description: str, unit: str) -> Any:
        return tqdm(items, desc=f"{name}: {description}", unit=unit)

    right = answered_right(model, [sample.sample for sample in samples], progress)
    return ModelResult(
        name=name,
        path=str(folder),
        plan=None if plan is None else tuple(layer.fa_heads for layer in plan.layers),
        plan_name="" if plan is None else str(plan.provenance.get("policy", "")),
        num_heads=config.num_layers * config.num_attention_heads,
        cache_bytes_per_token=int(cache_bytes_per_token(shape).of(plan)),
        state_bytes=int(state_bytes(shape).of(plan)),
        accuracy=count_right(samples, right, lambda sample: (sample.task, sample.length)),
        grid=NeedleGrid.count(samples[0].task, samples, right),
        perplexity={length: perplexity(model, windows, length, progress) for length in lengths},
    )
