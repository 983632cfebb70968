"""Figures of an arm of a study: means over its finished runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from megatron_hydra.study.config import Run, StudyConfig
from megatron_hydra.study.results import ArmResult
from megatron_hydra.study.statistics import share_right


@dataclass(frozen=True)
class ArmFigures:
    """An arm at a budget: means over its finished runs.

    Attributes:
        name: Of the arm.
        results: Of its finished runs, one or more.
        length: The training length, in tokens.
    """

    name: str
    results: Sequence[ArmResult]
    length: int

    @property
    def runs(self) -> list[ArmFigures]:
        """One by one."""
        return [ArmFigures(self.name, [result], self.length) for result in self.results]

    def accuracy(self, task: str) -> dict[int, float]:
        """By length, as a share."""
        found: dict[int, list[float]] = {}
        for result in self.results:
            assert result.evaluation is not None
            for cell in result.evaluation.tasks:
                if cell.task == task:
                    found.setdefault(cell.length, []).append(cell.accuracy)
        return {length: mean(values) for length, values in sorted(found.items())}

    def retrieval(self, above: int) -> float:
        """The mean over tasks and lengths above one."""
        return mean(share_right(result.bits("retrieval", above)) for result in self.results)

    def probe(self, name: str) -> float:
        """Share of right samples."""
        return mean(share_right([result.probes[name]]) for result in self.results)

    @property
    def loss_nats(self) -> float:
        """On held-out text at positions up to the training length."""
        return mean(_loss(result, self.length) for result in self.results)

    @property
    def divergence_nats(self) -> float:
        """From the teacher."""
        return mean(r.divergence_nats for r in self.results if r.divergence_nats is not None)

    @property
    def cache(self) -> tuple[float, float]:
        """Bytes a token adds, and bytes of state; random heads store more or less by the draw."""
        found = [result.evaluation for result in self.results if result.evaluation]
        return (
            mean(each.cache_bytes_per_token or 0 for each in found),
            mean(each.state_bytes or 0 for each in found),
        )

    @property
    def tokens(self) -> int:
        """Trained on."""
        return sum(self.results[0].tokens.values())

    @property
    def num_fa_heads(self) -> str:
        """In the whole model; a budget of the cache buys more of one teacher than of another."""
        return _one_or_range(sum(map(len, result.fa_heads)) for result in self.results)

    @property
    def most_in_a_layer(self) -> str:
        """FA heads of the layer that has most of them."""
        return _one_or_range(most_in_a_layer(result) for result in self.results)


def of_able_teachers(study: StudyConfig, results: Mapping[Run, ArmResult]) -> dict[Run, ArmResult]:
    """The runs without those of teachers that find less than the study asks of them."""
    least, length, unable = study.run.least_teacher_accuracy, study.data.length, set[str]()
    for run, result in results.items():
        if study.is_teacher(run) and result.status == "finished":
            found = ArmFigures(run.arm, [result], length)
            if any(
                found.accuracy(task)[length] < least for task in study.evaluation.tasks if least
            ):
                unable.add(run.teacher)
    return {run: result for run, result in results.items() if run.teacher not in unable}


def most_in_a_layer(result: ArmResult) -> int:
    """FA heads of the layer that has most of them."""
    return max(map(len, result.fa_heads), default=0)


def _one_or_range(numbers: Iterable[int]) -> str:
    found = sorted(numbers)
    low, high = found[0], found[-1]
    return str(low) if low == high else f"{low} to {high}"


def _loss(result: ArmResult, length: int) -> float:
    assert result.evaluation is not None
    within = [each for each in result.evaluation.loss_by_position if each.last <= length]
    total = sum(each.num_tokens for each in within)
    return sum(each.loss_nats * each.num_tokens for each in within) / total
