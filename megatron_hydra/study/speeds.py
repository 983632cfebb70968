"""Which arms of a study are timed, and how fast they were: one JSON file of all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from megatron_hydra.errors import UserError
from megatron_hydra.files import write_json
from megatron_hydra.schema import load_json
from megatron_hydra.study.config import Run, StudyConfig
from megatron_hydra.study.sections import SpeedsSection

FILE_KIND, SCHEMA_VERSION = "study_speeds", 1
RATES = ("training", "prompts", "answers")
"""What tokens per second are of."""


@dataclass(frozen=True)
class Timed:
    """An arm at a budget that is timed.

    Attributes:
        run: Of the first replicate.
        stands_for: Other arms at its budget, which compute the same: trained otherwise, or the same
            by another name.
    """

    run: Run
    stands_for: tuple[str, ...]


@dataclass(frozen=True)
class Speed:
    """How fast an arm was.

    Attributes:
        arm: Its name.
        budget: At which it was.
        stands_for: As of :class:`Timed`.
        inputs: What decided it, by name: settings as JSON text, the teacher's scores as a hash.
        fa_heads: In the whole model.
        step_tokens: Of a step of stage 3.
        training_ms: Of each step, from the end of the one before.
        num_prompts: That are answered together.
        prompt_tokens: Of all of them.
        prompt_ms: Until the first new token of each.
        token_ms: Until each further one.
    """

    arm: str
    budget: str
    stands_for: tuple[str, ...]
    inputs: Mapping[str, str]
    fa_heads: int
    step_tokens: int
    training_ms: tuple[float, ...]
    num_prompts: int
    prompt_tokens: int
    prompt_ms: float
    token_ms: tuple[float, ...]

    @property
    def key(self) -> tuple[str, str]:
        """What is one of it in a file."""
        return self.arm, self.budget

    @property
    def rates(self) -> tuple[float, float, float]:
        """Tokens per second of :data:`RATES`, by the median step."""
        return (
            1000 * self.step_tokens / median(self.training_ms),
            1000 * self.prompt_tokens / self.prompt_ms,
            1000 * self.num_prompts / median(self.token_ms),
        )


@dataclass(frozen=True)
class Speeds:
    """All that was measured, on one device with one set of versions.

    Attributes:
        provenance: `device`, `versions`, and the `command` that measured last.
        speeds: In the order in which they were measured.
    """

    provenance: Mapping[str, Any]
    speeds: tuple[Speed, ...] = ()

    def with_speed(self, speed: Speed) -> Speeds:
        """With one more, in an earlier one's place."""
        others = tuple(each for each in self.speeds if each.key != speed.key)
        return replace(self, speeds=(*others, speed))

    def save(self, path: Path) -> None:
        """Write the file, in an earlier one's place."""
        heading = {"schema_version": SCHEMA_VERSION, "kind": FILE_KIND}
        write_json(path, heading | asdict(self), overwrite=True)

    @classmethod
    def load(cls, path: Path) -> Speeds:
        """Read what :meth:`save` wrote; UserError if it cannot be read."""
        return load_json(cls, path, FILE_KIND, SCHEMA_VERSION)


def speeds_section(study: StudyConfig) -> SpeedsSection:
    """What the study says of speeds; UserError if it says nothing."""
    if study.speeds is None:
        raise UserError("the study has no section speeds, which says what is measured: see "
                        "megatron_hydra/study/sections.py")  # fmt: skip
    return study.speeds


def timed_arms(study: StudyConfig) -> list[Timed]:
    """The arms of `speeds.arms` in its order, each at its budgets, one of those that are alike.

    Arms are alike if they say the same of all but weights, tokens and learning rates. The choice of
    heads counts, for a plan has them in so many layers; chance's is the first replicate's.
    """
    names, firsts = speeds_section(study).arms, dict[tuple[str, str], Run]()
    for run in study.runs():
        firsts.setdefault((run.arm, run.budget), run)
    inputs = {run: study.speed_inputs(run) for run in firsts.values()}
    found: list[Timed] = []
    for run in (run for name in names for run in inputs if run.arm == name):
        if all(inputs[run] != inputs[timed.run] for timed in found):
            others = (o.arm for o in inputs if o != run and inputs[o] == inputs[run])
            found.append(Timed(run, tuple(others)))
    return found


def load_speeds(study: StudyConfig) -> Speeds | None:
    """What there is of the study's timed arms, in their order; None if there is nothing.

    Raises:
        UserError: If the file cannot be read, or a speed is of other settings than the study's.
    """
    if study.speeds is None or not (path := Path(study.speeds.out)).is_file():
        return None
    loaded = Speeds.load(path)
    measured = {speed.key: speed for speed in loaded.speeds}
    found = []
    for timed in timed_arms(study):
        if (speed := measured.get((timed.run.arm, timed.run.budget))) is None:
            continue
        for key, value in study.speed_inputs(timed.run).items():
            if speed.inputs.get(key) != value:
                raise UserError(
                    f"{path} has {speed.arm} at {speed.budget} with another {key}: measure it again"
                )
        found.append(replace(speed, stands_for=timed.stands_for))
    return replace(loaded, speeds=tuple(found)) if found else None
