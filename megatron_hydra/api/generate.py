"""`evaluate --generate`, `--hf`: RULER-style tasks that models answer by generating text."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from megatron_hydra.api.asked_models import AskedModel, check_layout
from megatron_hydra.errors import UserError
from megatron_hydra.evaluation.generation import (
    Answered,
    GeneratedResult,
    Generation,
    UnfinishedCells,
)
from megatron_hydra.evaluation.lengths import (
    Choice,
    Reach,
    check_window,
    default_lengths,
    tell_beyond,
)
from megatron_hydra.evaluation.positions import (
    PositionLoss,
    loss_by_position,
    position_windows,
)
from megatron_hydra.files import check_output, check_outputs, write_beside
from megatron_hydra.processes import is_first_rank
from megatron_hydra.progress import Progress, no_progress
from megatron_hydra.provenance import origin
from megatron_hydra.selection.cost import (
    ServeDtype,
    cache_bytes_per_token,
    state_bytes,
)
from megatron_hydra.tasks.generation import (
    GENERATION_TASKS,
    GenerationSample,
    answers_found,
    find_generation_tasks,
    make_generation_samples,
    not_comparable,
)
from megatron_hydra.tasks.text import STAND_IN, read_text, split_held_out, stand_in_text
from megatron_hydra.tasks.text_files import TextOptions, find_texts
from megatron_hydra.teachers.model_folder import weights_hash

if TYPE_CHECKING:
    from megatron_hydra.evaluation.checkpoint_generator import CheckpointGenerator
    from megatron_hydra.export.generating import Generator

    AnyGenerator = Generator | CheckpointGenerator

logger = logging.getLogger(__name__)
Found = TypeVar("Found")

BATCH_TOKENS = 16384
"""Tokens of the prompts that are answered together, where the user says nothing."""
_COMPARED_CHARACTERS = 20_000
_ANY_LENGTH = 2**62


@dataclass(frozen=True)
class Prompts:
    """What the models are asked.

    Attributes:
        tasks: By RULER's names.
        lengths: In tokens, prompt and answer together; None for what all models are built for,
            its half and its quarter, up to 8,192.
        num_samples: Of each task at each length.
        perplexity_tokens: Of held-out text, predicted at most in windows of the longest length,
            for the loss by position; None measures none.
        seed: Of all that is drawn.
        wording: `ruler`, or `short` for models trained on `preprocess`'s needles.
        texts: Files, folders or patterns of text for haystacks, of which a tenth, held out, is
            used; empty for Python's documentation.
        text_options: How they are read.
    """

    tasks: tuple[str, ...] = tuple(GENERATION_TASKS)
    lengths: tuple[int, ...] | None = None
    num_samples: int = 100
    perplexity_tokens: int | None = None
    seed: int = 1
    wording: Literal["ruler", "short"] = "ruler"
    texts: tuple[str, ...] = ()
    text_options: TextOptions = field(default_factory=TextOptions)


def generate(
    models: Mapping[str, Path],
    out: Path | None,
    prompts: Prompts = Prompts(),
    *,
    dump: Path | None = None,
    batch_size: int | None = None,
    tensor_parallel: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    forward_tokens: int | None = None,
    trust_remote_code: bool = False,
    serve_dtype: ServeDtype = "bf16",
    overwrite: bool = False,
    progress: Progress = no_progress,
    tell: Callable[[str], None] = logger.info,
) -> Generation | None:
    """Let every model answer the same prompts greedily, and write what was found.

    Finished cells are kept beside the output until it is written: called again after an
    interruption, it goes on. On several ranks, of checkpoints alone, each calls it.

    Args:
        models: Folders by the names that the results give them: Hugging Face folders, which answer
            by transformers, and checkpoints of hybrids or teachers, which answer under Megatron.
        out: The results' JSON file, which the first rank writes; None writes the prompts alone.
        prompts: What is asked.
        dump: JSON lines of the prompts, for another engine.
        batch_size: Prompts that are answered together; None for as many as have `batch_tokens`.
        batch_tokens: See there.
        forward_tokens: Most tokens of a forward pass of a Hugging Face folder's model, where the
            prompts that are answered together have more; None reads them at once.
        tensor_parallel: Ranks that hold a checkpoint's model together, the others share the
            prompts; None for all.
        trust_remote_code: Run model code that is not what this release exports.
        serve_dtype: Number format of the caches when they serve, in which bytes are told.
        overwrite: Replace existing outputs.
        progress: Shows how far it is.
        tell: Gets a line, on the first rank, on each thing that was chosen, before the work.

    Returns:
        The results; None without `out`.

    Raises:
        UserError: For a model, task, length or text that cannot be used, or an output that is in
            the way; nothing is written then.
    """
    texts = find_texts(prompts.texts, prompts.text_options)
    check_outputs([out, dump], (*models.values(), *prompts.texts, *texts))
    for output in (out, dump):
        if output is not None:
            check_output(output, overwrite, "file")
    check_prompts(prompts, batch_size)
    asked = {name: AskedModel.of(path, trust_remote_code) for name, path in models.items()}
    tensor_parallel = check_layout(asked.values(), tensor_parallel)
    chosen = _choose_lengths(prompts, asked)
    if not is_first_rank():
        progress, tell = no_progress, logger.debug
    # PyTorch and more take seconds to import, and what is wrong above is said before.
    on_first_rank: Callable[[Callable[[], Any]], Any] = _called
    if any(model.is_checkpoint for model in asked.values()):
        on_first_rank = _join_ranks(tensor_parallel)
    generators = {name: model.generator(forward_tokens) for name, model in asked.items()}
    text = read_text(texts, prompts.text_options) if texts else stand_in_text("--text")
    _check_tokenizers(generators, text)
    tell(f"lengths: {', '.join(f'{n:,}' for n in chosen.lengths)} tokens ({chosen.words})")
    first = next(iter(generators.values()))
    held_out = held_out_tokens(first, text)
    windows = _windows(prompts, max(chosen.lengths), held_out)
    cells = draw_samples(prompts, chosen.lengths, first, held_out, progress)
    lines = [json.dumps(asdict(sample), ensure_ascii=False) for cell in cells for sample in cell]
    if dump is not None:
        on_first_rank(lambda: _dump(dump, lines, overwrite))
    if out is None:
        return None
    prompts_hash = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    hashes = on_first_rank(lambda: {name: weights_hash(path) for name, path in models.items()})
    same = {"prompts": prompts_hash, "models": hashes, "windows": _hash(windows)}
    unfinished = UnfinishedCells(out, same, overwrite)
    on_first_rank(unfinished.open)
    results = []

    def size_at(length: int) -> int:
        return batch_size or max(1, batch_tokens // length)

    def size_of_pass(length: int) -> int:
        if forward_tokens is None:
            return size_at(length)
        return min(size_at(length), max(1, forward_tokens // length))

    for position, (name, generator) in enumerate(generators.items()):
        tell_beyond(name, asked[name].built_for, chosen.lengths, tell)
        answered = []
        for number, cell in enumerate(cells, position * len(cells)):
            found = on_first_rank(partial(unfinished.load, number))
            if found is None:
                found = _answer(name, generator, cell, size_at, progress)
                on_first_rank(partial(unfinished.save, number, found))
            answered.append(found)
        losses = on_first_rank(partial(unfinished.load_positions, position))
        if losses is None:
            losses = _losses(name, generator, windows, size_of_pass, progress)
            on_first_rank(partial(unfinished.save_positions, position, losses))
        results.append(_result(name, asked[name], serve_dtype, answered, losses))
        generator.release()
    provenance = origin(
        text=" ".join(prompts.texts) or STAND_IN,
        lengths=chosen.words,
        wording=prompts.wording,
        seed=prompts.seed,
        perplexity_tokens=sum(len(window) - 1 for window in windows),
        weights=hashes,
        models={name: model.origin() for name, model in asked.items()},
    )
    head = not_comparable(prompts.wording, ", ".join(prompts.texts) or "Python's documentation")
    generation = Generation(tuple(results), head, serve_dtype, prompts_hash, provenance)
    on_first_rank(partial(generation.save, out, overwrite))
    on_first_rank(unfinished.remove)
    return generation


def _called(find: Callable[[], Found]) -> Found:
    return find()


def _join_ranks(tensor_parallel: int) -> Callable[[Callable[[], Any]], Any]:
    """Set up Megatron's groups; what is to be called on the first rank goes through the result."""
    from megatron_hydra import cpu

    cpu.install_if_needed()
    from megatron_hydra.parallel import from_first_rank, initialize_model_parallel

    initialize_model_parallel(tensor_parallel)
    return from_first_rank


def _dump(path: Path, lines: Sequence[str], overwrite: bool) -> None:
    with write_beside(path, overwrite) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def check_prompts(prompts: Prompts, batch_size: int | None = None) -> None:
    """What can be said before a model is there; imports nothing slow.

    Raises:
        UserError: For a task that there is not, a number below 1, or fewer tokens to predict than
            one window has.
    """
    find_generation_tasks(prompts.tasks)
    for name, value in (
        ("the number of samples", prompts.num_samples),
        ("the batch size", 1 if batch_size is None else batch_size),
        (
            "the number of perplexity tokens",
            1 if prompts.perplexity_tokens is None else prompts.perplexity_tokens,
        ),
    ):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be above 0")
    if prompts.lengths and prompts.perplexity_tokens is not None:
        check_window(max(prompts.lengths), prompts.perplexity_tokens)


def _choose_lengths(prompts: Prompts, models: Mapping[str, AskedModel]) -> Choice:
    if prompts.lengths is not None:
        return Choice(prompts.lengths, "as asked for")
    reaches = {}
    for name, model in models.items():
        num_tokens = model.built_for
        if num_tokens is None:
            raise UserError(
                f"{model.path} does not say what length it is built for: give --lengths"
            )
        reaches[name] = Reach(num_tokens)
    return default_lengths(reaches, None, _ANY_LENGTH)


def _check_tokenizers(generators: Mapping[str, AnyGenerator], text: str) -> None:
    """Prompts are shared, so all tokenizers must cut text alike."""
    compared = text[:_COMPARED_CHARACTERS]
    found = {
        name: generator.tokenizer(compared, verbose=False)["input_ids"]
        for name, generator in generators.items()
    }
    first, *others = found
    for name in others:
        if found[name] != found[first]:
            raise UserError(
                f"models {first!r} and {name!r} have different tokenizers: "
                "models evaluated together share their prompts"
            )


def draw_samples(
    prompts: Prompts,
    lengths: Sequence[int],
    generator: AnyGenerator,
    held_out: Sequence[int],
    progress: Progress,
) -> list[list[GenerationSample]]:
    """The samples of each task at each length, task by task.

    Args:
        prompts: What is asked.
        lengths: In tokens.
        generator: Of any of the models, for its tokenizer.
        held_out: Tokens of the haystack, as :func:`held_out_tokens` gives them.
        progress: Shows how far it is.
    """
    words = generator.tokenizer.decode(held_out, clean_up_tokenization_spaces=False).split()
    tasks = find_generation_tasks(prompts.tasks)
    pairs = [(task, length) for task in tasks for length in lengths]
    told = prompts.num_samples, prompts.seed, prompts.wording
    return [
        make_generation_samples(generator.num_tokens, words, task, length, *told)
        for task, length in progress(pairs, "prompts", "cell")
    ]


def _windows(prompts: Prompts, length: int, held_out: Sequence[int]) -> list[Sequence[int]]:
    """Held-out text for the loss by position; none if it was not asked for."""
    if prompts.perplexity_tokens is None:
        return []
    return position_windows(held_out, length, prompts.perplexity_tokens)


def held_out_tokens(generator: AnyGenerator, text: str) -> list[int]:
    """Tokens that no training document holds, as far as the models were trained on the same text.

    `preprocess` holds out by tokens too: places in the characters would be others.
    """
    tokens = generator.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return split_held_out(tokens)[1]


def _hash(windows: Sequence[Sequence[int]]) -> str | None:
    return hashlib.sha256(json.dumps(windows).encode()).hexdigest() if windows else None


def _losses(
    name: str,
    generator: AnyGenerator,
    windows: Sequence[Sequence[int]],
    size_at: Callable[[int], int],
    progress: Progress,
) -> tuple[PositionLoss, ...]:
    if not windows:
        return ()
    size = size_at(len(windows[0]))
    losses = generator.position_losses(windows, size, progress, f"{name}: perplexity")
    return loss_by_position(losses, len(windows))


def _answer(
    name: str,
    generator: AnyGenerator,
    cell: Sequence[GenerationSample],
    size_at: Callable[[int], int],
    progress: Progress,
) -> Answered:
    task, length = cell[0].task, cell[0].length
    texts = generator.generate(
        [sample.prompt for sample in cell],
        cell[0].max_new_tokens,
        size_at(length),
        progress,
        f"{name}: {task} {length}",
    )
    found = [answers_found(text, sample.answers) for text, sample in zip(texts, cell, strict=True)]
    asked, depths = zip(*((len(sample.answers), sample.depth) for sample in cell), strict=True)
    return Answered.count((task, length), found, asked, depths)


def _result(
    name: str,
    model: AskedModel,
    dtype: ServeDtype,
    answered: Sequence[Answered],
    losses: tuple[PositionLoss, ...],
) -> GeneratedResult:
    """With what the model keeps of a sequence, as far as it is of a kind that is known here."""
    folder, (shape, plan) = str(model.path), model.shape_and_plan()
    if shape is None:
        return GeneratedResult(name, folder, None, None, None, None, tuple(answered), losses)
    return GeneratedResult(
        name=name,
        path=folder,
        fa_heads=shape.total_heads if plan is None else plan.num_fa_heads,
        total_heads=shape.total_heads,
        cache_bytes_per_token=int(cache_bytes_per_token(shape, dtype).of(plan)),
        state_bytes=int(state_bytes(shape, dtype).of(plan)),
        tasks=tuple(answered),
        loss_by_position=losses,
        plan=None if plan is None else tuple(layer.fa_heads for layer in plan.layers),
    )
