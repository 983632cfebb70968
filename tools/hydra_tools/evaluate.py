"""``megatron-hydra evaluate``: needle tasks, perplexity and cache size of a list of models."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_tools.progress import progress
from megatron_hydra.errors import UserError
from megatron_hydra.evaluation.lengths import (
    LONGEST_UNASKED,
    Choice,
    Reach,
    check_window,
    default_lengths,
    training_length,
)
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
    check_num_samples,
    make_task_samples,
    needle_depths,
)
from megatron_hydra.files import check_output, check_outputs, versions
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.cost import (
    SERVE_DTYPES,
    ModelShape,
    ServeDtype,
    cache_bytes_per_token,
    state_bytes,
)
from megatron_hydra.tasks.needles import TASKS, NeedleTask, find_task
from megatron_hydra.tasks.text import STAND_IN, read_text, split_held_out, stand_in_text
from megatron_hydra.tasks.text_files import (
    FILES_HELP,
    add_text_options,
    find_texts,
    text_options,
)
from megatron_hydra.teachers.model_folder import check_model_folder

if TYPE_CHECKING:
    from torch import Tensor

_COMPARED_CHARACTERS = 20_000
_PERPLEXITY_TOKENS = 16384


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
    parser.add_argument("--depths", type=int, default=5, metavar="N", help="of the needle grid")
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
        help=f"predicted at most (default: {_PERPLEXITY_TOKENS}, or one window of the longest)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(args: argparse.Namespace) -> int:
    """Evaluate every model on the same samples; write the results; print a table."""
    folders = parse_models(args.model)
    texts = find_texts(args.text, text_options(args))
    check_outputs([args.out], (*folders.values(), *args.text, *texts))
    check_output(args.out, args.overwrite, "file")
    tasks, depths = parse_tasks(args.tasks), needle_depths(args.depths)
    _check(args, folders, depths)
    # Imported here: PyTorch and Megatron take seconds, and what is wrong above is said before.
    from megatron_hydra import cpu

    cpu.install_if_needed()
    from megatron_hydra.evaluation.perplexity import text_windows
    from megatron_hydra.parallel import initialize_model_parallel

    reaches = {name: _read_reach(folder) for name, folder in folders.items()}
    text = read_text(texts, text_options(args)) if texts else stand_in_text("--text")
    tokenizer = _common_tokenizer(folders, text)
    # Held out, as far as the models were trained on the same text.
    _, held_out = split_held_out(tokenizer.encode(text, add_special_tokens=False))
    trained_on, chosen = _choose_lengths(args, reaches, len(held_out) - 1)
    lengths = chosen.lengths
    windows = text_windows(
        held_out, lengths, args.perplexity_tokens or max(_PERPLEXITY_TOKENS, *lengths)
    )
    samples = make_task_samples(
        tokenizer, held_out, tasks, lengths, args.num_samples, depths, args.seed
    )
    print(f"lengths: {', '.join(f'{n:,}' for n in lengths)} tokens ({chosen.words})")
    print(f"training length: {trained_on.words}")

    initialize_model_parallel()
    results = [
        _evaluate(name, folder, samples, windows, lengths, args.serve_dtype)
        for name, folder in folders.items()
    ]
    provenance = {
        "command": shlex.join(["megatron-hydra", *sys.argv[1:]]),
        "text": " ".join(args.text) or STAND_IN,
        "lengths": chosen.words,
        "training_length": trained_on.words,
        "perplexity_tokens": len(windows) - 1,
        "seed": args.seed,
        "models": {name: _origin(folder) for name, folder in folders.items()},
        "versions": versions(),
    }
    (length,) = trained_on.lengths
    Evaluation(tuple(results), length, provenance, args.serve_dtype).save(args.out, args.overwrite)
    print("accuracy in % with 95% interval\n" + format_table(results, args.serve_dtype))
    if not args.text:
        print(f"text: {STAND_IN} (--text)")
    print(f"\nevaluation: {args.out}")
    return 0


def _check(args: argparse.Namespace, folders: Mapping[str, Path], depths: Sequence[float]) -> None:
    """What can be refused before PyTorch is imported."""
    check_num_samples(args.num_samples, depths)
    for option in ("training_length", "perplexity_tokens"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} is {value}; it must be above 0")
    if args.lengths and args.perplexity_tokens:
        check_window(max(args.lengths), args.perplexity_tokens)
    for folder in folders.values():
        check_model_folder(folder)


def _choose_lengths(
    args: argparse.Namespace, reaches: Mapping[str, Reach], most: int
) -> tuple[Choice, Choice]:
    """The training length and the lengths to measure at: as asked for, else by the models."""
    trained_on = training_length(reaches)
    is_known = any(reach.trained_on for reach in reaches.values())
    if args.training_length is not None:
        words = f"{args.training_length:,} tokens, by --training-length"
        trained_on, is_known = Choice((args.training_length,), words), True
    if args.lengths is not None:
        return trained_on, Choice(args.lengths, "by --lengths")
    (length,) = trained_on.lengths
    return trained_on, default_lengths(reaches, length if is_known else None, most)


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


def _read_reach(folder: Path) -> Reach:
    """Read a model's small files, so that a bad folder is named before anything takes long."""
    from megatron_hydra.teachers.checkpoint import is_checkpoint_folder, read_metadata
    from megatron_hydra.teachers.qwen3 import read_qwen3_config

    if not is_checkpoint_folder(folder):
        return Reach(read_qwen3_config(folder)["max_position_embeddings"])
    meta = read_metadata(folder)
    if meta["kind"] == "hybrid":
        HeadPlan.load(folder / "plan.json")
    return Reach(meta["config"]["seq_length"], meta["provenance"].get("seq_length"))


def _vocab_size(folder: Path) -> int:
    from megatron_hydra.teachers.checkpoint import is_checkpoint_folder, read_metadata
    from megatron_hydra.teachers.qwen3 import read_qwen3_config

    if not is_checkpoint_folder(folder):
        return int(read_qwen3_config(folder)["vocab_size"])
    return int(read_metadata(folder)["config"]["vocab_size"])


def _origin(folder: Path) -> dict[str, Any]:
    """How a model and its plan came to be, as far as its folder says."""
    from megatron_hydra.teachers.checkpoint import is_checkpoint_folder, read_metadata

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
    from megatron_hydra.teachers.tokenizer import load_model_tokenizer

    tokenizers = {
        name: load_model_tokenizer(folder, _vocab_size(folder)) for name, folder in folders.items()
    }
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
    serve_dtype: ServeDtype,
) -> ModelResult:
    from megatron_hydra.evaluation.perplexity import mean_loss
    from megatron_hydra.teachers.checkpoint import load_any_model

    loaded = load_any_model(folder)
    model, config, plan = loaded.model.eval(), loaded.config, loaded.plan
    shape = ModelShape.from_config(config)
    beyond = [length for length in lengths if length > config.seq_length]
    if beyond:
        print(
            f"{name} is built for {config.seq_length} tokens: its results at "
            f"{', '.join(map(str, beyond))} tokens are beyond that"
        )

    def shown(items: Any, description: str, unit: str) -> Any:
        return progress(items, f"{name}: {description}", unit)

    right = answered_right(model, [sample.sample for sample in samples], shown)
    try:
        losses = {length: mean_loss(model, windows, length, shown) for length in lengths}
    except UserError as error:
        raise UserError(f"model {name!r}, {folder}: {error}") from error
    return ModelResult(
        name=name,
        path=str(folder),
        plan=None if plan is None else tuple(layer.fa_heads for layer in plan.layers),
        plan_name="" if plan is None else str(plan.provenance.get("policy", "")),
        num_heads=config.num_layers * config.num_attention_heads,
        cache_bytes_per_token=int(cache_bytes_per_token(shape, serve_dtype).of(plan)),
        state_bytes=int(state_bytes(shape, serve_dtype).of(plan)),
        accuracy=count_right(samples, right, lambda sample: (sample.task, sample.length)),
        grid=NeedleGrid.count(samples[0].task, samples, right),
        loss_nats=losses,
    )
