"""`megatron-hydra estimate`: what it says of stages whose models are there, or not yet."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra_tools import cli
from kit.lives import write_inputs
from kit.published import CONFIGS

from megatron_hydra.api.dry_run import dry_run
from megatron_hydra.api.estimate import Model, by_context, estimate
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.training.config import load_config
from megatron_hydra.training.step_time import ERRORS_PERCENT

ROOT = Path(__file__).parents[2]
STAGES = sorted(str(path) for path in ROOT.glob("examples/qwen3_1p7b/stage*.yaml"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen3_1p7b"]))
    return tmp_path


def _of_teacher(teacher: Path, *more: str) -> list[str]:
    command = ["estimate", "--config", *STAGES, "--gpu", "h100", "--teacher", str(teacher)]
    return [*command, "--fa-fraction", "1/4", *more]


def _json(command: list[str], path: Path) -> dict[str, Any]:
    assert cli.main([*command, "--json", str(path), "--overwrite"]) == 0
    return json.loads(path.read_text())


def test_it_says_all_of_stages_that_are_not_converted_without_pytorch(teacher: Path) -> None:
    program = (
        "import sys; from hydra_tools import cli; cli.main(sys.argv[1:]); "
        "print({'torch', 'megatron', 'nemo', 'transformers'} & set(sys.modules))"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, *_of_teacher(teacher, "--gpus", "16")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert said.startswith("16 x H100 SXM (80 GB), 8 in each of 2 nodes\n")
    assert "stage3_long_context: long_context, 477 steps, 1,000,341,504 tokens, 112 of 448" in said
    assert said.count("as written ") == 3 and said.count("all stages, fastest: ") == 1
    assert said.splitlines()[-1] == "set()"
    for what, percent in ERRORS_PERCENT.items():
        assert f"{what}: {percent}%" in said
    assert "Never measured: more than two GPUs, replicas, pipelines," in said
    assert "Assumed: 40 GB/s of each GPU to other nodes" in said


def _of_transfer(recipe: str, *more: str) -> list[str]:
    config = str(ROOT / f"examples/{recipe}/transfer.yaml")
    return ["estimate", "--config", config, "--gpu", "h100", *more]


@pytest.mark.parametrize("num_nodes", [1, 8, 64])
def test_a_transfers_file_says_all_that_its_stages_need(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], num_nodes: int
) -> None:
    """Of a fresh clone: the published shape, the plan's ratio, 8 GPUs in each node."""
    named = _of_teacher(teacher, "--gpus", f"{8 * num_nodes}", "--nodes", f"{num_nodes}")
    expected = _json(named, tmp_path / "named.json")
    capsys.readouterr()
    command = _of_transfer("qwen3_1p7b", "--nodes", f"{num_nodes}")
    found = _json(command, tmp_path / "found.json")
    assert (
        "run.teacher models/Qwen3-1.7B is not there: its shape is taken" in capsys.readouterr().out
    )
    assert {**found, "provenance": None} == {**expected, "provenance": None}
    more = ["plan.fa_ratio=1/8", "stage3_long_context.trainer.max_steps=6000"]
    *others, last = _json([*command, *more], tmp_path / "found.json")["stages"]
    assert last["num_steps"] == 6000 and last["fa_heads"] == 56
    assert [stage["num_steps"] for stage in others] == [
        stage["num_steps"] for stage in expected["stages"][:-1]
    ]


@pytest.mark.parametrize("recipe", sorted(CONFIGS))
def test_every_recipe_is_estimated_before_anything_is_downloaded(recipe: str) -> None:
    assert cli.main(_of_transfer(recipe, "--nodes", "2")) == 0


def test_a_transfer_is_estimated_by_what_is_there_of_it(inputs: Path, tmp_path: Path) -> None:
    """The plan that was made, then the hybrid that was converted by it."""
    run = tmp_path / "run"
    run.mkdir()
    plan = HeadPlan.from_fa_heads({0: [], 1: [1, 2], 2: [3], 3: []}, 4, 8, 4)
    plan.save(run / "plan.json")
    more = [f"run.folder={run}", f"run.teacher={ROOT}/examples/quickstart/teacher"]
    command = _of_transfer("quickstart", "--gpus", "1", *more)
    stages = _json(command, tmp_path / "found.json")["stages"]
    assert [stage["fa_heads"] for stage in stages] == [3, 3, 3]
    (run / "converted").symlink_to(inputs / "hybrid")
    stages = _json(command, tmp_path / "found.json")["stages"]
    made = HeadPlan.load(inputs / "hybrid/plan.json")
    assert [stage["fa_heads"] for stage in stages] == [made.num_fa_heads] * 3
    assert stages[0]["total_heads"] == made.num_layers * made.num_heads


def test_a_transfers_estimate_has_the_kinds_that_its_heads_will_be(tmp_path: Path) -> None:
    """Three quarters as windows are all that are not FA, which `convert` may be told too."""

    def stages(*more: str) -> list[dict[str, Any]]:
        found = _json(_of_transfer("qwen3_1p7b", "--gpus", "8", *more), tmp_path / "found.json")
        return found["stages"]

    windows = stages("plan.window_ratio=3/4")
    assert windows == stages("convert.model.la_kind=sliding_window")
    some, none = stages("plan.window_ratio=1/4"), stages()
    for stage in range(3):
        times = [each[stage]["fastest"]["step_seconds"] for each in (none, some, windows)]
        assert times[0] != times[1] != times[2], "windows of 512 tokens cost what they are"
        assert times[1] == pytest.approx((2 * times[0] + times[2]) / 3, rel=0.01)
    larger = stages("plan.window_ratio=3/4", "convert.model.sliding_window_tokens=8192")
    assert larger[2]["fastest"]["step_seconds"] > 1.05 * windows[2]["fastest"]["step_seconds"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            ["--nodes", "1", "plan.window_ratio=0.9"],
            "403 of 448 heads cannot become windows beside",
        ),
        (["--nodes", "1", "plan.window_ratio=2"], "the fraction of windows is 2; allowed: 0 to 1"),
        (["--nodes", "1", "convert.model.la_kind=it"], "la_kind is 'it'; allowed: gated_delta_net"),
        (["--nodes", "1", "--teacher", "nowhere"], "no teacher nowhere is there: its config.json"),
        (["--nodes", "1", "plan.fa_ratio=null", "plan.fa_heads=9"], "has no plan.fa_ratio: name a"),
        (["--nodes", "0"], "the number of GPUs is 0"),
        ([], "how many? --gpus N in all, or --nodes N of 8 GPUs each"),
    ],
)
def test_what_a_transfers_file_leaves_open_is_asked_for(
    capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    assert cli.main(_of_transfer("qwen3_1p7b", *more)) == 2
    assert sentence in capsys.readouterr().err


def test_its_figures_follow_from_one_another(teacher: Path, tmp_path: Path) -> None:
    command = _of_teacher(teacher, "--gpus", "32", "--nodes", "2", "--price-per-hour", "2.5")
    found = _json(command, tmp_path / "estimate.json")
    assert (found["kind"], found["schema_version"]) == ("estimate", 1)
    assert (found["num_gpus"], found["gpus_per_node"]) == (32, 16)
    for stage in found["stages"]:
        for name in ("as_written", "fastest"):
            layout = stage[name]
            if layout is None:
                assert "not divisible by" in stage["why_not_as_written"]
                continue
            seconds = layout["step_seconds"] * stage["num_steps"]
            assert layout["hours"] == pytest.approx(seconds / 3600)
            assert layout["tokens_per_second"] == pytest.approx(stage["num_tokens"] / seconds)
            assert layout["gpu_hours"] == pytest.approx(layout["hours"] * layout["num_gpus"])
            assert layout["cost"] == pytest.approx(layout["gpu_hours"] * 2.5)
            sizes = ("tensor_parallel", "pipeline_parallel", "context_parallel", "data_parallel")
            assert math.prod(layout[size] for size in sizes) == layout["num_gpus"] <= 32
            assert layout["fits"] and layout["memory_bytes"] < 80e9
        assert stage["disk_bytes"] > 3 * stage["checkpoint_bytes"]
    # 32 x 512 tokens in micro-batches of 2 x 512 are no more than 16 replicas' work.
    assert found["stages"][0]["as_written"] is None


def test_the_fastest_layouts_overrides_make_it_the_one_that_is_written(
    teacher: Path, tmp_path: Path
) -> None:
    command = _of_teacher(teacher, "--gpus", "8")
    for index, stage in enumerate(_json(command, tmp_path / "first.json")["stages"]):
        fastest = stage["fastest"]
        again = ["estimate", "--config", STAGES[index], *fastest["overrides"], "--gpu", "h100"]
        again += ["--teacher", str(teacher), "--fa-fraction", "0.25"]
        again += ["--gpus", str(fastest["num_gpus"])]
        (found,) = _json(again, tmp_path / "second.json")["stages"]
        assert found["as_written"] == {**fastest, "overrides": []}


def test_an_override_of_a_stage_is_that_stages_alone(teacher: Path, tmp_path: Path) -> None:
    command = _of_teacher(teacher, "--gpus", "8")
    command.insert(5, "stage2_distill.trainer.max_steps=7")  # among the words after --config
    command.append("trainer.max_steps=9")
    found = _json(command, tmp_path / "estimate.json")
    assert [stage["num_steps"] for stage in found["stages"]] == [9, 9, 9]
    found = _json(command[:-1], tmp_path / "estimate.json")
    assert [stage["num_steps"] for stage in found["stages"]] == [18311, 7, 477]


def test_needles_are_counted_into_the_hours(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rounds after steps 100, 200, 300, 400 and 477, of which each of 8 replicas has 4 batches."""
    command = ["estimate", "--config", STAGES[2], "--gpu", "h100", "--teacher", str(teacher)]
    command += ["--fa-fraction", "1/4", "--gpus", "8"]
    (without,) = _json(command, tmp_path / "estimate.json")["stages"]
    assert without["as_written"]["needle_hours"] == 0 and "needles" not in capsys.readouterr().out
    command.insert(3, "trainer.needles_every_n_steps=100")
    (found,) = _json(command, tmp_path / "estimate.json")["stages"]
    layout, hours = found["as_written"], found["as_written"]["needle_hours"]
    assert layout["hours"] == pytest.approx(without["as_written"]["hours"] + hours)
    assert "  needles: " in capsys.readouterr().out
    # 5 rounds of 4 batches: a prompt's forward pass is less than a third of a training step's, and
    # three tokens' take less than that each.
    steps = hours * 3600 / (5 * 4) / layout["step_seconds"]
    assert 0.02 < steps < 4 / 3
    command.insert(3, "trainer.needle_samples=320")
    (ten,) = _json(command, tmp_path / "estimate.json")["stages"]
    assert ten["as_written"]["needle_hours"] == pytest.approx(10 * hours)


def test_the_teacher_answers_in_one_round_more(teacher: Path, tmp_path: Path) -> None:
    command = ["estimate", "--config", STAGES[1], "--gpu", "h100", "--teacher", str(teacher)]
    command += ["--fa-fraction", "1/4", "--gpus", "8"]
    command[3:3] = ["trainer.max_steps=200", "trainer.needle_tokens=8192"]
    hours = []
    for every in (200, 100, 50):
        more = [*command[:3], f"trainer.needles_every_n_steps={every}", *command[3:]]
        (found,) = _json(more, tmp_path / "estimate.json")["stages"]
        hours.append(found["as_written"]["needle_hours"])
    of_round = hours[1] - hours[0]
    assert hours[2] - hours[1] == pytest.approx(2 * of_round)
    assert hours[0] - of_round > 1.01 * of_round, "its heads compare all tokens with all"


@pytest.mark.parametrize(("stage", "share"), [(1, 1 / 2), (2, 1 / 3)])
def test_validation_is_counted_into_the_hours(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: int, share: float
) -> None:
    """After steps 40, 80 and 100, each time 10 batches: forward, where a step goes back as well.

    The share of a step is that of its passes, with a teacher's in stage 2; an optimizer's step and
    the exchange of gradients, which validation has not, make it smaller.
    """
    command = ["estimate", "--config", STAGES[stage], "--gpu", "h100", "--teacher", str(teacher)]
    command += ["--fa-fraction", "1/4", "--gpus", "8"]
    command.insert(3, "trainer.max_steps=100")
    (without,) = _json(command, tmp_path / "estimate.json")["stages"]
    assert without["as_written"]["validation_hours"] == 0
    assert "validation" not in capsys.readouterr().out
    command[3:3] = ["trainer.validate_every_n_steps=40", f"data.validation_paths=[{tmp_path}/held]"]
    (found,) = _json(command, tmp_path / "estimate.json")["stages"]
    layout, hours = found["as_written"], found["as_written"]["validation_hours"]
    assert layout["hours"] == pytest.approx(without["as_written"]["hours"] + hours)
    assert "  validation: " in capsys.readouterr().out
    assert 0.7 * share < hours * 3600 / (3 * 10) / layout["step_seconds"] < 1.001 * share
    command.insert(3, "trainer.validation_steps=20")
    (twice,) = _json(command, tmp_path / "estimate.json")["stages"]
    assert twice["as_written"]["validation_hours"] == pytest.approx(2 * hours)


@pytest.mark.parametrize("recompute", [[], ["model.recompute=full", "model.recompute_layers=1"]])
def test_a_stored_models_memory_and_disk_are_the_dry_runs(
    inputs: Path, recompute: list[str]
) -> None:
    """And a stage whose model an earlier one is to write has that one's."""
    first = load_config(
        inputs / "run.yaml",
        [
            "transfer.stage=distill",
            f"log.folder={inputs}/run",
            "trainer.precision=bf16",
            *recompute,
        ],
    )
    later = load_config(
        inputs / "run.yaml",
        ["transfer.stage=align", f"log.folder={inputs}/later", "trainer.precision=bf16",
         f"transfer.init_from={inputs}/run/hybrid"],
    )  # fmt: skip
    found = estimate([first, later], "h200", 4)
    expected = dry_run(first, 4)
    layout = found.stages[0].as_written
    assert layout is not None and expected.memory is not None
    assert layout.memory_bytes == expected.memory.peak
    assert found.stages[0].checkpoint_bytes == expected.checkpoint_bytes
    assert found.stages[1].fa_heads == expected.fa_heads
    assert found.price_per_gpu_hour is layout.cost is None


def test_a_plan_counts_as_it_is(teacher: Path, tmp_path: Path) -> None:
    plan = HeadPlan.from_fa_heads({i: range(16) if i < 7 else () for i in range(28)}, 28, 16, 8)
    plan.save(tmp_path / "plan.json")
    configs = [load_config(path) for path in STAGES]
    planned = estimate(configs, "h100", 8, model=Model.of_teacher(teacher, tmp_path / "plan.json"))
    even = estimate(configs, "h100", 8, model=Model.of_teacher(teacher, fa_fraction=0.25))
    for one, other in zip(planned.stages, even.stages, strict=True):
        assert one.fa_heads == other.fa_heads == 112
        assert one.as_written is not None and other.as_written is not None
        assert one.as_written.memory_bytes != other.as_written.memory_bytes


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--gpus", "8", "--gpu", "a100"], "unknown device 'a100': use one of h100, h200"),
        (["--gpus", "0"], "the number of GPUs is 0; allowed: 1 to 65536"),
        (["--gpus", "8", "--nodes", "3"], "8 GPUs are not divisible by 3 nodes"),
        (["--gpus", "8", "--price-per-hour", "-1"], "the price per hour is -1.0; it must be 0 or"),
        (["--gpus", "8", "--price-per-hour", "nan"], "the price per hour is nan; it must be 0 or"),
        (["--gpus", "8", "--fa-fraction", "5/4"], "the fraction of FA heads is 1.25; allowed: 0"),
        (["--gpus", "8", "--teacher", "nowhere"], "model folder nowhere does not exist"),
        (["--gpus", "8", "--json", STAGES[0], "--overwrite"], "stage1_align.yaml"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(
    teacher: Path, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    assert cli.main(_of_teacher(teacher, *more)) == 2
    said = capsys.readouterr().err
    assert sentence in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], r"transfer.init_from \S+ is no checkpoint folder yet: name the teacher and a head"),
        (["--fa-fraction", "1/4"], "--plan and --fa-fraction say what is made of a --teacher"),
        (["--teacher", "TEACHER"], "a teacher needs either a head plan or a fraction of FA heads"),
    ],
)
def test_a_model_that_is_not_there_is_asked_for(
    teacher: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    words = [word.replace("TEACHER", str(teacher)) for word in words]
    command = ["estimate", "--config", STAGES[0], "--gpu", "h100", "--gpus", "8", *words]
    assert cli.main(command) == 2
    assert re.search(sentence, capsys.readouterr().err)


def test_an_existing_file_is_not_replaced(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.json").write_text("mine")
    command = _of_teacher(teacher, "--gpus", "8", "--json", str(tmp_path / "there.json"))
    assert cli.main(command) == 2
    assert (tmp_path / "there.json").read_text() == "mine"
    assert "--overwrite" in capsys.readouterr().err


def test_a_layout_that_does_not_fit_is_said_so(
    teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["stage3_long_context.data.seq_length=1048576", "--gpus", "8"]
    assert cli.main(_of_teacher(teacher, *more)) == 0
    assert "as written it does not fit into the GPU's memory" in capsys.readouterr().out


def test_contexts_are_the_estimate_of_stages_written_so(teacher: Path) -> None:
    """Of all stages' tokens, at the last one's context: and more attention takes more."""
    model, stages = Model.of_teacher(teacher, fa_fraction=1 / 4), [load_config(x) for x in STAGES]
    last, own = stages[-1], stages[-1].data.seq_length
    points = by_context(stages, "h100", 64, model=model, lengths=(own, 4 * own))
    alone = estimate([last], "h100", 64, model=model).stages[0]
    num_tokens = sum(x.num_tokens for x in estimate(stages, "h100", 64, model=model).stages)
    steps = math.ceil(num_tokens * alone.num_steps / alone.num_tokens)
    assert alone.fastest is not None
    expected = alone.fastest.gpu_hours * steps / alone.num_steps
    assert points[0].gpu_hours["head-level"] == pytest.approx(expected)
    for point in points:
        hours = point.gpu_hours
        assert hours["full attention"] > 1.2 * hours["layer-wise"] > hours["head-level"]
    assert points[1].gpu_hours["head-level"] > points[0].gpu_hours["head-level"]


def test_a_picture_of_contexts(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = _of_teacher(teacher, "--gpus", "8", "--picture", str(tmp_path / "hours.png"))
    assert cli.main(command) == 0
    picture = (tmp_path / "hours.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    capsys.readouterr()
    assert cli.main(command) == 2
    assert "hours.png exists" in capsys.readouterr().err
    assert (tmp_path / "hours.png").read_bytes() == picture
