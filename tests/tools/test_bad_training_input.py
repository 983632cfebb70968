"""Bad input to `megatron-hydra train`: one clear sentence, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra_tools import cli
from kit.tiny_qwen3 import write_tiny_qwen3
from test_bad_input import ENOUGH_TEXT, refuse

from megatron_hydra.head_plan import HeadPlan


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("good") / "teacher")


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """A converted teacher and hybrid, a dataset, and a good `run.yaml` for them."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(ENOUGH_TEXT)
    HeadPlan.from_fa_heads({0: [1], 1: [2, 3]}, 2, 4, 2).save(folder / "plan.json")
    convert = ["convert", "--teacher", str(teacher), "--out"]
    assert cli.main([*convert, f"{folder}/teacher"]) == 0
    plan = ["--plan", f"{folder}/plan.json", "--calibration-tokens", "256"]
    assert cli.main([*convert, f"{folder}/hybrid", *plan]) == 0
    text = ["--input", f"{folder}/text.txt", "--out", f"{folder}/data"]
    assert cli.main(["preprocess", "--tokenizer", str(teacher), *text]) == 0
    (folder / "run.yaml").write_text(
        f"data: {{paths: [{folder}/data], seq_length: 16, micro_batch_size: 1, "
        "global_batch_size: 1}\n"
        "trainer: {max_steps: 2}\n"
        "optim: {lr: 1e-3}\n"
        f"transfer: {{stage: align, init_from: {folder}/hybrid, teacher: {folder}/teacher}}\n"
        f"log: {{folder: {folder}/run}}\n"
    )
    return folder


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("optim.lrr=1", "did you mean"),
        ("trainer.max_steps=many", "max_steps"),
        ("data.seq_length=999999", "999999"),
        ("data.paths=[IN/nothing]", "IN/nothing"),
        (
            "data.end_of_document=<end>",
            "data.end_of_document is <end>, but the documents of IN/data end with <|endoftext|>",
        ),
        ("transfer.init_from=IN/nothing", "IN/nothing"),
        ("transfer.init_from=IN/teacher", "hybrid"),
        ("transfer.teacher=IN/hybrid", "teacher"),
        ("strategy.tensor_model_parallel_size=2", "1 ranks are not divisible"),
        (
            "strategy.tensor_model_parallel_size=3",
            "3 does not fit transfer.init_from IN/hybrid: the",
        ),
        (
            "strategy.pipeline_model_parallel_size=3",
            "2 layers are not divisible by 3; allowed: 1, 2",
        ),
        (
            "model.recompute=full model.recompute_layers=3",
            "model.recompute_layers 3 is above a pipeline stage's 2 layers",
        ),
        (
            "transfer.stage=distill model.cuda_graphs=true",
            "model.cuda_graphs needs a GPU and model",
        ),
        ("strategy.cp_comm_type=a2a", "strategy.cp_comm_type a2a needs a GPU and model.backend"),
        (
            "trainer.precision=fp8 strategy.use_distributed_optimizer=true",
            "trainer.precision fp8 needs a GPU and model.backend transformer_engine",
        ),
        ("log.folder=IN/text.txt/run", "cannot write"),
        ("optim.beta1=1.5", "optim.beta1 is 1.5"),
        ("trainer.num_threads=-1", "trainer.num_threads is -1"),
        ("data.seed=-1", "data.seed is -1"),
        ("data.num_workers=-1", "data.num_workers is -1"),
        ("optim.lr=.nan", "optim.lr is nan"),
        ("data.weights=[0]", "data.weights[0] is 0.0"),
        ("model.fa_query_scale_start=-600", "model.fa_query_scale_start is -600"),
    ],
)
def test_bad_training_run(
    trained_on: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    overrides: str,
    message: str,
) -> None:
    # NeMo's import enables faulthandler, which wants a real stderr: capfd, not capsys.
    if "size=3" in overrides:
        monkeypatch.setenv("WORLD_SIZE", "3")
    command = f"train --config IN/run.yaml {overrides.replace('IN/', f'{trained_on}/')}"
    refused = refuse(trained_on, capfd, command)
    assert message.replace("IN/", f"{trained_on}/") in refused


def _cut(name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-3])

    return cut


def _write(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(text)

    return write


def _edit_model(edit: Callable[[dict], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "hybrid/model.json"
        model = json.loads(path.read_text())
        edit(model)
        path.write_text(json.dumps(model))

    return change


def _token_outside(folder: Path) -> None:
    """A dataset of another tool, which leaves no note of its vocabulary."""
    (folder / "data.json").unlink()
    tokens = np.memmap(folder / "data.bin", np.uint16, "r+")
    tokens[1000] = 264


def _without_ends(folder: Path) -> None:
    """A dataset whose one document has no end, for a run that resets at ends."""
    (folder / "data.json").unlink()
    np.memmap(folder / "data.bin", np.uint16, "r+")[-1] = 0
    config = folder / "run.yaml"
    config.write_text(config.read_text().replace("data: {", "data: {reset_at_document_end: true, "))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_ends, "IN/data has not a single <|endoftext|>, so its documents have no end"),
        (_cut("data.bin"), "data.bin has 89,999 bytes, but"),
        (_cut("data.idx"), "data.idx is cut off"),
        (_write("data.idx", "MMIDIDX"), "data.idx is no index of a Megatron dataset"),
        (_write("data.json", "{"), "cannot read IN/data.json"),
        (_write("data.json", '{"vocab_size": 265, "num_documents": 1, "num_tokens": 45001}'),
         "made with a tokenizer whose ids go up to 264, but the model has 264"),
        (_token_outside, "data holds token 264, but the model has 264 tokens"),
        (_cut("hybrid/weights/.metadata"), ".metadata is missing or damaged"),
        (_cut("hybrid/weights/common.pt"), "common.pt is missing or damaged"),
        (_write("hybrid/weights/metadata.json", "{"), "metadata.json is missing or damaged"),
        (_write("teacher/weights/metadata.json", "{}"), "metadata.json is missing or damaged"),
        (_edit_model(lambda model: model.pop("teacher_config_hash")), "key teacher_config_hash is"),
        (_edit_model(lambda model: model.pop("provenance")), "key provenance is missing"),
        (_edit_model(lambda model: model["config"].update(seq_length="x")), "seq_length is 'x'"),
        (_edit_model(lambda model: model["config"].update(num_layers=3)), "teacher_config_hash"),
        (lambda folder: shutil.rmtree(folder / "hybrid/tokenizer"), "has no tokenizer"),
    ],
)  # fmt: skip
def test_damaged_training_input(
    trained_on: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    folder = Path(shutil.copytree(trained_on, tmp_path / "run"))
    config = folder / "run.yaml"
    config.write_text(config.read_text().replace(str(trained_on), str(folder)))
    spoil(folder)
    refused = refuse(folder, capfd, "train --config IN/run.yaml")
    assert message.replace("IN/", f"{folder}/") in refused
