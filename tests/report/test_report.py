"""The report: inputs' figures on the page, nothing loaded from elsewhere, odd inputs refused."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hydra_tools import report as verb
from kit.scores import make_scores

from megatron_hydra.errors import UserError
from megatron_hydra.evaluation.reading import read_evaluation
from megatron_hydra.evaluation.results import Accuracy
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.report.sections import crossover_tokens
from megatron_hydra.selection.budget import Budget, Constraints
from megatron_hydra.selection.combination import Combination
from megatron_hydra.selection.pareto import pareto_table
from megatron_hydra.selection.policy import plan_from_scores
from megatron_hydra.selection.scores import HeadScores

LAYERS, HEADS, GROUPS = 2, 4, 2
LENGTHS = (64, 128)
HASH = "0123456789abcdef"
PLAN = [[3], [3]]
CONTROL = [[2], [3]]  # as many heads per layer, as many query groups
NAMES = ("teacher", "hybrid, untrained", "hybrid, trained", "random heads, trained")


def write_events(
    folder: Path, curves: Mapping[str, Sequence[float | None]], first_step: int = 0
) -> None:
    """Write one TensorBoard event file; nothing at a step whose value is None."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for tag, values in curves.items():
            for step, value in enumerate(values, first_step):
                if value is not None:
                    writer.add_scalar(tag, value, step)


def head_plan(fa_heads: Sequence[Sequence[int]] = PLAN) -> HeadPlan:
    return HeadPlan.from_fa_heads(dict(enumerate(fa_heads)), LAYERS, HEADS, GROUPS, HASH)


def write_run(folder: Path, losses: Mapping[str, Sequence[float | None]]) -> Path:
    """Write a run folder with these losses, and gradient norm and speed as long."""
    num_steps = len(next(iter(losses.values())))
    other = {"train/grad_norm": [1.0] * num_steps, "train/tokens_per_s": [900.0] * num_steps}
    write_events(folder, {**losses, **other})
    (folder / "run_config.yaml").write_text("data:\n  seed: 4321\n  path: <corpus>\n")
    (folder / "hybrid").mkdir(parents=True, exist_ok=True)
    meta = {
        "schema_version": 1,
        "kind": "hybrid",
        "provenance": {"command": ["train", folder.name]},
    }
    (folder / "hybrid" / "model.json").write_text(json.dumps(meta))
    head_plan().save(folder / "hybrid" / "plan.json", overwrite=True)
    return folder


def model_result(
    name: str, num_right: int, plan: list[list[int]] | None, cache: int
) -> dict[str, Any]:
    """One model of an evaluation file; each cell has 50 samples."""
    right = Accuracy(num_right, 50)
    return {
        "name": name,
        "path": f"runs/{name}",
        "kind": "teacher" if plan is None else "hybrid",
        "plan_name": "" if plan is None else "highest_scores",
        "plan": plan,
        "fa_heads": LAYERS * HEADS if plan is None else sum(map(len, plan)),
        "total_heads": LAYERS * HEADS,
        "cache_bytes_per_token": cache,
        "state_bytes": 0 if plan is None else 5000,
        "perplexity": {str(length): 10.0 / right.value for length in LENGTHS},
        "tasks": [
            {"task": task, "length": length, **right.to_dict()}
            for task in ("single", "multi_key")
            for length in LENGTHS
        ],
        "grid": {
            "task": "single",
            "lengths": list(LENGTHS),
            "depths": [0.0, 0.5, 1.0],
            "accuracy": [[right.value] * 3] * len(LENGTHS),
        },
    }


def evaluation_data() -> dict[str, Any]:
    """An evaluation of a teacher and three hybrids that keep half of the query groups."""
    plans, caches = (None, PLAN, PLAN, CONTROL), (1024, 512, 512, 512)
    figures = zip(NAMES, (49, 4, 47, 21), plans, caches, strict=True)
    return {
        "schema_version": 1,
        "kind": "evaluation",
        "models": [model_result(*row) for row in figures],
        "training_length": 64,
        "serve_dtype": "bf16",
        "provenance": {"seed": 77, "command": ["megatron-hydra", "evaluate"], "versions": {}},
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three stages, written once."""
    root = tmp_path_factory.mktemp("runs")
    falling = [2.0 / (step + 1) for step in range(8)]
    layers = {f"train/alignment/layer_{index:02d}": falling for index in range(LAYERS)}
    return {
        "stage1": write_run(root / "stage1", {"train/alignment": falling, **layers}),
        "stage2": write_run(
            root / "stage2", {"train/kl": falling, "train/ce": falling, "train/loss": falling}
        ),
        "stage3": write_run(root / "stage3", {"train/ce": falling, "train/loss": falling}),
    }


@pytest.fixture
def arguments(tmp_path: Path, runs: dict[str, Path]) -> argparse.Namespace:
    """The verb's arguments for inputs that belong together."""
    provenance = {"seed": 5, "versions": {"torch": "9.8.7"}, "command": "megatron-hydra score"}
    table = [[0.1 * head for head in range(HEADS)] for _ in range(LAYERS)]
    scores = make_scores(table, GROUPS, teacher_config_hash=HASH, provenance=provenance)
    scores.save(tmp_path / "scores.json")
    head_plan().save(tmp_path / "plan.json")
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation_data()))
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    files = [f"--{name}={tmp_path / name}.json" for name in ("scores", "plan", "evaluation")]
    stages = [f"--run={name}={folder}" for name, folder in runs.items()]
    return parser.parse_args([*files, *stages, f"--out={tmp_path / 'report.html'}"])


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite a JSON file after ``change`` has been made to its data."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


class Page(HTMLParser):
    """A page's text, its tags, and every address it names in an attribute."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.words: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record a tag."""
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "data", "action", "poster", "srcset"):
                self.addresses.append(value or "")

    def handle_data(self, data: str) -> None:
        """Record text."""
        self.words.append(data)


def test_inputs_figures_stand_in_the_page(arguments, capsys):
    assert verb.run(arguments) == 0
    assert str(arguments.out) in capsys.readouterr().out
    page = Page(arguments.out)
    assert "2 of 8 heads on full attention" in page.text
    assert "stores 50% of the teacher's cache per token" in page.text
    assert "answers 94.0% of the samples in its median cell (single needle at" in page.text
    # Perplexity, interval, samples, training lengths, losses, memory and crossover.
    for figure in ("10.64", "83.8–97.9", "n = 50", "2×", "KL 2 → 0.25", "512 50% 5,000 10"):
        assert figure in page.text
    for record in (
        "data.seed = 4321",
        "seed = 77",
        "9.8.7",
        "megatron-hydra evaluate",
        "train stage2",
    ):
        assert record in page.text
    for name in (*NAMES, "stage1", "stage2", "stage3"):
        assert name in page.text
    assert page.tags.count("svg") == 4 + 3 * 3  # heads, ranks, capabilities, cache; 3 per run


def test_page_is_self_contained(arguments):
    verb.run(arguments)
    page = Page(arguments.out)
    assert [a for a in page.addresses if not a.startswith(("#", "data:image/png;base64,"))] == []
    assert not re.search(r"url\((?!#)|@import", page.source)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert len(page.ids) == len(set(page.ids))
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)
    assert len(page.source) < 2_000_000


def test_names_are_escaped(arguments, tmp_path):
    odd = '<img src="https://example.org/x.png"> & "co" $x$'
    edit_json(tmp_path / "evaluation.json", _set("name", odd, model=2))
    arguments.run = [run.replace("stage1=", "<b>$title & co</b>=") for run in arguments.run]
    verb.run(arguments)
    page = Page(arguments.out)
    assert "img" not in page.tags and "b" not in page.tags
    assert page.text.count(odd) >= 6  # Summary, tile, three tables, chart.
    assert "<b>$title & co</b>" in page.text


def test_existing_page_stays_without_overwrite(arguments):
    arguments.out.write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        verb.run(arguments)
    assert arguments.out.read_text() == "mine"
    arguments.overwrite = True
    verb.run(arguments)
    assert arguments.out.read_text().startswith("<!DOCTYPE html>")


def _drop(key: str) -> Callable[[Any], Any]:
    return lambda data: data["models"][1].pop(key)


def _retrain(run: Path, fa_heads: list[list[int]]) -> None:
    write_run(run, {"train/loss": [1.0, 1.0]})
    head_plan(fa_heads).save(run / "hybrid" / "plan.json", overwrite=True)


def _skip_every_step(run: Path) -> None:
    write_run(run, {"train/loss": [math.nan, math.nan], "train/skipped_steps": [1.0, 2.0]})


def _unfinish(run: Path) -> None:
    (run / "hybrid" / "model.json").unlink()


def _set_task(**values: object) -> Callable[[Any], Any]:
    return lambda data: data["models"][1]["tasks"][0].update(values)


def _set(key: str, value: object, model: int = 1) -> Callable[[Any], Any]:
    return lambda data: data["models"][model].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("tasks"), r"key models\[1\]\.tasks is missing"),
        (_drop("grid"), r"key models\[1\]\.grid is missing"),
        (lambda d: d["models"][1]["tasks"].pop(), "'hybrid, untrained' has no result .*multi_key"),
        (_set_task(num_right=60), "task single at 64 .* is 60 of 50"),
        (_set_task(num_right=3.5), r"tasks\[0\]\.num_right is 3.5; an integer"),
        (_set_task(accuracy=1.2), "accuracy is 1.2; its counts give 0.08"),
        (_set_task(num_samples=0), "num_samples is 0; it must be 1 or more"),
        (lambda d: d["models"][1]["grid"]["accuracy"].pop(), "row for each of its 2 lengths"),
        (lambda d: d["models"][1]["grid"].update(depths=[0, 50, 100]), r"depths\[1\] is 50; it"),
        (lambda d: d["models"][1]["grid"].update(lengths=["short"]), r"lengths\[0\] is 'short'"),
        (_set("perplexity", {"64": 2.0}), "has no perplexity at length 128"),
        (_set("perplexity", {"64": float("nan"), "128": 2.0}), "NaN is no number of JSON"),
        (_set_task(interval=[0.5, 0.6]), r"interval is \(0.5, 0.6\); its counts give"),
        (_drop("plan"), r"key models\[1\]\.plan is missing"),
        (_set("plan", [[3], [4]]), r"plan is \[\[3\], \[4\]\]; it must list"),
        (_set("plan", [[3, 3], []]), "must list"),
        (_set("plan", [[3], [3], []]), "must list"),
        (_set("plan", [3, 3]), r"plan\[0\] is 3; a list"),
        (_set("plan", []), "must list"),
        (_set("plan", [[3], [2, 3]]), "fa_heads is 2, but by its plan it is 3"),
        (_set("plan", None), "kind is 'hybrid', but by its plan it is 'teacher'"),
        (_drop("state_bytes"), r"key models\[1\]\.state_bytes is missing"),
        (_set("name", "teacher"), "names repeat"),
        (
            lambda d: d["models"][1].update(kind="teacher", plan=None, fa_heads=8),
            "2 models of kind 'teacher'",
        ),
        (_set("kind", "student"), "'student', but by its plan it is 'hybrid'"),
        (
            lambda d: d["models"][0].update(total_heads=448, fa_heads=448),
            "448 heads, but the plan has 8",
        ),
        (
            lambda d: [m.update(plan=CONTROL) for m in d["models"][1:]],
            "no hybrid with exactly the plan's 2 FA heads",
        ),
        (lambda d: d.update(kind="head_plan"), "kind 'evaluation' is needed"),
        (lambda d: d.pop("training_length"), "key training_length is missing"),
        (
            lambda d: d.update(serve_dtype="int4"),
            "serve_dtype is 'int4'; allowed: bf16, fp16, fp32",
        ),
    ],
)
def test_odd_evaluation_is_refused(arguments, tmp_path, change, message):
    edit_json(tmp_path / "evaluation.json", change)
    with pytest.raises(UserError, match=message):
        verb.run(arguments)
    assert not arguments.out.exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "run_config.yaml").unlink(), "no run_config.yaml"),
        (lambda run: (run / "run_config.yaml").write_text("a: [1"), "not valid YAML"),
        (lambda run: _unfinish(write_run(run, {"train/loss": [2.0, 1.0]})), "has not finished"),
        (lambda run: write_events(run, {}), "no loss curve; .* found: none"),
        (lambda run: write_events(run, {"train/lr": [1.0, 1.0]}), "no loss curve.*train/lr"),
        (lambda run: write_events(run, {"train/loss": [1.0, 1.0]}), "no curve train/grad_norm"),
        (lambda run: write_run(run, {"train/loss": [1.0, math.nan]}), "nan at step 1"),
        (lambda run: _skip_every_step(run), "train/loss has no finite value: every step was skip"),
        (lambda run: None, "no TensorBoard event file"),
        (lambda run: _retrain(run, CONTROL), "trained a hybrid of another plan"),
    ],
)
def test_odd_run_is_refused(arguments, tmp_path, spoil, message):
    run = tmp_path / "run"
    head_plan().save(run / "hybrid" / "plan.json")
    (run / "run_config.yaml").write_text("a: 1\n")
    (run / "hybrid" / "model.json").write_text('{"schema_version": 1, "kind": "hybrid"}')
    spoil(run)
    arguments.run = [f"stage1={run}"]
    with pytest.raises(UserError, match=f"run stage1: .*{message}|run stage1: {message}"):
        verb.run(arguments)
    assert not arguments.out.exists()


@pytest.mark.parametrize(
    ("runs_given", "message"),
    [
        (["stage1"], "must be NAME=FOLDER"),
        (["=x"], "must be NAME=FOLDER"),
        (["a=x", "a=y"], "'a' twice"),
        (["a=/nowhere"], "/nowhere does not exist"),
    ],
)
def test_odd_run_arguments_are_refused(arguments, runs_given, message):
    arguments.run = runs_given
    with pytest.raises(UserError, match=message):
        verb.run(arguments)


def test_plan_of_another_teacher_is_refused(arguments, tmp_path):
    edit_json(tmp_path / "plan.json", lambda plan: plan.update(teacher_config_hash="feed" * 4))
    with pytest.raises(UserError, match="another teacher"):
        verb.run(arguments)


def test_crossover_is_the_first_length_that_needs_less(tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(evaluation_data()))
    evaluation = read_evaluation(path)
    hybrid, teacher = evaluation.models[2], evaluation.teacher

    def total(model, length):
        return model.cache_bytes_per_token * length + model.state_bytes

    length = crossover_tokens(hybrid, teacher)
    assert total(hybrid, length) < total(teacher, length)
    assert total(hybrid, length - 1) >= total(teacher, length - 1)
    assert crossover_tokens(teacher, teacher) is None


def test_a_control_with_as_many_heads_is_not_the_plans_hybrid(arguments, tmp_path):
    def favour_control(data):
        best = [{**task, **Accuracy(50, 50).to_dict()} for task in data["models"][3]["tasks"]]
        data["models"][3]["tasks"] = best

    edit_json(tmp_path / "evaluation.json", favour_control)
    verb.run(arguments)
    summary = Page(arguments.out).text.partition("; the teacher answers")[0]
    assert "“hybrid, trained” stores 50%" in summary and "random" not in summary


def test_selection_is_shown_as_planned_and_with_the_pareto_table(arguments, tmp_path):
    scores = HeadScores.load(arguments.scores)
    scores = scores.with_combination(Combination(scores.combination.scorers, normalise=True))
    plan_from_scores(scores, Budget("fa_heads", 2)).plan.save(arguments.plan, overwrite=True)
    arguments.pareto = tmp_path / "pareto.json"
    budgets = [Budget("fa_heads", 4)]
    pareto_table(scores, budgets, Constraints(), 4096, "h100").save(arguments.pareto, {})
    verb.run(arguments)
    page = Page(arguments.out)
    # The file's own combination does not normalise: 0.300.
    assert "0.3 1 1.000" in page.text and "4 FA heads" in page.text
    assert page.tags.count("svg") == 5 + 3 * 3 and len(page.ids) == len(set(page.ids))
