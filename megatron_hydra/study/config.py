"""A study's YAML: teachers, budgets, arms, questions, and what all arms have in common."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from megatron_hydra.api.plan import check_plan
from megatron_hydra.errors import UserError
from megatron_hydra.schema import MAY_LACK, as_overrides, named, read_config
from megatron_hydra.selection.budget import Budget
from megatron_hydra.selection.scoring_config import ScoringConfig, load_scoring_config
from megatron_hydra.study.sections import (
    Arm,
    DataSection,
    EvaluationSection,
    Finding,
    Question,
    RunSection,
    SpeedsSection,
    Stage,
    Teacher,
)
from megatron_hydra.tasks.generation import find_generation_tasks
from megatron_hydra.tasks.probes import find_sub_probe
from megatron_hydra.training.config import RunConfig, load_config

STAGES = ("align", "distill", "long_context")
_OF_THE_PLAN = {"about", "ratio", "budget", "constraints", "combine", "random", "replicates",
                "budgets"}  # fmt: skip
IN_NATS = ("loss", "KL")
"""What an ordering may be by, beside answers: the lower is the better."""


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
    findings: dict[str, Finding] = field(default_factory=dict)
    """What a reader should take along."""
    speeds: SpeedsSection | None = None
    """None: no speed is measured."""

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

    @property
    def budgets(self) -> list[str]:
        """The study's, and those that its arms name beside."""
        named = (budget for arm in self.arms.values() for budget in arm.budgets or ())
        return list(dict.fromkeys([*self.run.budgets, *named]))

    def budgets_of(self, question: Question) -> list[str]:
        """At which an arm of a question runs."""
        arms = [self.arms[name] for name in question.arms]
        return [budget for budget in self.budgets if any(self.is_at(arm, budget) for arm in arms)]

    def is_at(self, arm: Arm, budget: str) -> bool:
        """Whether an arm runs where the study is at a budget."""
        return budget in (arm.budgets or self.run.budgets)

    def budget_of(self, arm: str, budget: str) -> str:
        """At which an arm runs where the study is at a budget."""
        return self.arms[arm].ratio or budget

    def differs_by_plan(self, name: str) -> bool:
        """Whether an arm is as everywhere but for its heads, at the study's budgets or a ratio."""
        arm = self.arms[name]
        return {*_said(arm)} <= _OF_THE_PLAN and {*(arm.budgets or ())} <= {*self.run.budgets}

    def is_teacher(self, run: Run) -> bool:
        """Whether a run is of the teacher as it came: all heads FA, and no step of training."""
        return Fraction(run.budget) == 1 and not any(self.steps(run, stage) for stage in STAGES)

    def runs(self, asked: Sequence[str] = ()) -> list[Run]:
        """Runs in their order: a budget, its questions, of each the first replicates first.

        Args:
            asked: Questions by their keys, in the order in which their arms run, each with its
                budgets or, as `key@1/8`, at one; empty for all.

        Raises:
            UserError: If there is no such question, or nothing of it at that budget.
        """
        return self._runs_of(asked) if asked else list(self._all_runs)

    @cached_property
    def _all_runs(self) -> list[Run]:
        """The page asks for them with every figure, and nothing that they come of changes."""
        return self._runs_of(())

    def _runs_of(self, asked: Sequence[str]) -> list[Run]:
        found: dict[Run, None] = {}
        for question, budget in self._asked(asked):
            number = itertools.count()
            for replicate in self.run.replicates:
                index = next(number) if replicate.runs is None else 0
                for name in question.arms:
                    at = self.budget_of(name, budget)
                    if replicate.runs is None:
                        runs = index < self.arms[name].replicates
                    else:
                        runs = name in replicate.runs.get(budget, ())
                    if runs and self.is_at(self.arms[name], budget):
                        found[Run(name, at, replicate.teacher, replicate.seed)] = None
        return list(found)

    def _asked(self, asked: Sequence[str]) -> Iterator[tuple[Question, str]]:
        if not asked:
            for budget in self.budgets:
                yield from ((question, budget) for question in self.questions.values())
        for words in asked:
            key, _, budget = words.partition("@")
            if key not in self.questions:
                raise UserError(
                    f"there is no question {key!r}; there is {', '.join(self.questions)}"
                )
            question = self.questions[key]
            there = self.budgets_of(question)
            if budget and budget not in there:
                raise UserError(f"question {key} is at {', '.join(there)}, not at {budget!r}")
            yield from ((question, each) for each in ([budget] if budget else there))

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
        asked = {k: v for k, v in _said(self.evaluation).items() if k not in _AT_ONCE}
        said = {"data": _said(self.data), "score": self.score, "evaluation": asked}
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

    def speed_inputs(self, run: Run) -> dict[str, str]:
        """What decides how fast a run is beside its teacher's shape and scores, by name."""
        assert self.speeds is not None
        arm = {
            k: v
            for k, v in _said(self.arms[run.arm]).items()
            if k not in (*_ELSEWHERE, *_OF_WEIGHTS)
        }
        sections = self.settings(run, "long_context").items()
        settings = {key: section for key, section in sections if key not in ("optim", "resume")}
        asked, timed = self.evaluation, self.speeds
        training = [self.data.long_length, settings, timed.warmup_steps, timed.steps]
        reads = [max(self.lengths), asked.batch_tokens, asked.forward_tokens]
        generation = [asked.tasks[0], asked.seed, *reads, timed.new_tokens]
        found = {"budget": run.budget, "arm": arm, "training": training, "generation": generation}
        return {name: _text(value) for name, value in found.items()}


# Of the evaluation: how much is read at once decides no result.
_AT_ONCE = ("batch_tokens", "forward_tokens")
# What of an arm decides no result, or is counted in the steps and settings of its stages.
_ELSEWHERE = ("about", "replicates", "budgets", "tokens", "stages")
# What of an arm decides its weights and nothing else.
_OF_WEIGHTS = ("calibration_tokens", "calibrates_recurrence", "reuse")


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
    return json.dumps(value, sort_keys=True, default=_whole)


def _whole(section: Any) -> dict[str, Any]:
    """All that a section within an arm says; what came later only where it is not its default."""
    later = {item.name: item.default for item in fields(section) if item.metadata == MAY_LACK}
    return {k: v for k, v in vars(section).items() if k not in later or v != later[k]}


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
    if study.speeds is not None:
        lists["speeds.arms"] = study.speeds.arms
    with named(str(path)):
        if empty := [key for key, listed in lists.items() if not listed]:
            raise UserError(f"{empty[0]} is empty: name one or more")
        if study.run.least_teacher_accuracy and 1 not in study.evaluation.times:
            raise UserError("run.least_teacher_accuracy is at 1 of evaluation.times: name it there")
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
            for ratio in (*study.budgets, *([arm.ratio] if arm.ratio else [])):
                _ratio(ratio, arm.budget)
            _fraction(arm.window_ratio, "a window_ratio")
        find_generation_tasks(study.evaluation.tasks)
        for name in study.evaluation.probes:
            find_sub_probe(name)
        nowhere = Path("nowhere")
        scoring = study.scoring(nowhere, nowhere)
        for name, run in {run.arm: run for run in study.runs()}.items():
            arm = study.arms[name]
            with named(f"arms.{name}"):
                check_plan(
                    scoring,
                    as_overrides({"combine": arm.combine}),
                    Fraction(arm.window_ratio),
                    is_random=arm.random,
                )
            for stage in STAGES:  # any run's, as all its runs have the same settings
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
    for replicate in study.run.replicates:
        yield "run.replicates", replicate.teacher, study.teachers
        for budget, arms in (replicate.runs or {}).items():
            yield "run.replicates", budget, study.budgets
            at = [name for name, arm in study.arms.items() if study.is_at(arm, budget)]
            yield from ((f"run.replicates at {budget}", name, at) for name in arms)
    known = ("retrieval", *IN_NATS, *study.evaluation.probes)
    for key, question in study.questions.items():
        yield from ((f"questions.{key}.arms", name, study.arms) for name in question.arms)
        yield from ((f"questions.{key}.paper", name, question.arms) for name in question.paper)
        for ordering in question.orderings:
            pair = (ordering.better, ordering.worse)
            yield from ((f"questions.{key}.orderings", name, question.arms) for name in pair)
            yield from ((f"questions.{key}", by, known) for by in question.measures(ordering))
    for key, finding in study.findings.items():
        for each in finding.rests_on:
            yield from ((f"findings.{key}", arm, study.arms) for arm in (each.better, each.worse))
            yield f"findings.{key}", each.by, known
            yield f"findings.{key}", each.budget, study.budgets
    for name, arm in study.arms.items():
        for stage in (*arm.tokens, *arm.stages):
            yield f"arms.{name}", stage, STAGES
    asked = list(dict.fromkeys(name for each in study.questions.values() for name in each.arms))
    for name in study.speeds.arms if study.speeds else ():
        yield "speeds.arms, which are those of questions,", name, asked
