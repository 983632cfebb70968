"""What is known of an arm once it is finished or has failed: one JSON file each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_hydra.errors import UserError
from megatron_hydra.evaluation.generation import GeneratedResult
from megatron_hydra.files import write_json
from megatron_hydra.schema import MAY_LACK, load_json
from megatron_hydra.study.config import Run, StudyConfig

FILE_KIND, SCHEMA_VERSION = "study_arm", 1
OF_TEACHER = "teacher's "
"""What inputs begin with that all results of a teacher have in common."""


@dataclass(frozen=True)
class ArmResult:
    """A run of an arm.

    Attributes:
        arm: Its name.
        budget: At which it ran.
        teacher: Its teacher's name.
        seed: Of data and new weights.
        inputs: What decided the result, by name: settings as JSON text, contents as hashes.
        status: Whether there is a result.
        reason: Why it failed; else empty.
        fa_heads: By layer.
        evaluation: By generation, and the loss by position.
        probes: Of each sub-probe, a 1 for each sample that greedy decoding answers right, else 0.
        divergence_nats: KL(teacher || arm) of the next token of held-out text, at the training
            length.
        tokens: Trained on, by stage.
        seconds: By the part of the work, while other arms ran beside it.
        provenance: Versions and device.
    """

    arm: str
    budget: str
    teacher: str
    seed: int
    inputs: Mapping[str, str]
    status: Literal["finished", "failed"]
    reason: str = field(default="", metadata=MAY_LACK)
    fa_heads: tuple[tuple[int, ...], ...] = field(default=(), metadata=MAY_LACK)
    evaluation: GeneratedResult | None = field(default=None, metadata=MAY_LACK)
    probes: Mapping[str, str] = field(default_factory=dict, metadata=MAY_LACK)
    divergence_nats: float | None = field(default=None, metadata=MAY_LACK)
    tokens: Mapping[str, int] = field(default_factory=dict, metadata=MAY_LACK)
    seconds: Mapping[str, float] = field(default_factory=dict, metadata=MAY_LACK)
    provenance: Mapping[str, Any] = field(default_factory=dict, metadata=MAY_LACK)

    @property
    def run(self) -> Run:
        """Which run it is of."""
        return Run(self.arm, self.budget, self.teacher, self.seed)

    def bits(self, by: str, above: int) -> list[str]:
        """Which samples were right, as text, a cell each.

        Args:
            by: `retrieval`, or the name of a probe.
            above: Tokens; cells of retrieval at this length and below are left out.
        """
        if by != "retrieval":
            return [self.probes[by]]
        assert self.evaluation is not None, "a failed arm has no samples"
        return [cell.right for cell in self.evaluation.tasks if cell.length > above]

    def save(self, folder: Path) -> None:
        """Write it to a folder of results, in an earlier one's place."""
        heading = {"schema_version": SCHEMA_VERSION, "kind": FILE_KIND}
        write_json(folder / f"{self.run.name}.json", heading | asdict(self), overwrite=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ArmResult:
        """Read what :meth:`save` wrote; UserError if it cannot be read."""
        return load_json(cls, path, FILE_KIND, SCHEMA_VERSION)


def load_results(study: StudyConfig) -> dict[Run, ArmResult]:
    """The results that there are of the study's runs.

    Raises:
        UserError: If one cannot be read, or is of other settings than the study's, or of another
            teacher, data or scores than the others of that teacher.
    """
    found: dict[Run, ArmResult] = {}
    of_teacher: dict[tuple[str, str], tuple[str, Path]] = {}
    for run in study.runs():
        path = study.results / f"{run.name}.json"
        if not path.is_file():
            continue
        found[run] = ArmResult.load(path)
        for key, value in study.inputs(run).items():
            if found[run].inputs.get(key) != value:
                raise UserError(f"{path} was made with another {key}: run it again")
        for key, value in found[run].inputs.items():
            first, where = of_teacher.setdefault((run.teacher, key), (value, path))
            if key.startswith(OF_TEACHER) and value != first:
                raise UserError(
                    f"{path} and {where} are of different ones of the {key}: run one of them again"
                )
    return found
