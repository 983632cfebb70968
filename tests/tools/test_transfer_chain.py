"""`megatron-hydra transfer` with the real steps: killed, gone on with, changed, stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kit.generated import generated_results
from kit.transfers import ROOT, STAGES, STEPS, TEACHER, command_of, environment

from megatron_hydra.head_plan import HeadPlan


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_whole_chain_killed_gone_on_with_and_changed(tmp_path: Path) -> None:
    """The real steps on the tiny teacher: what is finished stays, what a kill cut off goes on."""
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "docs/method.md").read_text() * 2)
    shutil.copytree(TEACHER, tmp_path / "teacher")
    from megatron_hydra.api.preprocess import Retrieval, preprocess

    preprocess(tmp_path / "teacher", tmp_path / "data", retrieval=Retrieval(0.5, 128, 64))
    small = ["data.seq_length=128", "data.micro_batch_size=1", "data.global_batch_size=1",
             "strategy.tensor_model_parallel_size=1", "trainer.max_steps=2"]  # fmt: skip
    of_stages = [f"{stage}.{each}" for stage in STAGES for each in small]
    more = [
        *of_stages, "stage1_align.trainer.max_steps=30", "stage1_align.resume.save_every_n_steps=1",
        "score.probes={names: [niah_single_1], pairs: 2, pairs_of: {}, length: 256}",
        f"score.probes.text={text}", "score.scorers.names=[activation_patching]",
        f"convert.calibration_text={text}", "convert.calibration_length=128",
        "convert.calibration_tokens=256", f"evaluate.text=[{text}]", "evaluate.lengths=128",
        "evaluate.tasks=niah_single_2", "evaluate.num_samples=5",
        "evaluate.perplexity_tokens=256",
    ]  # fmt: skip
    run = tmp_path / "run"

    def start(*changed: str) -> subprocess.Popen:
        words = command_of(tmp_path, *more, *changed)
        return subprocess.Popen(
            [sys.executable, "-m", "hydra_tools.transfer", *words[1:]], cwd=ROOT,
            env=environment(), stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def state() -> dict[str, dict]:
        return json.loads((run / "transfer.json").read_text())["steps"]

    def saved() -> list[int]:
        steps = [path.parents[1] for path in run.glob("stage1_align/*/step_*[0-9]/*/.metadata")]
        whole = [step for step in steps if not Path(f"{step}-unfinished").exists()]
        return sorted(int(step.name.removeprefix("step_")) for step in whole)

    def wait_for_a_save(process: subprocess.Popen) -> None:
        while not saved():
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)

    # With -9, a step in the background; the driver is held, or it would end by itself.
    first = start()
    wait_for_a_save(first)
    first.send_signal(signal.SIGSTOP)
    (child,) = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    first.kill()
    first.communicate()
    begun, kept = state(), saved()[-1]
    assert list(begun) == list(STEPS[:5]) and begun["stage1_align"]["finished"] is None

    second = start()
    said = second.communicate()[0]
    assert second.returncode == 0, said
    ran = re.findall(r"^== (\w+): (.*)$", said, re.M)
    going_on = ("stage1_align", f"to go on after step {kept}")
    assert ran == [*((name, "done") for name in STEPS[:4]), going_on,
                   *((name, "to run") for name in STEPS[5:])]  # fmt: skip
    lines = (run / "stage1_align/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert len(steps) < 45, "it began anew"
    assert sorted({*steps}) == list(range(1, 31))
    assert "stage3_long_context" in (run / "report.html").read_text(encoding="utf-8")
    results = generated_results(run)
    assert list(results) == ["teacher", "hybrid, trained", "hybrid, untrained"]
    found = {name: model["tasks"][0]["num_right"] for name, model in results.items()}
    assert found["teacher"] >= 4 and found["hybrid, untrained"] <= 1, "of 5"

    done, files = state(), {path: path.stat().st_mtime_ns for path in run.rglob("*.json")}
    third = start()
    assert third.communicate()[0].count(": done\n") == len(STEPS) and third.returncode == 0
    assert state() == done

    fourth = start("plan.fa_ratio=1/8", "stage1_align.trainer.max_steps=2000")
    while state()["stage1_align"]["finished"] is not None:
        assert fourth.poll() is None, fourth.communicate()
        time.sleep(0.1)
    wait_for_a_save(fourth)
    fourth.send_signal(signal.SIGUSR1)
    said = fourth.communicate()[0]
    assert fourth.returncode == 75, said
    again = [name for name, what in re.findall(r"^== (\w+): (.*)$", said, re.M) if what != "done"]
    assert again == ["plan", "convert", "stage1_align"]
    assert HeadPlan.load(run / "plan.json").num_fa_heads == 4
    assert (run / "scores.json").stat().st_mtime_ns == files[run / "scores.json"]
    assert state()["score"] == done["score"] and state()["stage2_distill"] == done["stage2_distill"]
