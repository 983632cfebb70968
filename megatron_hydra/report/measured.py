"""The models of a page on one footing, whichever evaluation measured them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_hydra.errors import UserError
from megatron_hydra.evaluation.generation import GeneratedResult, Generation
from megatron_hydra.evaluation.results import Accuracy, Cell, Evaluation, FAHeads, ModelResult


@dataclass(frozen=True)
class MeasuredModel:
    """A model: what it keeps of a sequence, and how often it was right.

    Attributes:
        name: The name that it goes by in tables.
        plan: Its FA heads; None for a teacher.
        num_fa_heads: Heads with full attention, of all layers.
        num_heads: Query heads of all layers.
        cache_bytes_per_token: Keys and values that a token adds.
        state_bytes: That a sequence keeps whatever its length.
        accuracy: By task and length.
    """

    name: str
    plan: FAHeads | None
    num_fa_heads: int
    num_heads: int
    cache_bytes_per_token: int
    state_bytes: int
    accuracy: Mapping[Cell, Accuracy]

    @property
    def kind(self) -> str:
        """`teacher` or `hybrid`."""
        return "teacher" if self.plan is None else "hybrid"


@dataclass(frozen=True)
class Measured:
    """All models, on the same samples.

    Attributes:
        models: A teacher among them.
        cells: Tasks and lengths, in the order of the file.
        serve_dtype: Number format of the caches; None in an evaluation of an earlier release.
        training_length: In tokens; None where it is not known.
    """

    models: tuple[MeasuredModel, ...]
    cells: tuple[Cell, ...]
    serve_dtype: str | None
    training_length: int | None

    @property
    def teacher(self) -> MeasuredModel:
        """The first one."""
        return next(model for model in self.models if model.kind == "teacher")

    @classmethod
    def of(cls, found: Evaluation | Generation) -> Measured:
        """What the file of an evaluation says.

        Args:
            found: An evaluation, or one by generation, of whose models those are left out whose
                family is not known here.

        Raises:
            UserError: If one by generation has no teacher, or does not say which heads of a hybrid
                have full attention.
        """
        if isinstance(found, Evaluation):
            models = tuple(map(_evaluated, found.models))
            return cls(models, found.cells, found.serve_dtype, found.training_length)
        models = tuple(_generated(each) for each in found.models if each.fa_heads is not None)
        if all(model.kind == "hybrid" for model in models):
            raise UserError(
                "the results by generation have no teacher, which hybrids are compared with: name "
                "its folder to evaluate too"
            )
        return cls(models, found.cells, found.serve_dtype, None)


def _evaluated(model: ModelResult) -> MeasuredModel:
    heads = model.num_fa_heads, model.num_heads
    memory = model.cache_bytes_per_token, model.state_bytes
    return MeasuredModel(model.name, model.plan, *heads, *memory, model.accuracy)


def _generated(model: GeneratedResult) -> MeasuredModel:
    assert model.fa_heads is not None and model.total_heads is not None
    assert model.cache_bytes_per_token is not None and model.state_bytes is not None
    if model.plan is None and model.fa_heads < model.total_heads:
        raise UserError(
            f"the results by generation do not say which heads of {model.name!r} are FA heads: "
            "an earlier release wrote them; evaluate again"
        )
    heads = model.fa_heads, model.total_heads
    memory = model.cache_bytes_per_token, model.state_bytes
    accuracy = {task.cell: Accuracy(task.num_right, task.num_samples) for task in model.tasks}
    return MeasuredModel(model.name, model.plan, *heads, *memory, accuracy)
