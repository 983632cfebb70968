"""The training tool: its progress line, and what a rank does about bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra_tools import cli, launch
from hydra_tools.train import _Progress

from megatron_hydra.training.config import load_config

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples/quickstart"
RATES = {"grad_norm": 0.5, "lr": 1e-3, "tokens_per_s": 800.0}


def _line(
    capsys: pytest.CaptureFixture[str], stage: str, step: int, scalars: dict[str, float]
) -> str:
    progress = _Progress(load_config(EXAMPLES / f"{stage}.yaml"))
    progress.show(step, scalars)
    progress.close()
    return capsys.readouterr().err.splitlines()[-1]


def test_alignment_shows_the_worst_layer(capsys: pytest.CaptureFixture[str]) -> None:
    layers = {"alignment/layer_00": 0.1, "alignment/layer_01": 0.4, "alignment/layer_02": 0.25}
    line = _line(capsys, "stage1_align", 3, {"loss": 0.75, "alignment": 0.75, **layers, **RATES})
    assert line.startswith("align:") and " 3/" in line
    assert "loss 0.75, worst alignment/layer_01 0.4, grad_norm 0.5, lr 0.001, tokens_per_s" in line


def test_distillation_shows_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    line = _line(capsys, "stage2_distill", 1, {"loss": 3.0, "ce": 2.0, "kl": 1.0, **RATES})
    assert "loss 3, kl 1, ce 2, grad_norm 0.5" in line and "worst" not in line


def test_the_newest_validation_loss_stays_on_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    progress = _Progress(load_config(EXAMPLES / "stage2_distill.yaml"))
    for step, more in enumerate(({"validation/loss": 2.5}, {"validation/loss": 2.25}, {}), start=1):
        progress.show(step, {"loss": 3.0, **RATES, **more})
    progress.close()
    line = capsys.readouterr().err.splitlines()[-1]
    assert " 3/" in line and "loss 3, " in line and line.endswith("validation/loss 2.25]")


def test_the_newest_needles_stay_on_the_line_with_their_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = _Progress(load_config(EXAMPLES / "stage2_distill.yaml"))
    for step, more in enumerate(({"needles/single": 0.25}, {"needles/single": 0.75}, {}), start=1):
        progress.show(step, {"loss": 3.0, **RATES, **more})
    progress.close()
    line = capsys.readouterr().err.splitlines()[-1]
    assert " 3/" in line and line.endswith("needles/single 0.75 at step 2]")


def test_another_rank_leaves_the_sentence_to_rank_0(tmp_path: Path) -> None:
    """It waits until torchrun ends it, then leaves with 2 and without a word or a stack."""
    report = tmp_path / "report.json"
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tools"))
    process = subprocess.Popen(
        [sys.executable, "-m", "hydra_tools.train", "--config", "nowhere.yaml"],
        env={
            **os.environ,
            "PYTHONPATH": paths,
            "RANK": "1",
            "TORCHELASTIC_ERROR_FILE": str(report),
        },
        stderr=subprocess.PIPE,
    )
    try:
        end = time.monotonic() + 60
        while not (report.exists() and report.read_text()) and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=10)
    finally:
        process.kill()
    assert (process.returncode, said) == (2, b"")
    assert "cannot read the config nowhere.yaml" in report.read_text()


def test_torchruns_summary_says_what_a_rank_died_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise RuntimeError("NCCL communicator was aborted")

    monkeypatch.setattr(launch, "run_verb", fail)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "report.json"))
    with pytest.raises(RuntimeError):
        launch.main("train")
    report = json.loads((tmp_path / "report.json").read_text())["message"]
    assert report["message"] == "RuntimeError: NCCL communicator was aborted"
    assert "in fail\n" in report["extraInfo"]["py_callstack"]


def _write_run(tmp_path: Path) -> None:
    for name in ("data.idx", "data.bin", "model/model.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"config": {"seq_length": 2048}}')
    (tmp_path / "run.yaml").write_text(
        "data: {paths: [data], seq_length: 2048, micro_batch_size: 1, global_batch_size: 1}\n"
        "trainer: {max_steps: 2}\n"
        "optim: {lr: 1e-3}\n"
        "transfer: {stage: distill, init_from: model, teacher: model}\n"
        "log: {folder: run}\n"
    )


@pytest.mark.parametrize("left", [{"RANK": "1"}, {"RANK": "0", "WORLD_SIZE": "4"}])
@pytest.mark.parametrize(
    "command",
    [
        "train --config run.yaml data.global_batch_size=4",
        "score --teacher teacher --out scores.json",
        "certify --config run.yaml --out certificate.json",
    ],
)
def test_ranks_that_a_shell_has_kept_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    left: dict[str, str], command: str,
) -> None:  # fmt: skip
    """Catches a rank 1 of nobody, which trains without a lock, a word or a run_config.yaml."""
    _write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert cli.main(command.split()) == 2
    values = " and ".join(f"{name}={value}" for name, value in left.items())
    assert f"the environment has {values}, but torchrun has not" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_machine_that_trains_alone_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torchrun has it start where the other's clock is behind: without an error."""
    _write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, value in {"HYDRA_NUM_NODES": "2", "GROUP_WORLD_SIZE": "1", "RANK": "0",
                        "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "7"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "--config", "run.yaml"]) == 2
    assert "torchrun has brought together 1 of the 2 machines" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("transfer.init_from=nowhere", "nowhere is not a checkpoint folder: it has no model.json"),
        ("transfer.teacher=nowhere", "nowhere is not a checkpoint folder: it has no model.json"),
        ("data.paths=[nowhere]", "no indexed dataset nowhere: nowhere.idx is missing (see"),
        ("data.seq_length=100000", "is built for 2048 tokens: choose 2048 or fewer, or extend"),
        ("log.wandb_project=p", "log.wandb_project is p, but the package wandb is not installed"),
        ("log.folder=model/run", "output model/run/checkpoints lies in the input model: choose an"),
    ],
)
def test_what_can_be_said_at_once_is_said_before_the_slow_imports(
    tmp_path: Path, override: str, sentence: str
) -> None:
    _write_run(tmp_path)
    (tmp_path / "wandb").mkdir()  # as W&B leaves it, and Python takes it for a package
    program = (
        "import sys; from hydra_tools import cli; cli.main(sys.argv[1:]); "
        "print({'torch', 'megatron', 'nemo', 'transformers'} & set(sys.modules))"
    )
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tools"))
    finished = subprocess.run(
        [sys.executable, "-c", program, "train", "--config", "run.yaml", override],
        env={**os.environ, "PYTHONPATH": paths}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.stdout == "set()\n"
    (line,) = finished.stderr.splitlines()
    assert line.startswith("megatron-hydra: error: ") and sentence in line
    assert not (tmp_path / "run").exists()
