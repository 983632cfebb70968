"""The top of the page: which teacher, how it was trained, the range of results; all escaped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from kit.scores import make_scores
from test_report import (
    CONTROL,
    GROUPS,
    HASH,
    HEADS,
    LAYERS,
    LENGTHS,
    Page,
    evaluation_data,
    head_plan,
    write_run,
)
from torch.utils.tensorboard import SummaryWriter

from megatron_hydra.evaluation.reading import read_evaluation
from megatron_hydra.evaluation.results import Accuracy
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.report import render_report
from megatron_hydra.report.headline import num_parameters
from megatron_hydra.report.training_runs import read_run
from megatron_hydra.report.units import format_bytes, format_plain, format_time
from megatron_hydra.selection.scores import HeadScores
from megatron_hydra.selection.shape import ModelShape

HOSTILE = "<script>alert(1)</script><img src='https://example.org/x.png'>&amp;\"{{ 7 * 7 }}$x$"


def write_inputs(folder: Path, run: Path, **provenance: Any) -> dict[str, Any]:
    """Inputs that belong together, as arguments of `page_of`."""
    table = [[0.1 * head for head in range(HEADS)] for _ in range(LAYERS)]
    scores = make_scores(table, GROUPS, teacher_config_hash=HASH, provenance=provenance)
    scores.save(folder / "scores.json")
    head_plan().save(folder / "plan.json")
    (folder / "evaluation.json").write_text(json.dumps(evaluation_data()))
    files = {name: folder / f"{name}.json" for name in ("scores", "plan", "evaluation")}
    return {**files, "runs": {"first": run}}


def page_of(scores: Path, plan: Path, evaluation: Path, runs: dict[str, Path], **more: str) -> Page:
    """The page of these files."""
    files = HeadScores.load(scores), HeadPlan.load(plan), read_evaluation(evaluation)
    page = scores.with_name("report.html")
    page.write_text(render_report(*files, [read_run(*run) for run in runs.items()], **more))
    return Page(page)


def record_run(folder: Path, config: str = "a: 1\n", **provenance: Any) -> Path:
    """A run of three steps whose files record these."""
    write_run(folder, {"train/loss": [3.0, 2.0, 1.0]})
    (folder / "run_config.yaml").write_text(config)
    meta = folder / "hybrid" / "model.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "provenance": provenance}))
    return folder


def test_parameters_are_those_that_the_teacher_is_published_with() -> None:
    """Qwen3-1.7B has 1,720,574,976 parameters; norms are counted here: two per layer, q and k."""
    shape = ModelShape(28, 16, 8, 128, 2048, 6144, 151_936, tied_embeddings=True)
    norms = 28 * (2 * 2048 + 2 * 128) + 2048
    assert num_parameters(shape) + norms == 1_720_574_976


@pytest.mark.parametrize(
    ("given", "recorded", "title"),
    [
        ("Qwen3-1.7B", "models/other", "Qwen3-1.7B: 2 of 8 heads on full attention"),
        ("", "models/other", "other: 2 of 8 heads on full attention"),
        ("", None, "2 of 8 heads on full attention"),
    ],
)
def test_the_title_names_the_teacher_where_it_is_known(
    tmp_path: Path, given: str, recorded: str | None, title: str
) -> None:
    record = {} if recorded is None else {"config": {"model": {"teacher": recorded}}}
    arguments = write_inputs(tmp_path, record_run(tmp_path / "run"), **record)
    page = page_of(**arguments, teacher_name=given)
    assert re.search(rf"transfer report {re.escape(title)} 2 of 8 heads keep full", page.text)
    assert "2 layers × 4 heads, 2 query groups per layer, head dimension 8" in page.text


def test_a_stage_is_told_by_name_purpose_size_time_and_place(tmp_path: Path) -> None:
    config = "data: {seq_length: 2048, global_batch_size: 32}\ntrainer: {accelerator: gpu}\n"
    run = record_run(tmp_path / "run", config, stage="distill", hardware="8 x Some GPU")
    page = page_of(**write_inputs(tmp_path, run))
    # The events count from step 0, so that step 2 is the last.
    row = "first (stage 2, distillation) the whole hybrid learns the teacher's next-token "
    assert f"{row}distribution 2 131,072 " in page.text
    assert "8 x Some GPU" in page.text
    day = read_run("first", run).days
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", day) and f"8 x Some GPU {day} " in page.text


def test_what_a_run_does_not_record_is_not_guessed(tmp_path: Path) -> None:
    run = read_run("first", record_run(tmp_path / "a"))
    assert (run.title, run.purpose, run.hardware, run.num_tokens) == ("first", "", "", None)
    page = page_of(**write_inputs(tmp_path, tmp_path / "a"))
    assert re.search(r"Date first – 2 – [\d.]+ [mµ]?s – \d{4}-", page.text)
    device_alone = record_run(tmp_path / "b", "trainer: {accelerator: cpu}\n", stage=["odd"])
    assert read_run("first", device_alone).hardware == "CPU"
    assert read_run("first", device_alone).purpose == ""


def test_wall_time_is_summed_over_the_lives_of_a_run(tmp_path: Path) -> None:
    """The hours between a kill and the next start are no training time."""
    run = record_run(tmp_path / "run")
    own = read_run("first", run).seconds
    start = read_run("first", run).lives[0].start
    with SummaryWriter(str(run / "tensorboard")) as writer:
        # A writer's first event has the clock's time; its scalars have what they are given.
        for tag in ("train/loss", "train/grad_norm", "train/tokens_per_s"):
            writer.add_scalar(tag, 0.5, 3, walltime=start + 7200)
    found = read_run("first", run)
    assert [life.scalars["train/loss"][-1].step for life in found.lives] == [2, 3]
    second = found.lives[1].end - found.lives[1].start
    assert found.seconds == pytest.approx(own + second) and 7100 < second <= 7200


def test_the_headline_is_the_range_and_not_the_easiest_cell(tmp_path: Path) -> None:
    arguments = write_inputs(tmp_path, record_run(tmp_path / "run"))
    data = evaluation_data()
    for model, counts in zip(
        data["models"], ((50, 48, 46, 40), (4,) * 4, (50, 40, 30, 5), (9,) * 4)
    ):
        for task, right in zip(model["tasks"], counts):
            task.update(Accuracy(right, 50).to_dict())
    arguments["evaluation"].write_text(json.dumps(data))
    page = page_of(**arguments)
    summary, _, rest = page.text.partition("; the teacher answers")
    # Lower middle of four; cells in the file's order are single, then multi_key, by length.
    assert "60.0% of the samples in its median cell (multi-key needle at 64 tokens)" in summary
    assert "10.0% in its worst (multi-key needle at 128 tokens)" in summary
    assert "100.0%" not in summary and LENGTHS == (64, 128)
    assert rest.startswith(" 92.0% of the samples in its median cell (multi-key needle at 64")
    assert "80.0% in its worst (multi-key needle at 128 tokens)." in rest
    low, high = (100 * end for end in Accuracy(5, 50).interval)
    assert f"worst: multi-key needle at 128 tokens, 95% interval {low:.1f} to {high:.1f}" in rest


def test_full_and_linear_attention_are_spelt_out_before_they_are_shortened(tmp_path: Path) -> None:
    body = page_of(**write_inputs(tmp_path, record_run(tmp_path / "run"))).text
    for short, words in (("FA", "full attention (FA)"), ("LA", "linear attention (LA)")):
        first = re.search(rf"\b{short}\b", body)
        assert first is not None and body.index(words) + len(words) - 3 == first.start()


def test_other_heads_are_called_what_they_are(tmp_path: Path) -> None:
    """A plan may name kinds for single heads: a window is not linear attention."""
    arguments = write_inputs(tmp_path, record_run(tmp_path / "run"))
    assert "have linear attention (LA): " in page_of(**arguments).text
    data = json.loads(arguments["plan"].read_text())
    layer, num_heads = data["layers"][0], data["num_heads"]
    others = [head for head in range(num_heads) if head not in layer["fa_heads"]]
    layer["kinds"] = {"sliding_window": others[:1]}
    for path in (arguments["plan"], tmp_path / "run/hybrid/plan.json"):
        path.write_text(json.dumps(data))
    count = sum(num_heads - len(each["fa_heads"]) for each in data["layers"]) - 1
    text = page_of(**arguments).text
    assert f"linear attention (LA) or a window: {count} Gated DeltaNet, 1 sliding window." in text


def test_hostile_names_are_text_wherever_they_come_from(tmp_path: Path) -> None:
    run = record_run(
        tmp_path / "run", f"note: '{HOSTILE.replace(chr(39), '')}'\n", hardware=HOSTILE,
        command=[HOSTILE], versions={HOSTILE: HOSTILE, "torch": HOSTILE},
    )  # fmt: skip
    arguments = write_inputs(tmp_path, run, command=HOSTILE, versions={"torch": "1"})
    arguments["runs"] = {HOSTILE: run}
    data = evaluation_data()
    for index, model in enumerate(data["models"]):
        model["name"] = f"{index} {HOSTILE}"
    for model in data["models"]:
        for task in model["tasks"]:
            task["task"] += HOSTILE
        model["grid"]["task"] += HOSTILE
    data["models"][3]["plan"] = CONTROL
    arguments["evaluation"].write_text(json.dumps(data))
    page = page_of(**arguments, teacher_name=HOSTILE, command=HOSTILE)
    assert not {"script", "img"} & set(page.tags)
    assert page.text.count(HOSTILE) > 20
    # Escaped once: the reader sees what the user wrote, and nothing is filled in.
    assert "&lt;" not in page.text and "&amp;amp;" not in page.text
    assert page.source.count("{{ 7 * 7 }}") == page.source.count("7 * 7")


def test_units_are_those_that_keep_a_figure_short() -> None:
    for value, words in (
        (2.79e-8, "27.9 ns"), (0.00123, "1.23 ms"), (0.9996, "1,000 ms"), (92, "1.53 min"),
        (7200, "2 h"),
    ):  # fmt: skip
        assert format_time(value) == words
    assert [format_bytes(1023 * 1024), format_bytes(1536)] == ["1,023 KiB", "1.5 KiB"]
    assert [format_plain(value) for value in (0.5, 7000, 0, 0.002)] == [
        "0.5",
        "7,000",
        "0",
        "0.002",
    ]


def test_axes_have_plain_figures(tmp_path: Path) -> None:
    """Neither `500m` for 0.5 nor `7k` for 7,000, nor powers of ten."""
    run = tmp_path / "run"
    write_run(run, {"train/loss": [300.0, 3.0, 0.03]})
    page = page_of(**write_inputs(tmp_path, run)).source
    charts = page[page.index("<h2>Training</h2>") : page.index("<h2>Provenance</h2>")]
    ticks = re.findall(r"<text [^>]*>(\d[^<]*)</text>", charts)
    assert {"0.8", "0.1", "100"} <= set(ticks)
    assert all(re.fullmatch(r"[\d,]+(\.\d+)?", tick) for tick in ticks), ticks
