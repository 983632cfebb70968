"""The study's command: stopped and gone on with, failures kept, carried to another machine."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra_tools import cli, study_jobs
from hydra_tools.study_jobs import Jobs, least_used

from megatron_hydra.study.config import load_study
from megatron_hydra.study.results import ArmResult, load_results

ROOT = Path(__file__).parents[2]
SCRIPT = f"""
import json, shutil, sys
out = sys.argv[-1].removeprefix("--out=")
shutil.copytree({str(ROOT / "examples/quickstart/teacher")!r}, out)
open(out + "/arguments.json", "w").write(json.dumps(sys.argv[1:-1]))
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Two arms of a teacher that a script makes, at the smallest size; one of them cannot be."""
    study: dict[str, Any] = yaml.safe_load((ROOT / "examples/study/cpu.yaml").read_text())
    (tmp_path / "script.py").write_text(SCRIPT)
    study["run"] |= {
        "folder": f"{tmp_path}/study",
        "results": f"{tmp_path}/results",
        "replicates": [{"teacher": "made", "seed": 0}],
    }
    options = {"num_layers": 4, "no_ablation": True, "max_seconds": 9.0}
    study["teachers"] = {"made": {"script": f"{tmp_path}/script.py", "options": options}}
    study["data"] |= {"documents": 64, "long_length": 512, "long_documents": 8}
    study["score"] = {
        "probes": {"names": ["niah_single_2"], "pairs": 2, "length": 256},
        "scorers": {"names": ["activation_patching"]},
    }
    for stage, tokens in (("align", 24576), ("distill", 4096), ("long_context", 2048)):
        study["stages"][stage]["tokens"] = tokens
        study["stages"][stage]["settings"]["resume"] = {"save_every_n_steps": 1}
    study["evaluation"] = {"times": [1, 2], "samples": 2, "text_tokens": 512,
                           "probes": ["induction"]}  # fmt: skip
    del study["speeds"]  # it names other arms
    study["arms"] = {
        "head": study["arms"]["head"] | {"tokens": {"long_context": 0}, "calibration_tokens": 0},
        "broken": {"about": "too many heads", "constraints": {"per_layer": 9}},
    }
    orderings = [{"better": "head", "worse": "broken"}]
    question = {"title": "Which?", "arms": ["head", "broken"], "orderings": orderings}
    study["questions"] = {"which": question}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


def start(config: Path, *more: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tools"))
    return subprocess.Popen(
        [sys.executable, "-m", "hydra_tools.study", "--config", str(config), *more], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def dry_run(config: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, str]:
    """What is to become of each run."""
    capsys.readouterr()
    assert cli.main(["study", "--config", str(config), *more, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if line.startswith("1-4.")]
    return {line.split()[0]: line.split(": ", 1)[1] for line in found}


@pytest.mark.slow
@pytest.mark.exhaustive  # trains an arm through all stages, in five processes
def test_stopped_gone_on_with_failed_carried_and_told(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head, broken, bundle = "1-4.head.made.0", "1-4.broken.made.0", tmp_path / "bundle.tar"
    assert dry_run(config, capsys) == {head: "to run", broken: "to run"}
    first = start(config, "--bundle", str(bundle))
    steps = tmp_path / f"study/arms/{head}/align/metrics.jsonl"
    while not steps.exists() or len(steps.read_text().splitlines()) < 2:
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    said = first.communicate()[0]
    assert first.returncode == 75 and "SIGTERM: " in said and "the same command goes on" in said
    done = len(steps.read_text().splitlines())
    assert 2 <= done < 12
    assert dry_run(config, capsys)[head] == "to go on"

    second = start(config, "--bundle", str(bundle))
    said = second.communicate()[0]
    assert second.returncode == 0 and f"{head}: finished" in said, said
    log = (tmp_path / f"study/logs/{head}.log").read_text()
    assert log.count("starting at step 0") == 2 and f"going on from {steps.parent}/" in log
    found = dry_run(config, capsys)
    assert found[head] == "done" and found[broken].startswith("failed: ")
    assert "9 FA heads per layer asked for, but a layer has 8" in found[broken]
    result = ArmResult.load(tmp_path / f"results/{head}.json")
    assert result.tokens == {"align": 24576, "distill": 4096, "long_context": 0}
    assert len(result.probes["induction"]) == 2 and not (tmp_path / "study/arms" / head).exists()
    assert result.evaluation is not None
    assert [task.length for task in result.evaluation.tasks] == [256, 512] * 2
    made = tmp_path / "study/teachers/made"
    options = json.loads((made / "hf/arguments.json").read_text())
    assert options == ["--max-seconds=9.0", "--no-ablation", "--num-layers=4"]

    third = start(config, "--bundle", str(bundle))
    assert third.communicate()[0] == "" and third.returncode == 0, "nothing is left"
    with tarfile.open(bundle) as tar:
        names = {*tar.getnames()}
    assert {f"results/{head}.json", "teachers/made/scores.json"} <= names
    assert {"teachers/made/hf/model.safetensors", "teachers/made/inputs.json"} <= names
    elsewhere = [f"run.folder={tmp_path}/b", f"run.results={tmp_path}/b/r", "--bundle", str(bundle)]
    assert dry_run(config, capsys, *elsewhere) == found
    weights = "hf/model.safetensors"
    assert (made / weights).read_bytes() == (tmp_path / "b/teachers/made" / weights).read_bytes()
    changed = dry_run(config, capsys, "stages.distill.settings.optim.lr=1e-4")
    assert changed[head] == "to run again, as stages changed"
    assert cli.main(["study", "--config", str(config), "data.documents=32", "--dry-run"]) == 2
    assert "was made with another data: choose another run.folder" in capsys.readouterr().err

    page = tmp_path / "page.md"
    assert cli.main(["study", "--config", str(config), "--report", str(page)]) == 0
    assert "1 are finished, 1 failed" in page.read_text()
    carried = [f"run.folder={tmp_path}/c", f"run.results={tmp_path}/c/r", "--bundle", str(bundle)]
    there = ["--report", str(tmp_path / "there.md")]
    assert cli.main(["study", "--config", str(config), *carried, *there]) == 0
    assert (tmp_path / "there.md").read_text() == page.read_text()
    reason = found[broken].removeprefix("failed: ")
    assert f"- Failed: broken (made, seed 0): {reason}" in page.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "--workers must be 1 or more"),
        (["--minutes", "0"], "--minutes above 0"),
        (["--only", "1-4.nobody.made.0"], "the study has no arm 1-4.nobody.made.0"),
        (["--report", "page.md"], "holds no result of the study: run it first"),
    ],
)
def test_bad_options_are_one_sentence(
    config: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert cli.main(["study", "--config", str(config), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("name", ["../outside", "results/../../outside", "teachers", "other/x"])
def test_a_foreign_archive_is_refused_and_writes_nothing_outside(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with tarfile.open(tmp_path / "bundle.tar", "w") as tar:
        tar.add(config, name)
    words = ["study", "--config", str(config), "--bundle", f"{tmp_path}/bundle.tar", "--dry-run"]
    assert cli.main(words) == 2
    assert "bundle" in capsys.readouterr().err
    assert not list(tmp_path.rglob("outside"))


def test_a_bundle_that_was_packed_anew_is_read(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `tar cf`, which puts folders into it."""
    scores = tmp_path / "bundle/teachers/made/scores.json"
    scores.parent.mkdir(parents=True)
    scores.write_text("{}")
    with tarfile.open(tmp_path / "bundle.tar", "w") as tar:
        tar.add(tmp_path / "bundle/teachers", "teachers")
    words = ["study", "--config", str(config), "--bundle", f"{tmp_path}/bundle.tar", "--dry-run"]
    assert cli.main(words) == 0, capsys.readouterr().err
    assert (tmp_path / "study/teachers/made/scores.json").read_text() == "{}"


@pytest.mark.slow
def test_a_teacher_that_is_trained_and_not_yet_scored_is_carried(
    config: Path, tmp_path: Path
) -> None:
    bundle, trained = tmp_path / "bundle.tar", tmp_path / "study/teachers/made/hf/arguments.json"
    process = start(config, "--bundle", str(bundle))
    while not trained.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode == 75 and "teacher:made: stopped" in said, said
    with tarfile.open(bundle) as tar:
        names = {*tar.getnames()}
    assert "teachers/made/hf/model.safetensors" in names
    assert "teachers/made/inputs.json" not in names


@pytest.mark.slow
def test_a_teacher_that_fails_leaves_its_arms_and_says_why(config: Path, tmp_path: Path) -> None:
    """What it wrote is too weak, and is not taken for a teacher the second time either."""
    (tmp_path / "script.py").write_text(f"{SCRIPT}raise SystemExit('too weak')")
    for _ in range(2):
        process = start(config)
        said = process.communicate()[0]
        assert process.returncode == 1
        assert "teacher:made: failed: " in said and "script.py ended with code 1" in said
        assert not (tmp_path / "results").exists(), "no arm has failed"
        made = {path.name for path in (tmp_path / "study/teachers/made").iterdir()}
        assert "hf.unchecked" in made and "hf" not in made


def test_a_teacher_of_which_there_are_results_is_not_trained_anew(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a clean clone, which has a study's results and not its teachers' weights."""
    head, broken = "1-4.head.made.0", "1-4.broken.made.0"
    result = tmp_path / f"results/{head}.json"
    ArmResult("head", "1/4", "made", 0, {}, "finished").save(result.parent)
    before = result.read_bytes()
    found = dry_run(config, capsys)
    assert found[head] == "done" and found[broken] == "cannot run, as its teacher is not here"
    assert cli.main(["study", "--config", str(config)]) == 1
    said = capsys.readouterr().out
    assert said.startswith(f"teacher made is not in {tmp_path}/study/teachers/made/hf, ")
    assert "--bundle" in said and "run.results" in said and "started" not in said
    assert result.read_bytes() == before and not (tmp_path / "study/teachers").exists()
    speeds = ["--speeds", f"speeds.out={tmp_path}/speeds.json", "speeds.arms=[head]"]
    for more in (["--only", "teacher:made"], speeds):
        assert cli.main(["study", "--config", str(config), *more]) == 2
        assert capsys.readouterr().err.count("teacher made is not in ") == 1
    assert not (tmp_path / "study/teachers").exists()
    elsewhere = dry_run(config, capsys, f"run.results={tmp_path}/others")
    assert elsewhere == {head: "to run", broken: "to run"}


def test_arms_spread_evenly_over_gpus() -> None:
    gpus, used = ["4", "2", "7"], list[str]()
    for _ in range(7):
        used.append(least_used(gpus, used))
    assert used == ["4", "2", "7", "4", "2", "7", "4"]
    used.remove("2")
    assert least_used(gpus, used) == "2"


ROOM_FOR_TWO = """
import os, sys, time
job, there = sys.argv[1:]
os.makedirs(there, exist_ok=True)
mine = os.path.join(there, job)
open(mine, "w").close()
late = time.monotonic() + 1.5 * ("greedy" not in job)
while not (full := len(os.listdir(there)) > 2 or "greedy" in job) and time.monotonic() < late:
    time.sleep(0.02)
time.sleep(0.5)
os.remove(mine)
sys.exit("CUDA out of memory. Tried to allocate 32.00 MiB\\nand what follows it" if full else 0)
"""


FAULT_OF_ALL = """
import os, sys, time
job, there = sys.argv[1:]
os.makedirs(there, exist_ok=True)
mine = os.path.join(there, job)
is_alone = os.path.exists(mine)
open(mine, "w").close()
while not is_alone and len(os.listdir(there)) < 6:
    time.sleep(0.02)
said = "CUDA error: an illegal memory access was encountered\\nCompile with TORCH_USE_CUDA_DSA"
sys.exit(0 if is_alone and "greedy" not in job else said)
"""


@pytest.fixture
def side_by_side(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> list[int]:
    """Five arms and a greedy one, of which a stand-in is run: a script, its job and a folder.

    Returns:
        How many ran side by side, at each start.
    """
    names = [*(f"arm{i}" for i in range(5)), "greedy"]
    study = yaml.safe_load(config.read_text())
    study["arms"] = {name: {"about": ""} for name in names}
    study["questions"] = {"which": {"title": "Which?", "arms": names}}
    config.write_text(yaml.safe_dump(study))
    start, started, ran = subprocess.Popen, list[subprocess.Popen[bytes]](), list[int]()

    def popen(words: list[str], **options: Any) -> subprocess.Popen[bytes]:
        job = words[words.index("--only") + 1]
        started.append(start([sys.executable, "-c", request.param, job, f"{tmp_path}/there"],
                             **options))  # fmt: skip
        ran.append(sum(each.poll() is None for each in started))
        return started[-1]

    monkeypatch.setattr(study_jobs.subprocess, "Popen", popen)
    monkeypatch.setattr(study_jobs, "is_prepared", lambda study, teacher: True)
    monkeypatch.setattr(study_jobs, "all_inputs", lambda study, run: study.inputs(run))
    return ran


def run_all_but_the_greedy(config: Path, workers: int, capsys: Any) -> str:
    """What is said where five arms finish, and the greedy one fails once it is alone."""
    study = load_study(str(config))
    args = argparse.Namespace(
        config=str(config), overrides=[], workers=workers, minutes=None, bundle=None
    )
    assert Jobs(study, args, study.runs()).run() == 0
    said: str = capsys.readouterr().out
    for number in range(5):
        assert f"1-4.arm{number}.made.0: finished" in said
    ((run, result),) = load_results(study).items()
    assert run.arm == "greedy" and result.status == "failed", "alone it has nobody to wait for"
    assert said.count(f"{run.name}: failed: ") == 1
    return said


@pytest.mark.parametrize("side_by_side", ["raise SystemExit('no such kernel')"], indirect=True)
def test_what_ails_every_arm_ends_the_study(
    config: Path, tmp_path: Path, side_by_side: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "examples/quickstart/teacher", tmp_path / "study/teachers/made/hf")
    words = ["study", "--config", str(config)]
    for more in ([], ["--retry-failed"]):
        assert cli.main([*words, *more]) == 75
        said = capsys.readouterr().out
        assert "1-4.arm0.made.0: started" in said and said.count(": failed: ") == 3, said
        assert "none has finished, and too many have failed: 3 runs are left" in said
    assert len(side_by_side) == 6


@pytest.mark.parametrize("side_by_side", [ROOM_FOR_TWO], indirect=True)
def test_an_arm_that_memory_ends_beside_others_goes_on_with_fewer(
    config: Path, side_by_side: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    said = run_all_but_the_greedy(config, 4, capsys)
    assert re.search("out of memory beside others: [1-3] run side by side from here on", said)
    assert max(side_by_side) == 4 and side_by_side[-1] < 4


@pytest.mark.parametrize("side_by_side", [FAULT_OF_ALL], indirect=True)
def test_arms_that_a_fault_ends_beside_others_go_on_alone(
    config: Path, side_by_side: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """As under CUDA's MPS, where the fault of one is that of all on the GPU."""
    said = run_all_but_the_greedy(config, 6, capsys)
    assert side_by_side == [1, 2, 3, 4, 5, 6] + 6 * [1]
    assert said.count("1-4.greedy.made.0: a fault of the GPU") == 1
