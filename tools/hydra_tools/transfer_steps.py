"""The steps of a whole transfer: what each reads, writes and was told, and which has to run."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, get_args

from megatron_hydra.api.plan import check_plan
from megatron_hydra.api.status import status_of
from megatron_hydra.errors import UserError
from megatron_hydra.export.code import code_hash
from megatron_hydra.files import content_hash
from megatron_hydra.schema import PathText, as_overrides, flat, named, read_config
from megatron_hydra.selection.budget import BudgetKind
from megatron_hydra.selection.scoring_config import ScoringConfig, load_scoring_config
from megatron_hydra.tasks.text_files import TextOptions, find_texts
from megatron_hydra.teachers.model_folder import weights_hash
from megatron_hydra.teachers.tokenizer import find_tokenizer, tokenizer_files
from megatron_hydra.training.config import HELD_BY_CONTENT, MAY_CHANGE, RunConfig, load_config
from megatron_hydra.training.run_folder import RunFolder
from megatron_hydra.training.run_inputs import datasets_hash
from megatron_hydra.unfinished import forget_unfinished, num_finished
from megatron_hydra.yaml_text import read_yaml

STAGES = ("stage1_align", "stage2_distill", "stage3_long_context")
_Options = dict[str, Any] | None
# What decides nothing about the scores; the teacher is held by its content.
_NOT_OF_THE_SCORES = ("model.teacher", "run.out")
# Options by which a step would write or read something else than the chain's.
_HANDED_ON = ("out", "overwrite", "plan", "hf", "hybrid", "dump", "png")
_READ_OPTIONS = ("results", "pareto", "evaluation")
# How an evaluation is made, which no figure depends on.
_NOT_OF_THE_ANSWERS = ("batch_size", "tp", "trust_remote_code")


@dataclass
class RunSection:
    """Where the transfer lies, and what starts its ranks."""

    folder: PathText
    """Everything that the steps write, and `transfer.json`, which tells what was made of what."""
    teacher: PathText
    """Hugging Face folder."""
    launcher: str | None = None
    """Command that runs `-m MODULE ARGUMENTS` on all ranks, as `torchrun --nproc-per-node 8`; for
    `score` and the stages. None: one process."""
    single_launcher: str | None = None
    """Command that runs `-m MODULE ARGUMENTS` as one process, as `docker run IMAGE python`; for the
    other steps. None: this Python."""


@dataclass
class TransferConfig:
    """A transfer.yaml: a section for each step, with the options of its verb.

    An option is written without its dashes (`fa_ratio: 1/4`); a section within a step's is one of
    the step's own configuration (`optim: {lr: 1e-4}`). `config`, of `score` and the stages, is a
    path from the file's own folder; None: the step's name with `.yaml`.
    """

    run: RunSection
    convert_teacher: _Options = None
    score: _Options = None
    plan: _Options = None
    convert: _Options = None
    stage1_align: _Options = None
    stage2_distill: _Options = None
    stage3_long_context: _Options = None
    export: _Options = None
    evaluate: _Options = None
    report: _Options = None


@dataclass(frozen=True)
class Step:
    """One verb with its arguments.

    Attributes:
        name: Section of the transfer.yaml.
        verb: As `megatron-hydra` has it.
        arguments: Of the verb.
        output: File or folder that it writes.
        settings: What it was told, as `step.key` -> value; what is left out does not decide a
            result.
        reads: What it reads, by the names that people are told; a tuple is a list of texts.
        run: Of a stage: its configuration.
        scoring: The same of the scoring.
    """

    name: str
    verb: str
    arguments: tuple[str, ...]
    output: Path
    settings: Mapping[str, str]
    reads: Mapping[str, Path | tuple[Path, ...]]
    run: RunConfig | None = None
    scoring: ScoringConfig | None = None

    @property
    def has_ranks(self) -> bool:
        """Whether the verb runs on several ranks."""
        return self.run is not None or self.verb == "score"

    @property
    def goes_on(self) -> bool:
        """Whether the verb keeps what is finished of it, maybe hours, for the next start."""
        return self.has_ranks or self.verb == "evaluate"

    def inputs(self) -> dict[str, str]:
        """Everything that decides the result, by name: settings as text, contents as hashes."""
        found = {name: _hash(path) for name, path in self.reads.items()}
        if self.run is not None:
            found["data.paths"] = datasets_hash(self.run.data)
        return {**self.settings, **found}

    def is_there(self) -> bool:
        """Whether the output is, as a whole."""
        if self.run is not None:
            return RunFolder(self.run).is_complete()
        if self.verb == "convert":
            folder = self.output
            return (folder / "model.json").is_file() and any(folder.glob("weights/*.distcp"))
        return (self.output / "config.json" if self.verb == "export" else self.output).is_file()

    def kept(self) -> str:
        """What is finished of a step that goes on, in words; empty where nothing is."""
        if self.run is None:
            number, words = num_finished(self.output), "with {:,} measurements kept"
        else:
            number, words = status_of(self.run).saved_step, "after step {:,}"
        return words.format(number) if number else ""

    def clear(self) -> None:
        """Remove what an earlier run of this step left, made of other inputs; nothing else."""
        if self.run is None:
            forget_unfinished(self.output)
            if self.goes_on:  # the others replace what is there
                self.output.unlink(missing_ok=True)
            return
        folder = RunFolder(self.run)
        with folder.lock():
            folder.check_removable()
            folder.remove()


def is_transfer(path: str | Path) -> bool:
    """Whether a YAML file is a transfer's, and not a stage's.

    Raises:
        UserError: If it cannot be read.
    """
    return "run" in read_yaml(path, [section.name for section in fields(TransferConfig)])


def load_steps(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunSection, list[Step]]:
    """Read a transfer.yaml and check it, with the options and configurations of all its steps.

    Args:
        path: The file.
        overrides: Each `step.key=value`.

    Returns:
        The section `run`, and the steps in the order of the work.

    Raises:
        UserError: If a file cannot be read, or a key, an option or a value is not allowed.
    """
    config = read_config(TransferConfig, path, overrides)
    return config.run, list(_Maker(config, Path(path).parent).steps())


def check_planning(scoring: Step, planning: Step) -> None:
    """See that the plan will find in the scores what it asks for.

    Raises:
        UserError: As :func:`~megatron_hydra.api.plan.check_plan`.
    """
    assert scoring.scoring is not None
    told = _parsed(planning.name, planning.arguments)
    kinds = [kind for kind in get_args(BudgetKind) if getattr(told, kind, None) is not None]
    with named(f"step {planning.name}"):
        check_plan(
            scoring.scoring, told.combine, told.window_ratio, kinds[0] if kinds else "fa_heads",
            told.random_seed is not None,
        )  # fmt: skip


def check_evaluating(evaluating: Step) -> None:
    """See that the evaluation's options are for one by generation, in one process.

    Raises:
        UserError: As the verb's `check_arguments`.
    """
    told = _parsed(evaluating.name, evaluating.arguments)
    with named(f"step {evaluating.name}"):
        _verb_of(evaluating.name).check_arguments(told)
        if told.tp not in (None, 1):
            raise UserError(f"--tp {told.tp} is for torchrun, and this step is one process")


def _parsed(name: str, arguments: Sequence[str]) -> argparse.Namespace:
    """As the step's verb reads them."""
    parser = _Parser(prog=name, allow_abbrev=False, add_help=False)
    _verb_of(name).add_arguments(parser)
    return parser.parse_args(list(arguments))


def _verb_of(name: str) -> Any:
    """The module of a step's verb."""
    return importlib.import_module(f"hydra_tools.{name.removesuffix('_teacher')}")


@dataclass(frozen=True)
class _Maker:
    config: TransferConfig
    base: Path
    """Folder of the transfer.yaml."""

    def steps(self) -> Iterator[Step]:
        folder, source = Path(self.config.run.folder), Path(self.config.run.teacher)
        teacher, converted = folder / "teacher", folder / "converted"
        scores, plan, page = folder / "scores.json", folder / "plan.json", folder / "report.html"
        exported, generation = folder / "hydra-hf", folder / "generation.json"
        of_teacher = {"teacher": source}
        yield self._verb("convert_teacher", of_teacher, teacher)
        yield self._score(teacher, scores)
        yield self._verb("plan", {"scores": scores}, plan)
        yield self._verb("convert", {**of_teacher, "plan": plan}, converted)
        previous = converted
        for stage in STAGES:
            yield self._stage(stage, previous, teacher)
            previous = folder / stage / "hybrid"
        yield self._verb("export", {"model": previous}, exported)
        asked = {
            "hf": {"teacher": source, "hybrid, trained": exported},
            "model": {"hybrid, untrained": converted},
        }
        # By what they generate: log-likelihoods stay high where that is lost (arXiv 2603.26556).
        yield self._verb("evaluate", asked, generation, generate=True)
        files = {"scores": scores, "plan": plan, "generation": generation}
        runs = {stage: folder / stage for stage in STAGES}
        yield self._verb("report", {**files, **of_teacher, "run": runs}, page)

    def _verb(self, name: str, reads: Mapping[str, Any], output: Path, **fixed: bool) -> Step:
        """A step that is told by its verb's options; ``fixed`` ones are not the user's."""
        verb, options = name.removesuffix("_teacher"), self._options(name)
        self._refuse(name, options, (*reads, *fixed, *_HANDED_ON))
        given = {**reads, **fixed, "out": output}
        arguments = [*as_overrides(options), *_flags(given), *_flags(options)]
        read = _parsed(name, arguments)
        paths = self._named(reads)
        for key in _READ_OPTIONS:
            if (value := getattr(read, key, None)) is not None and key not in reads:
                paths |= self._named({key: Path(value)})
        texts = getattr(read, "calibration_text", None) or getattr(read, "text", None) or []
        paths |= _texts(name, [texts] if isinstance(texts, str) else texts, read)
        left_out = _NOT_OF_THE_ANSWERS if verb == "evaluate" else ()
        settings = {
            f"{name}.{key}": _text(value) for key, value in flat(options) if key not in left_out
        }
        if verb == "export":  # that of another release is not run by `evaluate`
            settings["model code"] = code_hash()
        return Step(name, verb, tuple(arguments), output, settings, paths)

    def _score(self, teacher: Path, out: Path) -> Step:
        fixed = {"model.teacher": str(teacher), "run.out": str(out)}
        path, arguments = self._configured("score", fixed)
        with named("step score"):
            config = load_scoring_config(path, arguments)
        probes = config.probes
        paths = self._named({"teacher": teacher})
        paths |= _texts("score", [probes.text] if probes.text else [], probes)
        settings = _settings("score", config, _NOT_OF_THE_SCORES)
        words = ("--config", str(path), *arguments)
        return Step("score", "score", words, out, settings, paths, scoring=config)

    def _stage(self, name: str, init_from: Path, teacher: Path) -> Step:
        folder = Path(self.config.run.folder) / name
        fixed = {"transfer.init_from": str(init_from), "log.folder": str(folder)}
        reads = {"init_from": init_from}
        path, arguments = self._configured(name, fixed)
        with named(f"step {name}"):
            said = read_config(RunConfig, path, arguments).transfer
            if name != STAGES[-1] or said.teacher is not None or said.kl_weight:
                arguments.append(f"transfer.teacher={_text(str(teacher))}")
                reads["teacher"] = teacher
            config = load_config(path, arguments)
        settings = _settings(name, config, (*MAY_CHANGE, *HELD_BY_CONTENT))
        words = ("--config", str(path), *arguments)
        return Step(name, "train", words, folder, settings, self._named(reads), config)

    def _configured(self, name: str, fixed: Mapping[str, str]) -> tuple[Path, list[str]]:
        """The YAML file of a step that has one, and the overrides for it."""
        options = self._options(name)
        path = self.base / str(options.pop("config", f"{name}.yaml"))
        self._refuse(name, dict(flat(options)), (*fixed, "transfer.teacher"))
        if single := [key for key, value in options.items() if not isinstance(value, Mapping)]:
            raise UserError(
                f"{name}.{single[0]} must be {name}.section.key, as {path} has sections"
            )
        return path, [*as_overrides(options), *as_overrides(fixed)]

    def _options(self, name: str) -> dict[str, Any]:
        told = getattr(self.config, name) or {}
        return {key.replace("-", "_"): value for key, value in told.items()}  # as flags may be

    def _refuse(self, name: str, options: Collection[str], keys: Collection[str]) -> None:
        """Refuse what is not for a user to say."""
        for key in keys:
            if key in options or key.replace("_", "-") in options:
                raise UserError(f"{name}.{key} is not for a transfer.yaml: its steps hand files on")

    def _named(self, reads: Mapping[str, Any]) -> dict[str, Path | tuple[Path, ...]]:
        """Paths by the names that people are told: below the run's folder from there on."""
        folder, found = Path(self.config.run.folder), {}
        for key, value in reads.items():
            each = value.values() if isinstance(value, Mapping) else [value]
            for path in each:
                path = path / "metrics.jsonl" if key == "run" else path
                is_own = path.is_relative_to(folder)
                found[str(path.relative_to(folder)) if is_own else str(path)] = path
        return found


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"step {self.prog}: {message}")


def _settings(name: str, config: Any, left_out: Collection[str]) -> dict[str, str]:
    """What a configuration says beside its defaults, which a later release may add to."""
    found = {}
    for section in fields(config):
        for item in fields(getattr(config, section.name)):
            key = f"{section.name}.{item.name}"
            value = getattr(getattr(config, section.name), item.name)
            default = item.default if item.default_factory is MISSING else item.default_factory()
            if value != default and not {key, section.name} & set(left_out):
                found[f"{name}.{key}"] = json.dumps(value, default=vars)
    return found


def _flags(options: Mapping[str, Any]) -> Iterator[str]:
    """`--key=value` of the others."""
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, Mapping) and all(isinstance(path, Path) for path in value.values()):
            yield from (f"{flag}={name}={path}" for name, path in value.items())
        elif isinstance(value, list):
            yield from (flag, *map(str, value))
        elif value is True:
            yield flag
        elif value not in (None, False) and not isinstance(value, Mapping):
            yield f"{flag}={value}"


def _text(value: Any) -> str:
    """A value as YAML of one line."""
    return json.dumps(value, ensure_ascii=False)


def _texts(name: str, texts: Sequence[str], options: Any) -> dict[str, Path | tuple[Path, ...]]:
    """The files of a step's text."""
    found = find_texts(texts, TextOptions(options.text_key, options.text_format)) if texts else ()
    return {f"{name}'s text": tuple(found)} if found else {}


def _hash(path: Path | tuple[Path, ...]) -> str:
    """A hash (hex) of the contents of a file, texts or a model folder; empty if one is missing."""
    try:
        if isinstance(path, tuple):
            return hashlib.sha256(
                "".join(content_hash([file]) for file in path).encode()
            ).hexdigest()
        if not path.is_dir():
            return content_hash([path])
        names = ("model.json", "plan.json", "config.json")
        files = [path / name for name in names if (path / name).is_file()]
        beside = content_hash([*files, *tokenizer_files(find_tokenizer(path))])
        return hashlib.sha256(f"{weights_hash(path)} {beside}".encode()).hexdigest()
    except UserError:
        return ""
