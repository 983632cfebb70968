"""Results of evaluation by generation: their file, their table, and cells of a run that was killed.

Free of PyTorch at import, so that the report starts quickly.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar

from megatron_hydra.errors import UserError
from megatron_hydra.evaluation.positions import PositionLoss
from megatron_hydra.evaluation.results import (
    Accuracy,
    Cell,
    FAHeads,
    align,
    format_perplexity,
    percent_text,
)
from megatron_hydra.files import write_json
from megatron_hydra.schema import MAY_LACK, Count, Limits, Share, from_json, load_json, named
from megatron_hydra.selection.cost import ServeDtype, state_format
from megatron_hydra.unfinished import UnfinishedWork

SCHEMA_VERSION = 1
FILE_KIND = "generation"
DEPTHS = tuple(fifth / 5 for fifth in range(5))
"""Where the fifths of a prompt start, by which needles are counted."""
_COUNTS = "num_right", "num_samples"


@dataclass(frozen=True)
class AtDepth:
    """Samples whose one needle lies in the same fifth of the prompt.

    Attributes:
        start: Of the fifth, as a share of the prompt's characters.
        num_right: Samples with the answer in the generated text.
        num_samples: Samples.
    """

    start: Share
    num_right: Annotated[int, Limits(least=0)]
    num_samples: Count


@dataclass(frozen=True)
class Answered:
    """How a model did in a cell: a task at a length.

    Attributes:
        task: RULER's name.
        length: In tokens, prompt and answer together.
        num_right: Samples with every answer in the generated text.
        num_samples: Samples.
        accuracy: `num_right` of `num_samples`.
        interval: Wilson's 95% interval of it.
        match_all: RULER's `string_match_all`, the mean share of a sample's answers that are found.
        match_part: RULER's `string_match_part`, the share of samples with one answer or more.
        by_depth: Of a task with one needle, by where it lies, for each fifth that has samples.
        right: For each sample in its order, 1 if it has every answer, else 0, as text; of models
            that were asked the same, samples can be compared one by one.
    """

    task: str
    length: Count
    num_right: Annotated[int, Limits(least=0)]
    num_samples: Count
    accuracy: float
    interval: tuple[float, float]
    match_all: Share
    match_part: Share
    by_depth: tuple[AtDepth, ...] = field(default=(), metadata=MAY_LACK)
    right: str = field(default="", metadata=MAY_LACK)

    @classmethod
    def count(
        cls,
        cell: Cell,
        found: Sequence[int],
        asked: Sequence[int],
        depths: Sequence[float | None] = (),
    ) -> Answered:
        """Count a cell.

        Args:
            cell: Task and length.
            found: Of each sample, how many answers the text contains.
            asked: Of each sample, how many there are.
            depths: Of each sample, the share of the prompt before its needle, below 1; None where
                it has not just one.
        """
        pairs = list(zip(found, asked, strict=True))
        right = Accuracy(sum(there == wanted for there, wanted in pairs), len(pairs))
        share = sum(there / wanted for there, wanted in pairs) / len(pairs)
        part = sum(there > 0 for there in found) / len(pairs)
        counts = (right.num_right, right.num_samples, right.value, right.interval)
        by_start: dict[float, list[bool]] = {}
        known = [depth for depth in depths if depth is not None]
        if len(known) == len(pairs):
            for depth, (there, wanted) in zip(known, pairs, strict=True):
                start = DEPTHS[int(depth * len(DEPTHS))]
                by_start.setdefault(start, []).append(there == wanted)
        by_depth = tuple(
            AtDepth(start, sum(answers), len(answers))
            for start, answers in sorted(by_start.items())
        )
        bits = "".join(str(int(there == wanted)) for there, wanted in pairs)
        return cls(*cell, *counts, min(1.0, share), part, by_depth, bits)

    @property
    def cell(self) -> Cell:
        """Task and length."""
        return self.task, self.length


@dataclass(frozen=True)
class GeneratedResult:
    """One model.

    Attributes:
        name: In tables.
        path: Its folder.
        fa_heads: Heads with full attention in the whole model; None: unknown.
        total_heads: Query heads in the whole model; None: unknown.
        cache_bytes_per_token: Keys and values that a token adds; None: unknown.
        state_bytes: That a sequence keeps whatever its length; None: unknown.
        tasks: One for each cell.
        loss_by_position: On held-out text; empty where that was not asked for.
        plan: A hybrid's FA heads; None for a teacher, and where `fa_heads` is not known.
    """

    name: str
    path: str
    fa_heads: int | None
    total_heads: int | None
    cache_bytes_per_token: int | None
    state_bytes: int | None
    tasks: tuple[Answered, ...]
    loss_by_position: tuple[PositionLoss, ...] = field(default=(), metadata=MAY_LACK)
    plan: FAHeads | None = field(default=None, metadata=MAY_LACK)

    @property
    def buckets(self) -> tuple[tuple[int, int, int], ...]:
        """First and last position and number of tokens of each loss."""
        return tuple((each.first, each.last, each.num_tokens) for each in self.loss_by_position)


@dataclass(frozen=True)
class Generation:
    """All models, on the same prompts.

    Attributes:
        models: One or more.
        head: Why the figures are not those of published RULER.
        serve_dtype: Number format of the caches' bytes.
        prompts_hash: SHA-256 of the prompts as they are dumped.
        provenance: Command, versions, seed; JSON values.
    """

    models: tuple[GeneratedResult, ...]
    head: str
    serve_dtype: ServeDtype
    prompts_hash: str
    provenance: Mapping[str, Any]

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Tasks and lengths, in the order of the file."""
        return tuple(task.cell for task in self.models[0].tasks)

    @property
    def has_depths(self) -> bool:
        """Whether some task has a single needle, whose depth is known."""
        return any(task.by_depth for model in self.models for task in model.tasks)

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write it as JSON; UserError if that cannot be."""
        heading = {"schema_version": SCHEMA_VERSION, "kind": FILE_KIND}
        write_json(path, {**heading, **asdict(self)}, overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Generation:
        """Read and check what :meth:`save` wrote.

        Raises:
            UserError: If a key is missing, figures contradict one another, or models were not
                asked the same; names file and model.
        """
        found = load_json(cls, path, FILE_KIND, SCHEMA_VERSION)
        with named(os.fspath(path)):
            if not found.models or not found.models[0].tasks:
                raise UserError("it holds no results")
            for model in found.models:
                with named(f"model {model.name!r}"):
                    if tuple(task.cell for task in model.tasks) != found.cells:
                        raise UserError(f"its cells are not those of {found.models[0].name!r}")
                    if model.buckets != found.models[0].buckets:
                        raise UserError(f"its positions are not those of {found.models[0].name!r}")
                    if model.plan is not None and sum(map(len, model.plan)) != model.fa_heads:
                        raise UserError(f"its plan has other than its {model.fa_heads} FA heads")
                    for task in model.tasks:
                        _check(task)
        return found


def _check(task: Answered) -> None:
    with named(f"task {task.task} at {task.length} tokens"):
        if task.num_right > task.num_samples:
            raise UserError(f"num_right is {task.num_right} of {task.num_samples} samples")
        counted = Accuracy(task.num_right, task.num_samples)
        if (task.accuracy, tuple(task.interval)) != (counted.value, counted.interval):
            raise UserError(f"accuracy is {task.accuracy}; its counts give {counted.value}")
        if task.match_part < task.accuracy or task.match_all < task.accuracy:
            raise UserError("match_all and match_part cannot be below accuracy")
        ones, zeros = task.right.count("1"), task.right.count("0")
        if task.right and (ones, ones + zeros) != (task.num_right, len(task.right)):
            raise UserError(f"right is {task.right!r}; num_right is {task.num_right}")
        if task.right and len(task.right) != task.num_samples:
            raise UserError(f"right is of {len(task.right)} of {task.num_samples} samples")
        if task.by_depth:
            sums = [sum(getattr(at, name) for at in task.by_depth) for name in _COUNTS]
            if sums != [getattr(task, name) for name in _COUNTS]:
                raise UserError(f"by_depth counts {sums[0]} right of {sums[1]} samples")


def generation_table(result: Generation) -> str:
    """A text table, a column per model.

    A row per task and length has accuracy with interval, and `string_match_all`. Below stand
    perplexity by position and needle grid, where they were measured, and what a sequence keeps.
    """
    names = [model.name for model in result.models]
    rows = [["task", "tokens", *names]]
    for position, (task, length) in enumerate(result.cells):
        found = (model.tasks[position] for model in result.models)
        texts = (
            f"{percent_text(Accuracy(each.num_right, each.num_samples))} {100 * each.match_all:.0f}"
            for each in found
        )
        rows.append([task, f"{length:,}", *texts])
    heading = "samples with every answer in % with 95% interval, and RULER's string_match_all"
    lines = [result.head, heading, *align(rows)]
    if result.models[0].loss_by_position:
        rows = [["tokens before", *names], *_perplexities(result)]
        lines += ["perplexity of held-out text by position", *align(rows)]
    lines += ["what a sequence keeps", *align([["", *names], *_memory(result)])]
    if result.has_depths:
        lines.append("right in % by depth of the needle, in fifths of the prompt")
        lines += align(_grid(result))
    return "\n".join(lines)


def _memory(result: Generation) -> list[list[str]]:
    """FA heads and bytes, a dash where they are not known."""
    models, dtype = result.models, result.serve_dtype
    heads = [
        "-" if model.fa_heads is None else f"{model.fa_heads}/{model.total_heads}"
        for model in models
    ]
    sizes = {
        f"cache, bytes per token ({dtype})": [model.cache_bytes_per_token for model in models],
        f"state, bytes ({state_format(dtype)})": [model.state_bytes for model in models],
    }
    counted = (
        [name, *("-" if size is None else f"{size:,}" for size in found)]
        for name, found in sizes.items()
    )
    return [["FA heads", *heads], *counted]


def _grid(result: Generation) -> list[list[str]]:
    """A head, then a row for each cell and model: right in % by the needle's depth."""
    rows = [["task", "tokens", "model", *(f"from {100 * start:.0f}%" for start in DEPTHS)]]
    for position, (task, length) in enumerate(result.cells):
        for model in result.models:
            found = model.tasks[position].by_depth
            shares = {at.start: at.num_right / at.num_samples for at in found}
            if shares:
                texts = (f"{100 * shares[s]:.0f}" if s in shares else "-" for s in DEPTHS)
                rows.append([task, f"{length:,}", model.name, *texts])
    return rows


def _perplexities(result: Generation) -> list[list[str]]:
    """A row for each bucket of positions: which, and each model's perplexity."""
    return [
        [f"{first:,} to {last:,}"]
        + [format_perplexity(model.loss_by_position[i].loss_nats) for model in result.models]
        for i, (first, last, _) in enumerate(result.models[0].buckets)
    ]


def results_markdown(result: Generation) -> str:
    """A section of a model card: a row for each task and length, a column for each model."""
    names = [model.name.replace("|", "\\|") for model in result.models]
    lines = [
        "## By generation",
        f"{result.head} Samples with every answer, in %, with Wilson's 95%",
    ]
    lines += ["interval.", "", f"| task | tokens | {' | '.join(names)} |"]
    lines.append("|---" * (2 + len(names)) + "|")
    for position, (task, length) in enumerate(result.cells):
        found = (model.tasks[position] for model in result.models)
        texts = [percent_text(Accuracy(each.num_right, each.num_samples)) for each in found]
        lines.append(f"| {task} | {length:,} | {' | '.join(texts)} |")
    if result.models[0].loss_by_position:
        lines += ["", "## Perplexity by position", "Of held-out text, by the tokens before.", ""]
        lines += [f"| tokens before | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in _perplexities(result)]
    return "\n".join([*lines, "", ""])


class UnfinishedCells(UnfinishedWork):
    """What an evaluation has measured so far: a file for each of its cells."""

    what = writer = "evaluation"
    units = r"(positions_)?\d+\.json"
    words: ClassVar = {"windows": "perplexity text"}

    def load(self, number: int) -> Answered | None:
        """A finished cell; None if it is to be measured."""
        path = self.path / f"{number}.json"
        if not path.is_file():
            return None
        return from_json(Answered, self.parsed(path.name), os.fspath(path))

    def save(self, number: int, cell: Answered) -> None:
        """Keep a cell."""
        write_json(self.path / f"{number}.json", asdict(cell), overwrite=True)

    def load_positions(self, number: int) -> tuple[PositionLoss, ...] | None:
        """A model's finished losses; None if they are to be measured."""
        path = self.path / f"positions_{number}.json"
        if not path.is_file():
            return None
        return from_json(_Positions, self.parsed(path.name), os.fspath(path)).loss_by_position

    def save_positions(self, number: int, losses: tuple[PositionLoss, ...]) -> None:
        """Keep a model's losses."""
        path = self.path / f"positions_{number}.json"
        write_json(path, asdict(_Positions(losses)), overwrite=True)


@dataclass(frozen=True)
class _Positions:
    loss_by_position: tuple[PositionLoss, ...]
