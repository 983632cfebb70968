"""The page: every figure and verdict follows from the results, and what is lacking is named."""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path

import pytest

from megatron_hydra.errors import UserError
from megatron_hydra.evaluation.generation import Answered, GeneratedResult
from megatron_hydra.evaluation.positions import PositionLoss
from megatron_hydra.study.charts import question_figure
from megatron_hydra.study.config import Run, StudyConfig, load_study
from megatron_hydra.study.figures import ArmFigures, of_able_teachers
from megatron_hydra.study.page import compare, write_page
from megatron_hydra.study.results import ArmResult, load_results
from megatron_hydra.study.sections import Evidence, Finding
from megatron_hydra.study.speeds import load_speeds

ROOT = Path(__file__).parents[2]
SHARES = {"head": 0.9, "layer_scored": 0.4, "window": 0.7, "window_untrained": 0.1, "recipe": 0.7}


@pytest.fixture
def study(tmp_path) -> StudyConfig:
    return load_study(ROOT / "examples/study/cpu.yaml", [f"run.results={tmp_path}/results"])


def made(study: StudyConfig, run: Run, share: float) -> ArmResult:
    """A result whose prompts are right with a probability."""
    rng = random.Random(run.name)
    cells = []
    for task in study.evaluation.tasks:
        for length in study.lengths:
            found = [int(rng.random() < share) for _ in range(study.evaluation.samples)]
            cells.append(Answered.count((task, length), found, [1] * len(found)))
    buckets = ((1, 128, 30, 2.0), (129, 256, 10, 4.0), (257, 512, 5, 9.0))
    losses = tuple(PositionLoss(*bucket) for bucket in buckets)
    generated = GeneratedResult(run.name, "", 8, 32, 768, 2048, tuple(cells), losses)
    return ArmResult(
        run.arm, run.budget, run.teacher, run.seed, study.inputs(run), "finished",
        fa_heads=((0, 1), (2,)), evaluation=generated, divergence_nats=0.25,
        probes=dict.fromkeys(study.evaluation.probes, "10"),
        tokens={"align": 1000, "distill": 234}, provenance={"device": "CPU"},
    )  # fmt: skip


def test_the_page_says_what_the_results_hold(study, tmp_path):
    runs = study.runs()
    for run in runs:
        if run.arm in SHARES and (run.arm, run.seed) != ("window", 1):
            made(study, run, SHARES[run.arm]).save(study.results)
    failed = Run("window", "1/4", "quickstart", 1)
    broken = ArmResult(
        *dataclasses.astuple(failed), study.inputs(failed), "failed", reason="out of | memory"
    )
    broken.save(study.results)
    results = load_results(study)
    assert results[runs[0]] == made(study, runs[0], 0.9), "what is saved is what is loaded"
    write_page(study, results, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "Of 22 runs 9 are finished, 1 failed and 12 have not run" in page
    (row,) = {line for line in page.splitlines() if line.startswith("| head | heads by score")}
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    both = [results[run].evaluation for run in runs if run.arm == "head"]
    assert len(both) == 2
    for number, task in enumerate(study.evaluation.tasks):
        shares = [
            100 * sum(t.num_right for each in both for t in each.tasks if t.cell == (task, length))
            / (2 * study.evaluation.samples)
            for length in study.lengths
        ]  # fmt: skip
        assert cells[4 + number] == " / ".join(f"{share:.0f}" for share in shares)
    beyond = [
        100 * sum(t.num_right for t in each.tasks if t.length > 256)
        / sum(t.num_samples for t in each.tasks if t.length > 256)
        for each in both
    ]  # fmt: skip
    by_run = ", ".join(f"{share:.0f}" for share in beyond)
    # Loss up to 256: 30 tokens at 2.0 and 10 at 4.0. Of three FA heads a layer has two.
    assert (
        cells[3] == "2"
        and cells[6:] == ["2.500", "0.250", "768", "2", "1,234", by_run]
        and cells[2] == "3"
    )
    assert re.search(
        r"\| head over layer_scored \| retrieval \| +\| \+\d\d\.\d points \| .* 2 \| holds \|", page
    )
    assert "| head over window | retrieval |" in page
    assert re.search(r"head over window .* 1 \| undecided \|", page), "one of its runs failed"
    assert re.search(r"recipe over teacher .* 0 \| undecided: not run \|", page)
    assert "- Failed: window (quickstart, seed 1): out of | memory" in page
    assert "- Not run: teacher (quickstart, seed 0), teacher (quickstart, seed 1)" in page
    for name in re.findall(r"\]\((pictures/.*?)\)", page):
        assert (tmp_path / name).stat().st_size > 5000
    before = page
    write_page(study, results, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == before


def test_an_ordering_is_read_off_lengths_beyond_the_training_length(study):
    first = Run("head", "1/4", "quickstart", 0)
    second = dataclasses.replace(first, arm="layer_scored")

    def with_bits(run: Run, short: str, long: str) -> ArmResult:
        result = made(study, run, 1.0)
        assert result.evaluation is not None
        cells = []
        for task, length in (cell.cell for cell in result.evaluation.tasks):
            found = [int(bit) for bit in (short if length == 256 else long)]
            cells.append(Answered.count((task, length), found, [1] * 4))
        return dataclasses.replace(
            result, evaluation=dataclasses.replace(result.evaluation, tasks=tuple(cells))
        )

    results = {first: with_bits(first, "0000", "1100"), second: with_bits(second, "1111", "0100")}
    arms = ("head", "layer_scored")
    found = compare(study, results, arms, "retrieval", "1/4")
    assert found is not None and found.value == 25 and found.num_runs == 1
    assert compare(study, {first: results[first]}, arms, "retrieval", "1/4") is None


def test_an_ordering_by_loss_or_divergence_has_the_lower_first(study):
    """The loss is of positions up to the training length; two runs decide where they agree."""
    results = {}
    for arm, loss, divergences in (("head", 2.5, (0.25, 0.26)), ("layer_scored", 3.5, (0.5, 0.51))):
        for seed, divergence in enumerate(divergences):
            run = Run(arm, "1/4", "quickstart", seed)
            result = dataclasses.replace(made(study, run, 0.5), divergence_nats=divergence)
            assert result.evaluation is not None
            # 30 tokens at the first, 10 at 4.0: 2.5 of the first arm is (30 * 2 + 10 * 4) / 40.
            low = PositionLoss(1, 128, 30, (40 * loss - 40) / 30)
            rest = result.evaluation.loss_by_position[1:]
            evaluation = dataclasses.replace(result.evaluation, loss_by_position=(low, *rest))
            results[run] = dataclasses.replace(result, evaluation=evaluation)
    arms = ("head", "layer_scored")
    by_loss, by_divergence = (compare(study, results, arms, by, "1/4") for by in ("loss", "KL"))
    assert by_loss is not None and by_loss.value == pytest.approx(1.0)
    assert by_divergence is not None and by_divergence.value == pytest.approx(0.25)
    assert by_divergence.verdict == "holds" and by_divergence.words[0] == "+0.250 nats"


def test_a_finding_stands_while_the_results_bear_it_out(study, tmp_path):
    evidence = {
        "Heads win.": Evidence("head", "layer_scored", "1/4"),
        "Layers win.": Evidence("layer_scored", "head", "1/4"),
        "They are alike.": Evidence("head", "layer_scored", "1/4", within=5),
        "Heads are alike.": Evidence("head", "recipe", "1/4", within=5),
        "The teacher wins.": Evidence("teacher", "head", "1/4"),
    }
    study.findings = {says: Finding(says, [each]) for says, each in evidence.items()}
    both = [evidence["Heads win."], evidence["Layers win."]]
    study.findings["both"] = Finding("Both.", both)
    shares = {"head": 0.8, "recipe": 0.8, "layer_scored": 0.3}
    results = {run: made(study, run, shares[run.arm]) for run in study.runs() if run.arm in shares}
    for run in [run for run in results if run.arm == "recipe"]:
        like = next(each for each in results if (each.arm, each.seed) == ("head", run.seed))
        answered = results[like].evaluation
        results[run] = dataclasses.replace(results[run], evaluation=answered)
    write_page(study, results, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert re.search(
        r"^- Heads win. \(head over layer_scored at 1/4, retrieval: \+\d+\.\d points, ", page, re.M
    )
    assert "- Heads are alike. (head over recipe at 1/4, retrieval: +0.0 points" in page
    for says in ("Layers win.", "They are alike.", "The teacher wins.", "Both."):
        assert f"- Not borne out by these results: {says}\n" in page


def test_the_papers_orderings_stand_together(tmp_path):
    study = load_study(ROOT / "examples/study/study.yaml", [f"run.results={tmp_path}"])
    arms = {"head": 0.9, "layer_spread": 0.3, "global": 0.9}
    results = {run: made(study, run, arms[run.arm]) for run in study.runs() if run.arm in arms}
    write_page(study, results, tmp_path / "page.md")
    _, _, after = (tmp_path / "page.md").read_text().partition("## The paper's orderings")
    rows = [line for line in after.partition("## ")[0].splitlines() if " over " in line]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| head over layer_spread", "1/8"], ["| head over layer_spread", "1/4"],
        ["| head over global", "1/8"], ["| head over global", "1/4"],
    ]  # fmt: skip
    assert all(row.endswith("| holds |") for row in rows[:2])


def test_arms_that_differ_in_tokens_alone_are_drawn_against_them(tmp_path):
    study = load_study(ROOT / "examples/study/study.yaml", [f"run.results={tmp_path}"])

    def labels(*arms: str) -> list[str]:
        figures = []
        for number, arm in enumerate(arms, 1):
            found = made(study, Run(arm, "1/8", "first", 0), 0.5)
            found = dataclasses.replace(found, tokens={"distill": 1000 * number})
            figures.append(ArmFigures(arm, [found], study.data.length))
        return [ax.get_xlabel() for ax in question_figure(study, figures).axes]

    assert labels("quarter", "half", "head")[1] == "tokens of training (millions)"
    for arms in (("quarter", "window"), ("no_align", "head")):
        assert labels(*arms)[1].startswith("cache and state")


def test_orderings_are_told_at_the_budgets_of_both_arms(tmp_path):
    study = load_study(ROOT / "examples/study/study.yaml", [f"run.results={tmp_path}"])
    arms = ("head", "global")
    results = {run: made(study, run, 0.5) for run in study.runs() if run.arm in arms}
    write_page(study, results, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text().split("## ")
    eighth, quarter = (
        part for part in page if "of the heads FA" in part and "| head over global |" in part
    )
    assert "1/8 of" in eighth and "global over in_layer_2" in eighth
    assert "in_layer_4" not in eighth and "global over in_layer_4" in quarter
    assert "in_layer_2" not in quarter


def test_arms_that_differ_in_their_plan_alone_are_told_by_their_fullest_layer(tmp_path):
    study = load_study(ROOT / "examples/study/study.yaml", [f"run.results={tmp_path}"])
    of_run = {
        Run("head", "1/4", "first", 0): (((0, 1), (2,)), 1.0),
        Run("global", "1/4", "second", 1): (((0,), (1, 2)), 0.0),
        Run("fixed", "1/4", "first", 0): (((0, 1, 2), ()), 0.0),
        Run("layer_but_two", "7/64", "first", 0): (((), (1, 2)), 1.0),
        Run("window", "1/4", "first", 0): (((0, 1), (2,)), 0.0),  # differs in its kind
        Run("quarter", "1/4", "first", 0): (((0, 1), (2,)), 0.0),  # and in its tokens
        Run("global_few", "1/32", "first", 0): (((0,), ()), 0.0),  # is at a budget of its own
    }
    results = {
        run: dataclasses.replace(made(study, run, share), fa_heads=heads)
        for run, (heads, share) in of_run.items()
    }
    write_page(study, results, tmp_path / "page.md")
    table = (tmp_path / "page.md").read_text().split("## How many heads of one layer?")[1]
    assert [line for line in table.splitlines() if line.startswith("| ")][1:] == [
        "| 7/64 | 2 | 1 | 100 | 100 | layer_but_two |",
        "| 1/4 | 2 | 2 | 0 | 100 | head, global |",
        "| 1/4 | 3 | 1 | 0 | 0 | fixed |",
    ]


def test_what_the_study_says_of_layers_of_fa_heads_alone_is_true_of_every_run():
    """And of layers that are limited: `leave_others`, docs/results.md and the warning of `plan`."""
    place = ROOT / "examples/study"
    study = load_study(place / "study.yaml", [f"run.results={place}/results"])
    assert "leave_others" in study.findings
    whole, nearly, others, limited = dict[Run, float](), list[float](), list[float](), list[float]()
    for run, result in of_able_teachers(study, load_results(study)).items():
        if not study.differs_by_plan(run.arm):
            continue
        share = ArmFigures(run.arm, [result], 512).retrieval(512)
        numbers = [*map(len, result.fa_heads)]
        if max(numbers) == 16:
            whole[run] = share
        elif numbers.count(0) < 7:  # FA heads in more than one layer
            (nearly if max(numbers) == 15 else others).append(share)
        if run.arm in ("head_beside", "global_beside"):
            limited.append(share)
    able = whole.pop(Run("layer_spread", "1/8", "seventh", 0))
    assert able > 0.99 and len(whole) >= 17 and max(whole.values()) < 0.31
    assert len(nearly) >= 4 and min(nearly) > 0.9 and len(others) > 40 and min(others) > 0.99
    assert len(limited) >= 6 and min(limited) > 0.995


def test_runs_of_a_teacher_that_finds_too_little_stand_apart(tmp_path):
    study = load_study(ROOT / "examples/study/study.yaml", [f"run.results={tmp_path}/results"])
    assert study.run.least_teacher_accuracy == 0.95
    shares = {"first": 1.0, "second": 0.9}
    results = {}
    for run in (run for run in study.runs() if run.teacher in shares):
        if run.arm == "teacher":  # it finds all; of the second, one task only
            result = made(study, run, 1.0)
            assert result.evaluation is not None
            cells = tuple(
                cell if cell.task == "niah_single_2" or run.teacher == "first"
                else Answered.count(cell.cell, [1] * 189 + [0] * 11, [1] * 200)
                for cell in result.evaluation.tasks
            )  # fmt: skip
            evaluation = dataclasses.replace(result.evaluation, tasks=cells)
            results[run] = dataclasses.replace(result, evaluation=evaluation)
        elif run.arm in ("head", "layer_spread") and run.budget == "1/8":
            results[run] = made(study, run, shares[run.teacher])
    write_page(study, results, tmp_path / "page.md")
    page, apart = (tmp_path / "page.md").read_text().split("## The teachers")
    rows = [line for line in page.splitlines() if line.startswith("| head | ")]
    assert rows and all(" | 100, 100 |" in row for row in rows), "two runs of the first teacher"
    assert re.search(r"\| head over layer_spread \| 1/8 .* \| 2 \| ", page)
    assert "head (second, seed 1)" not in page, "it has run"
    assert "| first | 100 / 100 / 100 / 100 / 100 | 100 / 100 / 100 / 100 / 100 | yes |" in apart
    assert "| second | 100 / 100 / 100 / 100 / 100 | 94 / 94 / 94 / 94 / 94 | no |" in apart
    (row,) = [line for line in apart.splitlines() if line.startswith("| head | ")]
    assert re.search(r" \| (89|90|91) \|$", row)
    study.run.least_teacher_accuracy = 0.94
    assert of_able_teachers(study, results) == results


def test_results_of_other_settings_are_not_told(study):
    run = study.runs()[0]
    result = made(study, run, 0.5)
    dataclasses.replace(result, inputs={**result.inputs, "stages": "{}"}).save(study.results)
    with pytest.raises(UserError, match=rf"{run.name}.json was made with another stages: run it"):
        load_results(study)


def test_results_of_two_teachers_of_one_name_are_not_told(study):
    """As where a bundle of another run was unpacked into the folder."""
    first, *others = (made(study, run, 0.5) for run in study.runs()[:3])
    for result, weights in ((first, "1"), (others[0], "1"), (others[1], "2")):
        dataclasses.replace(result, inputs=result.inputs | {"teacher's weights": weights}).save(
            study.results
        )
    with pytest.raises(UserError, match=rf"{others[1].run.name}.json and .*{first.run.name}.json "
                       "are of different ones of the teacher's weights: run one"):  # fmt: skip
        load_results(study)


def test_without_a_result_there_is_no_page(study, tmp_path):
    with pytest.raises(UserError, match="holds no result of the study: run it first"):
        write_page(study, load_results(study), tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()


@pytest.mark.parametrize(
    ("config", "folder", "page"),
    [("cpu", "results_cpu", "study_cpu"), ("study", "results", "study")],
)
def test_the_committed_pages_are_what_the_committed_results_make(config, folder, page, tmp_path):
    """Nothing on them is written by hand, and their YAML is still the one that was run."""
    place = ROOT / "examples/study"
    found = load_study(place / f"{config}.yaml", [f"run.results={place / folder}"])
    assert found.speeds is not None
    found.speeds.out = str(ROOT / found.speeds.out)
    results = load_results(found)
    assert len(results) == len(list((place / folder).iterdir())), "all are the study's"
    if config == "cpu":
        assert [*results] == found.runs()
    write_page(found, results, tmp_path / f"{page}.md", load_speeds(found))
    assert (tmp_path / f"{page}.md").read_text() == (ROOT / f"docs/{page}.md").read_text()
    shown = {path.name for path in (tmp_path / "pictures").iterdir()}
    committed = {path.name for path in (ROOT / "docs/pictures").glob(f"{page}_*")}
    others = {name for name in committed if name.startswith("study_cpu_") and page == "study"}
    assert shown == committed - others
