"""The pages for readers: their links, and what they say of files and fields, held to the code.

Catches: a page that leads nowhere or that nobody finds, a command that its verb would refuse, a key
of a file without an explanation, a field that a page names and that is no longer there. `make
checks` builds the site, with anchors.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
import shlex
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hydra_tools.transfer import Record
from hydra_tools.transfer import _File as TransferFile

from megatron_hydra.api.estimate import Estimate, LayoutEstimate, StageEstimate
from megatron_hydra.certify.tables import CertificateFile, NotRun, Row
from megatron_hydra.evaluation.generation import Answered, GeneratedResult, Generation
from megatron_hydra.evaluation.positions import PositionLoss
from megatron_hydra.evaluation.reading import _Model, _Task
from megatron_hydra.evaluation.results import NeedleGrid
from megatron_hydra.head_plan import _File as PlanFile
from megatron_hydra.head_plan import _FileLayer
from megatron_hydra.model.options import HydraFields
from megatron_hydra.selection.budget import Budget, Constraints
from megatron_hydra.selection.combination import Combination
from megatron_hydra.selection.cost import Costs
from megatron_hydra.selection.explanation import ChosenHead, Explanation
from megatron_hydra.selection.pareto import ParetoRow
from megatron_hydra.selection.scores import HeadScores, ProbeRecord
from megatron_hydra.selection.scoring_config import ScoringConfig
from megatron_hydra.selection.shape import ModelShape
from megatron_hydra.study.results import ArmResult
from megatron_hydra.study.speeds import Speed, Speeds
from megatron_hydra.tasks.generation import GenerationSample
from megatron_hydra.teachers.checkpoint import _File as _Checkpoint
from megatron_hydra.teachers.license import License
from megatron_hydra.training.config import RunConfig
from megatron_hydra.training.indexed_dataset import EndOfDocument

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
# Below these keys stand other files' contents, names that users give, and lengths.
_OPAQUE = {
    "config", "versions", "effects", "weights", "perplexity", "loss_nats", "peak_bytes",
    "changed_for_certification", "init_from", "inputs",
}  # fmt: skip


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES])
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    own = [link for link in links if "://" not in link]
    assert [link for link in own if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_every_command_is_one_that_its_verb_takes(page: Path) -> None:
    for command in _commands(page.read_text(encoding="utf-8")):
        words = shlex.split(command, comments=True)
        verb = words[words.index("-m") + 1].rpartition(".")[2] if "-m" in words else words[1]
        options = words[words.index("-m") + 2 :] if "-m" in words else words[2:]
        parser = argparse.ArgumentParser(allow_abbrev=False)
        module = importlib.import_module(f"hydra_tools.{verb.replace('-', '_')}")
        module.add_arguments(parser)
        try:
            parser.parse_args(options)
        except SystemExit:
            pytest.fail(f"{page.name}: {command}")


def _commands(text: str) -> list[str]:
    """Lines of code blocks that run a verb, by itself or by torchrun."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [x for x in lines if x.startswith("megatron-hydra ") or "-m hydra_tools." in x]


def test_every_page_is_named_in_the_readme_and_in_the_overview() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    overview = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    others = [page.name for page in PAGES if page.name != "index.md"]
    assert [name for name in others if f"docs/{name})" not in readme] == []
    assert [name for name in others if f"({name})" not in overview] == []


def _words_of(*sections: str) -> set[str]:
    """All words in code spans of some sections of the page on files."""
    text = (ROOT / "docs/files.md").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^#+ (.+)\n((?:(?!^#+ ).*\n)*)", text, re.M))
    found = [span for name in sections for span in re.findall(r"`([^`\n]+)`", parts[name])]
    return {word for span in found for word in re.findall(r"\w+", span)}


def _keys(data: Any, opaque: set[str]) -> Iterator[str]:
    if isinstance(data, list):
        for item in data:
            yield from _keys(item, opaque)
    elif isinstance(data, dict):
        for key, value in data.items():
            yield key
            if key not in opaque:
                yield from _keys(value, opaque)


_SCORES = ("Rules for all of them", "Head scores")
_PLAN = (*_SCORES, "Head plan", "Costs")


@pytest.mark.parametrize(
    ("member", "sections", "opaque"),
    [
        ("scores.json", _SCORES, set()),
        ("plan.json", _PLAN, {"scores"}),
        ("random_plan.json", _PLAN, {"scores"}),
        ("pareto.json", (*_PLAN, "Pareto table"), {"scores"}),
        ("converted/model.json", ("Rules for all of them", "Checkpoint folder"), set()),
        ("run_complete/hybrid/model.json", ("Rules for all of them", "Checkpoint folder"), set()),
        ("data/train.json", ("Rules for all of them", "Dataset"), set()),
        ("evaluation.json", ("Rules for all of them", "Evaluation"), {"plan"}),
    ],
)
def test_every_key_of_an_earlier_file_is_explained(
    member: str, sections: tuple[str, ...], opaque: set[str]
) -> None:
    with tarfile.open(ROOT / "tests/golden/version_0_1.tar.xz") as archive:
        stream = archive.extractfile(f"./{member}")
        assert stream is not None
        data = json.load(stream)
    if member == "evaluation.json":  # by the users' names of the models
        data["provenance"]["models"] = list(data["provenance"]["models"].values())
    keys = set(_keys(data, _OPAQUE | opaque))
    assert len(keys) > 5
    assert sorted(keys - _words_of(*sections)) == []


def test_every_key_of_a_certificate_is_explained() -> None:
    for path in (ROOT / "tests/certificates").glob("*.json"):
        keys = set(_keys(json.loads(path.read_text()), _OPAQUE | {"fa_heads"}))
        assert sorted(keys - _words_of("Rules for all of them", "Certificate")) == []


@pytest.mark.parametrize(
    ("types", "sections"),
    [
        ((HeadScores, ProbeRecord, ModelShape, Combination), _SCORES),
        ((PlanFile, _FileLayer, Budget, Constraints, Costs, Explanation, ChosenHead), _PLAN),
        ((_Checkpoint, License), ("Rules for all of them", "Checkpoint folder")),
        ((ParetoRow,), (*_PLAN, "Pareto table")),
        ((_Model, _Task, NeedleGrid), ("Evaluation",)),
        (
            (Generation, GeneratedResult, Answered, PositionLoss, GenerationSample),
            ("Rules for all of them", "Generation"),
        ),
        ((Estimate, StageEstimate, LayoutEstimate), ("Rules for all of them", "Estimate")),
        ((TransferFile, Record), ("Rules for all of them", "State of a transfer")),
        ((ArmResult, Speeds, Speed), ("Rules for all of them", "Study")),
        ((CertificateFile, Row, NotRun), ("Rules for all of them", "Certificate")),
    ],
)
def test_every_key_that_is_written_now_is_explained(
    types: tuple[Any, ...], sections: tuple[str, ...]
) -> None:
    fields = {item.name for each in types for item in dataclasses.fields(each)}
    assert sorted(fields - _words_of(*sections)) == []


def test_the_notes_of_a_dataset_are_explained() -> None:
    assert set(EndOfDocument._fields) <= _words_of("Dataset")


def test_fields_that_the_method_names_are_there() -> None:
    text = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    spans = re.findall(r"`([a-z_]+(?:\.[a-z_]+)?)`", text)
    by_section = {
        f"{section.name}.{item.name}"
        for config in (RunConfig, ScoringConfig)
        for section in dataclasses.fields(config)
        for item in dataclasses.fields(_section(config, section.name))
    }
    known = {name.partition(".")[0] for name in by_section} - {"model"}
    named = [span for span in spans if span.partition(".")[0] in known and "." in span]
    assert len(named) > 10
    assert [span for span in named if span not in by_section] == []
    own = {item.name for item in dataclasses.fields(HydraFields)}
    of_layers = [span for span in spans if re.match(r"(fa|la|sliding_window)_", span)]
    assert len(of_layers) > 10
    assert [span for span in of_layers if span not in own] == []


def _section(config: type, name: str) -> Any:
    return get_type_hints(config)[name]
