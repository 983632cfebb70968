"""`evaluate`: needle tasks, perplexity and cache size of models, all on the same samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_hydra.api.asked_models import AskedModel
from megatron_hydra.errors import UserError
from megatron_hydra.evaluation.lengths import (
    Choice,
    Reach,
    check_window,
    default_lengths,
    tell_beyond,
    training_length,
)
from megatron_hydra.evaluation.results import Evaluation, ModelResult, NeedleGrid, count_right
from megatron_hydra.evaluation.ruler import (
    TaskSample,
    answered_right,
    check_num_samples,
    make_task_samples,
    needle_depths,
)
from megatron_hydra.files import check_output, check_outputs
from megatron_hydra.progress import Progress, no_progress
from megatron_hydra.provenance import origin
from megatron_hydra.selection.cost import ServeDtype, cache_bytes_per_token, state_bytes
from megatron_hydra.selection.shape import ModelShape
from megatron_hydra.tasks.needles import NeedleTask, find_task
from megatron_hydra.tasks.text import STAND_IN, read_text, split_held_out, stand_in_text
from megatron_hydra.tasks.text_files import TextOptions, find_texts
from megatron_hydra.teachers.model_folder import check_model_folder

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

PERPLEXITY_TOKENS = 16384
_COMPARED_CHARACTERS = 20_000


@dataclass(frozen=True)
class Questions:
    """What the models are asked.

    Attributes:
        tasks: Needle tasks by name, as `multi_key:4`; the first one's needle grid is kept.
        lengths: In tokens; None for the training length, twice and four times that, as far as
            the models are built for them.
        training_length: In tokens; None for the longest that a hybrid's folder names.
        num_samples: Of each task at each length.
        num_depths: Of the needle grid.
        seed: Of the samples.
        texts: Files, folders or patterns of text for haystacks and perplexity, of which a tenth,
            held out, is used; empty for Python's documentation.
        text_options: How they are read.
        perplexity_tokens: Predicted at most; None for `PERPLEXITY_TOKENS`, or one window of the
            longest length.
    """

    tasks: tuple[str, ...] = ("single", "multi_key")
    lengths: tuple[int, ...] | None = None
    training_length: int | None = None
    num_samples: int = 100
    num_depths: int = 5
    seed: int = 1
    texts: tuple[str, ...] = ()
    text_options: TextOptions = field(default_factory=TextOptions)
    perplexity_tokens: int | None = None


def evaluate(
    models: Mapping[str, Path],
    out: Path,
    questions: Questions = Questions(),
    *,
    serve_dtype: ServeDtype = "bf16",
    overwrite: bool = False,
    progress: Progress = no_progress,
    tell: Callable[[str], None] = logger.info,
) -> Evaluation:
    """Evaluate every model on the same samples, and write the results.

    Args:
        models: Folders, of checkpoints or Hugging Face's, by the names that the results give them.
        out: The results' JSON file.
        questions: What is asked.
        serve_dtype: Number format of the caches when they serve, in which bytes are told.
        overwrite: Replace an existing output.
        progress: Shows how far it is.
        tell: Gets a line on each thing that was chosen, before the work.

    Raises:
        UserError: For a model, task, length or text that cannot be used, or an output that is in
            the way; nothing is written then.
    """
    texts = find_texts(questions.texts, questions.text_options)
    check_outputs([out], (*models.values(), *questions.texts, *texts))
    check_output(out, overwrite, "file")
    tasks, depths = _find_tasks(questions.tasks), needle_depths(questions.num_depths)
    _check(questions, models, depths)
    # Imported here: PyTorch and Megatron take seconds, and what is wrong above is said before.
    from megatron_hydra import cpu

    cpu.install_if_needed()
    from megatron_hydra.evaluation.perplexity import text_windows
    from megatron_hydra.parallel import initialize_model_parallel

    folders = {name: _read_folder(folder) for name, folder in models.items()}
    reaches = {name: folder.reach for name, folder in folders.items()}
    text = read_text(texts, questions.text_options) if texts else stand_in_text("--text")
    sizes = {name: folder.vocab_size for name, folder in folders.items()}
    tokenizer = _common_tokenizer(models, sizes, text)
    # Held out, as far as the models were trained on the same text.
    _, held_out = split_held_out(tokenizer.encode(text, add_special_tokens=False))
    trained_on, chosen = _choose_lengths(questions, reaches, len(held_out) - 1)
    lengths = chosen.lengths
    windows = text_windows(
        held_out, lengths, questions.perplexity_tokens or max(PERPLEXITY_TOKENS, *lengths)
    )
    samples = make_task_samples(
        tokenizer, held_out, tasks, lengths, questions.num_samples, depths, questions.seed
    )
    tell(f"lengths: {', '.join(f'{n:,}' for n in lengths)} tokens ({chosen.words})")
    tell(f"training length: {trained_on.words}")

    initialize_model_parallel()
    results = [
        _evaluate(name, folder, samples, windows, lengths, serve_dtype, progress, tell)
        for name, folder in models.items()
    ]
    provenance = origin(
        text=" ".join(questions.texts) or STAND_IN,
        lengths=chosen.words,
        training_length=trained_on.words,
        perplexity_tokens=len(windows) - 1,
        seed=questions.seed,
        models={name: folder.origin for name, folder in folders.items()},
    )
    (length,) = trained_on.lengths
    evaluation = Evaluation(tuple(results), length, provenance, serve_dtype)
    evaluation.save(out, overwrite)
    return evaluation


def _check(questions: Questions, models: Mapping[str, Path], depths: Sequence[float]) -> None:
    """What can be refused before PyTorch is imported."""
    check_num_samples(questions.num_samples, depths)
    asked = {
        "the training length": questions.training_length,
        "the number of perplexity tokens": questions.perplexity_tokens,
    }
    for name, value in asked.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be above 0")
    if questions.lengths and questions.perplexity_tokens:
        check_window(max(questions.lengths), questions.perplexity_tokens)
    for folder in models.values():
        check_model_folder(folder)


def _find_tasks(words: Sequence[str]) -> list[NeedleTask]:
    tasks: dict[str, NeedleTask] = {}
    for word in words:
        task = find_task(word)
        if task.name in tasks:
            raise UserError(f"the tasks name {word!r} twice: {','.join(words)!r}")
        tasks[task.name] = task
    return list(tasks.values())


def _choose_lengths(
    questions: Questions, reaches: Mapping[str, Reach], most: int
) -> tuple[Choice, Choice]:
    """The training length and the lengths to measure at: as asked for, else by the models."""
    trained_on = training_length(reaches)
    is_known = any(reach.trained_on for reach in reaches.values())
    if questions.training_length is not None:
        words = f"{questions.training_length:,} tokens, as asked for"
        trained_on, is_known = Choice((questions.training_length,), words), True
    if questions.lengths is not None:
        return trained_on, Choice(questions.lengths, "as asked for")
    (length,) = trained_on.lengths
    return trained_on, default_lengths(reaches, length if is_known else None, most)


class _Folder(NamedTuple):
    """What a model's small files say."""

    reach: Reach
    vocab_size: int
    origin: dict[str, Any]
    """How the model and its plan came to be."""


def _read_folder(folder: Path) -> _Folder:
    """Read a model's small files, so that a bad folder is named before anything takes long."""
    from megatron_hydra.teachers.checkpoint import read_metadata
    from megatron_hydra.teachers.config_json import read_config
    from megatron_hydra.teachers.model_folder import is_checkpoint_folder

    if is_checkpoint := is_checkpoint_folder(folder):
        meta = read_metadata(folder)
        reach = Reach(meta["config"]["seq_length"], meta["provenance"].get("seq_length"))
        vocab_size = meta["config"]["vocab_size"]
    else:
        config = read_config(folder)
        reach, vocab_size = Reach(config["max_position_embeddings"]), config["vocab_size"]
    return _Folder(reach, vocab_size, AskedModel(folder, is_checkpoint).origin())


def _common_tokenizer(
    folders: Mapping[str, Path], vocab_sizes: Mapping[str, int], text: str
) -> Any:
    """The models' tokenizer; samples are shared, so all must encode text alike."""
    from megatron_hydra.teachers.tokenizer import load_model_tokenizer

    tokenizers = {
        name: load_model_tokenizer(folder, vocab_sizes[name]) for name, folder in folders.items()
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
    progress: Progress,
    tell: Callable[[str], None],
) -> ModelResult:
    from megatron_hydra.evaluation.perplexity import mean_loss
    from megatron_hydra.teachers.checkpoint import load_any_model

    loaded = load_any_model(folder)
    model, config, plan = loaded.model.eval(), loaded.config, loaded.plan
    shape = ModelShape.from_config(config)
    tell_beyond(name, config.seq_length, lengths, tell)

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
