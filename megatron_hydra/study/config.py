"""A study's YAML: teachers, budgets, arms, questions, and what all arms have in common."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_hydra.api.convert import Reuse
from megatron_hydra.errors import UserError
from megatron_hydra.schema import Limits, PathText, as_overrides, named, read_config
from megatron_hydra.selection.budget import Budget, Constraints
from megatron_hydra.selection.scoring_config import ScoringConfig, load_scoring_config
from megatron_hydra.tasks.generation import find_generation_tasks
from megatron_hydra.tasks.probes import find_sub_probe
from megatron_hydra.training.config import RunConfig, load_config

STAGES = ("align", "distill", "long_context")
_Count = Annotated[int, Limits(least=1)]
_Share = Annotated[float, Limits(least=0, most=1)]


@dataclass
class Replicate:
    """Arms that are compared have the same of both: teacher, and seed of data and new weights."""

    teacher: str
    seed: Annotated[int, Limits(least=0, below=1000)]


@dataclass
class RunSection:
    """Where the study lies, and how often each arm runs."""

    folder: PathText
    """Teachers, and the arms that are unfinished."""
    budgets: list[str]
    """FA heads as a share of all: 1/8 is LA:FA 7:1."""
    replicates: list[Replicate]
    results: PathText | None = None
    """Folder of one JSON file for each finished or failed arm; None: `results` in `folder`."""
    title: str = "The study"
    """Of its page."""
    note: str = ""
    """What a reader of the page should know first."""


@dataclass
class Teacher:
    """A pretrained model; one of the two is said."""

    folder: PathText | None = None
    """Hugging Face folder."""
    script: PathText | None = None
    """Python file that trains one and writes it to its `--out`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the script, without their dashes."""


@dataclass
class DataSection:
    """What every arm trains on: `preprocess`'s documents, half of needles, of Python's docs."""

    length: _Count
    """Tokens of a document in stages 1 and 2: the teacher's own length."""
    documents: _Count
    long_length: _Count
    """The same in stage 3."""
    long_documents: _Count
    retrieval_fraction: _Share = 0.5


@dataclass
class Stage:
    """What a stage is for every arm."""

    tokens: _Count
    settings: dict[str, Any] = field(default_factory=dict)
    """Sections and keys of the stage's training, as in a stage's own YAML."""


@dataclass
class EvaluationSection:
    """What every arm is asked."""

    times: list[_Count]
    """Lengths, in times of `data.length`."""
    tasks: list[str] = field(default_factory=lambda: ["niah_single_2", "niah_multikey_1"])
    samples: _Count = 200
    """Prompts of each task at each length, and of each probe."""
    probes: list[str] = field(default_factory=list)
    """Sub-probes, other than those that `tasks` ask, at `data.length`."""
    text_tokens: _Count = 16384
    """Held-out text for loss and divergence, in tokens."""
    seed: int = 2_000_003
    batch_tokens: _Count = 16384
    """Of prompts that are answered together."""


@dataclass
class Arm:
    """One way to make a hybrid; what it does not say is as everywhere."""

    about: str
    ratio: str | None = None
    """FA heads as a share of all, whatever the budget is."""
    budget: Literal["fa_ratio", "kv_cache_ratio"] = "fa_ratio"
    constraints: Constraints = field(default_factory=Constraints)
    combine: dict[str, Any] = field(default_factory=dict)
    """Of the scores, as `plan combine.KEY=VALUE`."""
    window_ratio: str = "0"
    """Share of all heads that become windows, as `plan --window-ratio`."""
    random: bool = False
    """Heads by lot, drawn anew for each replicate."""
    model: dict[str, Any] = field(default_factory=dict)
    """Of the hybrid, as `convert model.KEY=VALUE`."""
    calibration_tokens: Annotated[int, Limits(least=0)] = 8192
    """Each head's scale starts at what the teacher's head has on so much text; 0: at 1."""
    calibrates_recurrence: bool = False
    """As `convert --calibrate-recurrence`."""
    reuse: Reuse = "all"
    """What of the hybrid starts from the teacher's weights."""
    tokens: dict[str, Annotated[float, Limits(least=0)]] = field(default_factory=dict)
    """Of a stage, in times of the study's; 0 leaves the stage out."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Changes of a stage's settings."""
    replicates: _Count = 1
    """It runs on the first so many."""
    budgets: list[str] | None = None
    """It runs at these alone; None: at all."""


@dataclass
class Ordering:
    """A claim: one arm is better than another."""

    better: str
    worse: str
    by: str = "retrieval"
    """`retrieval`: tasks beyond the training length; else the name of a probe."""
    paper: str = ""
    """What the paper has for the two."""


@dataclass
class Question:
    """A table of the page."""

    title: str
    arms: list[str]
    paper: dict[str, str] = field(default_factory=dict)
    """The paper's figures of an arm."""
    orderings: list[Ordering] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Run:
    """An arm at a budget on a replicate."""

    arm: str
    budget: str
    teacher: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.budget.replace('/', '-')}.{self.arm}.{self.teacher}.{self.seed}"


@dataclass
class StudyConfig:
    """A whole study; one field per section of the YAML file."""

    run: RunSection
    teachers: dict[str, Teacher]
    data: DataSection
    stages: dict[str, Stage]
    evaluation: EvaluationSection
    arms: dict[str, Arm]
    questions: dict[str, Question]
    """In the order in which their arms run."""
    score: dict[str, Any] = field(default_factory=dict)
    """Sections of `score --config`."""

    @property
    def folder(self) -> Path:
        """Of teachers and unfinished arms."""
        return Path(self.run.folder)

    @property
    def results(self) -> Path:
        """Of results."""
        return Path(self.run.results or self.folder / "results")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the evaluation, in tokens."""
        return tuple(self.data.length * times for times in self.evaluation.times)

    @property
    def retrieval_above(self) -> int:
        """Retrieval is read off lengths above it: beyond the training length, or the longest."""
        return min(max(self.lengths) - 1, self.data.length)

    def teacher_folder(self, name: str) -> Path:
        """Of Hugging Face."""
        given = self.teachers[name].folder
        return Path(given) if given else self.folder / "teachers" / name / "hf"

    def budget_of(self, arm: str, budget: str) -> str:
        """At which an arm runs where the study is at a budget."""
        return self.arms[arm].ratio or budget

    def runs(self) -> list[Run]:
        """All runs in their order: a budget, its questions, of each the first replicates first."""
        found: dict[Run, None] = {}
        for budget in self.run.budgets:
            for question in self.questions.values():
                for index, replicate in enumerate(self.run.replicates):
                    for name in question.arms:
                        arm, at = self.arms[name], self.budget_of(name, budget)
                        if index < arm.replicates and budget in (arm.budgets or self.run.budgets):
                            found[Run(name, at, replicate.teacher, replicate.seed)] = None
        return list(found)

    def steps(self, run: Run, stage: str) -> int:
        """Optimizer steps of a run's stage; 0: it is left out."""
        factor = self.arms[run.arm].tokens.get(stage, 1.0)
        return int(self.stages[stage].tokens * factor) // self._step_tokens(run, stage)

    def tokens(self, run: Run, stage: str) -> int:
        """That a run's stage trains on."""
        return self.steps(run, stage) * self._step_tokens(run, stage)

    def _step_tokens(self, run: Run, stage: str) -> int:
        batch: int = self.settings(run, stage)["data"]["global_batch_size"]
        return batch * self._length(stage)

    def _length(self, stage: str) -> int:
        return self.data.long_length if stage == "long_context" else self.data.length

    def settings(self, run: Run, stage: str) -> dict[str, Any]:
        """Sections of a run's stage, as its arm changes them."""
        common, own = self.stages[stage].settings, self.arms[run.arm].stages.get(stage, {})
        return {
            section: {**common.get(section, {}), **own.get(section, {})}
            for section in {"data": None, **common, **own}
        }

    def stage_config(
        self, run: Run, stage: str, data: Path, init_from: Path, teacher: Path, folder: Path
    ) -> RunConfig:
        """The training of a run's stage.

        Raises:
            UserError: For settings that no training takes.
        """
        last = stage == "long_context"
        settings = self.settings(run, stage)
        seed = 1000 * (1 + STAGES.index(stage)) + run.seed
        fixed: dict[str, dict[str, Any]] = {
            "data": {
                "paths": [str(data / ("long" if last else "short"))],
                "seq_length": self._length(stage),
                "seed": seed,
            },
            "trainer": {"max_steps": max(1, self.steps(run, stage)), "seed": seed},
            "transfer": {"stage": stage, "init_from": str(init_from)},
            "log": {"folder": str(folder)},
        }
        if not last or settings.get("transfer", {}).get("kl_weight"):
            fixed["transfer"]["teacher"] = str(teacher)
        with named(f"arm {run.arm}, stage {stage}"):
            return load_config(None, [*as_overrides(settings), *as_overrides(fixed)])

    def scoring(self, teacher: Path, out: Path) -> ScoringConfig:
        """The scoring of a teacher; UserError for settings that it does not take."""
        values = {"model.teacher": str(teacher), "run.out": str(out)}
        with named("score"):
            return load_scoring_config(None, as_overrides(self.score), values)

    def common_inputs(self) -> dict[str, str]:
        """What decides every arm's result, by name."""
        said = {"data": _said(self.data), "score": self.score, "evaluation": _said(self.evaluation)}
        return {name: _text(value) for name, value in said.items()}

    def inputs(self, run: Run) -> dict[str, str]:
        """What decides a run's result beside its teacher, by name."""
        arm = {k: v for k, v in _said(self.arms[run.arm]).items() if k not in _ELSEWHERE}
        stages = {
            stage: [self.steps(run, stage), self.settings(run, stage)]
            for stage in STAGES
            if self.steps(run, stage)
        }
        found = {"arm": arm, "stages": stages, "budget": run.budget, "seed": run.seed}
        return self.common_inputs() | {name: _text(value) for name, value in found.items()}


# What of an arm decides no result, or is counted in the steps and settings of its stages.
_ELSEWHERE = ("about", "replicates", "budgets", "tokens", "stages")


def _said(section: Any) -> dict[str, Any]:
    """What a section says beside its defaults, which a later release may add to."""
    found = {}
    for item in fields(section):
        value = getattr(section, item.name)
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if value != default:
            found[item.name] = value
    return found


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=vars)


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read and check a study's YAML file.

    Raises:
        UserError: If it cannot be read, a key or value is not allowed, or something is named that
            is not there.
    """
    study = read_config(StudyConfig, path, overrides)
    lists: dict[str, Sequence[Any]] = {
        "run.budgets": study.run.budgets,
        "run.replicates": study.run.replicates,
        "evaluation.times": study.evaluation.times,
        "evaluation.tasks": study.evaluation.tasks,
    }
    with named(str(path)):
        if empty := [key for key, listed in lists.items() if not listed]:
            raise UserError(f"{empty[0]} is empty: name one or more")
        for what, name, known in _names(study):
            if name not in known:
                raise UserError(f"{what} names {name!r}; there is {', '.join(known)}")
        for name, teacher in study.teachers.items():
            if (teacher.folder is None) == (teacher.script is None):
                raise UserError(f"teachers.{name} must say one of folder and script")
        for stage, section in study.stages.items():
            if "global_batch_size" not in section.settings.get("data", {}):
                raise UserError(f"stages.{stage}.settings.data.global_batch_size is missing")
        for arm in study.arms.values():
            for ratio in (*study.run.budgets, *([arm.ratio] if arm.ratio else [])):
                _ratio(ratio, arm.budget)
            _fraction(arm.window_ratio, "a window_ratio")
        find_generation_tasks(study.evaluation.tasks)
        for name in study.evaluation.probes:
            find_sub_probe(name)
        nowhere = Path("nowhere")
        study.scoring(nowhere, nowhere)
        for run in study.runs():
            for stage in STAGES:
                study.stage_config(run, stage, nowhere, nowhere, nowhere, nowhere)
    return study


def budget_for(study: StudyConfig, run: Run) -> Budget:
    """The budget of a run's plan."""
    return _ratio(run.budget, study.arms[run.arm].budget)


def _ratio(text: str, kind: Literal["fa_ratio", "kv_cache_ratio"]) -> Budget:
    try:
        return Budget(kind, _fraction(text, "a budget"))
    except ValueError as error:
        raise UserError(f"a budget is {text!r}; a ratio such as 1/8 is needed") from error


def _fraction(text: str, what: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{what} is {text!r}; a ratio such as 1/8 is needed") from error


def _names(study: StudyConfig) -> Iterator[tuple[str, str, Mapping[str, Any] | Sequence[str]]]:
    """Where a name stands, the name, and what it may be."""
    yield from (("stages", name, STAGES) for name in study.stages)
    yield from (("the study needs all stages and", name, study.stages) for name in STAGES)
    yield from (("run.replicates", each.teacher, study.teachers) for each in study.run.replicates)
    known = ("retrieval", *study.evaluation.probes)
    for key, question in study.questions.items():
        yield from ((f"questions.{key}.arms", name, study.arms) for name in question.arms)
        yield from ((f"questions.{key}.paper", name, question.arms) for name in question.paper)
        for ordering in question.orderings:
            pair = (ordering.better, ordering.worse)
            yield from ((f"questions.{key}.orderings", name, question.arms) for name in pair)
            yield f"questions.{key}.orderings", ordering.by, known
    for name, arm in study.arms.items():
        yield from ((f"arms.{name}.budgets", each, study.run.budgets) for each in arm.budgets or ())
        for stage in (*arm.tokens, *arm.stages):
            yield f"arms.{name}", stage, STAGES
