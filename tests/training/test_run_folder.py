"""The run folder: what a run may write over and remove, what it goes on from, and who holds it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_hydra.errors import UserError
from megatron_hydra.training import run_folder
from megatron_hydra.training.config import load_config
from megatron_hydra.training.run_files import HEADER
from megatron_hydra.training.run_folder import RunFolder
from megatron_hydra.training.run_inputs import check_present, check_same_inputs, input_hashes

# As a run of six steps leaves it; data_index with and without a folder for the data's contents.
WRITTEN = (
    "checkpoints/step_00000004/weights/.metadata",
    "checkpoints/step_00000004/weights/__0_0.distcp",
    "checkpoints/step_00000004/weights/common.pt",
    "checkpoints/step_00000004/weights/metadata.json",
    "checkpoints/step_00000006-unfinished",
    "checkpoints/step_00000006/weights/__1_0.distcp",
    "data_index/0123456789abcdef/7c0ee40bd71b7e7d1ed75626a94fbe51-GPTDataset-train-description.txt",
    "data_index/7c0ee40bd71b7e7d1ed75626a94fbe51-GPTDataset-train-document_index.npy",
    "data_index/0123456789abcdef_16384x4/7c0ee40bd71b7e7d1ed75626a94fbe51-"
    "UpSampledDataset-train-sample_index.npy",
    "hybrid/plan.json",
    "hybrid/tokenizer/tokenizer_config.json",
    "hybrid/weights/__0_0.distcp",
    "hybrid/weights/common.pt",
    "nemo_logs/cmd-args.log",
    "nemo_logs/git-info.log",
    "nemo_logs/lightning_logs.txt",
    "nemo_logs/nemo_error_log.txt",
    "nemo_logs/nemo_log_globalrank-0_localrank-0.txt",
    "tensorboard/events.out.tfevents.1795875281.vm.13595.0",
    "wandb/run_id",
    ".hybrid.77.partial/weights/__0_0.distcp",
)
# Of other programs and people, in and beside what a run writes.
FOREIGN = (
    "config.yaml",
    "converted/model.json",
    "converted/weights/__0_0.distcp",
    "teacher/model.json",
    "data/train.bin",
    "data/train.idx",
    "notes.txt",
    "checkpoints/step_00000002 (copy)/weights/__0_0.distcp",
    "checkpoints/step_best/weights/common.pt",
    "checkpoints/step_00000004/why.txt",
    "tensorboard/comparison/events.out.tfevents.1",
    "evaluation.json",
    "wandb/offline-run-20261129_124349-76549fd9/run-76549fd9.wandb",
)


@pytest.fixture
def exp(tmp_path: Path) -> Path:
    """A folder that holds what a run reads; the run is to write there too."""
    folder = tmp_path / "exp"
    for name in FOREIGN:
        _write(folder / name, name)
    for name in ("converted", "teacher"):
        _write(folder / name / "model.json", json.dumps({"config": {"seq_length": 2048}}))
    return folder


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def _folder(exp: Path, *overrides: str, config_file: Path | None = None) -> RunFolder:
    config = {
        "data": {"paths": [f"{exp}/data/train"], "seq_length": 8, "micro_batch_size": 1,
                 "global_batch_size": 2},
        "trainer": {"max_steps": 6},
        "optim": {"lr": 1e-3},
        "transfer": {"stage": "distill", "init_from": f"{exp}/converted",
                     "teacher": f"{exp}/teacher"},
        "log": {"folder": str(exp)},
    }  # fmt: skip
    file = exp.parent / "run.yaml"
    _write(file, yaml.safe_dump(config))
    return RunFolder(load_config(file, overrides), config_file or file)


def _run_in(folder: Path, steps: int = 6) -> None:
    """Leave what a run leaves."""
    for name in WRITTEN:
        _write(folder / name, name)
    provenance = {"stage": "distill", "max_steps": steps}
    _write(folder / "hybrid/model.json", json.dumps({"provenance": provenance}))


def _files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_starting_anew_removes_what_a_run_wrote_and_nothing_else(exp: Path) -> None:
    before = _files(exp)
    _run_in(exp)
    folder = _folder(exp)
    folder.write_config()
    folder.append_metrics(1, {"loss": math.nan})
    folder.append_finding(1, {"what": "bad_numbers", "findings": []})
    assert '"loss": null}' in folder.metrics.read_text()
    folder.check_removable()
    folder.remove()
    assert _files(exp) == {**before, "run_config.yaml": folder.run_config.read_text()}
    assert folder.run_config.read_text().startswith(f"{HEADER}\ndata:\n")
    assert not folder.hybrid.exists() and not list(exp.glob("checkpoints/step_00000006*"))
    folder.check()  # and a run can start there


@pytest.mark.parametrize("name", ["metrics.jsonl", "findings.jsonl"])
def test_lines_that_no_run_wrote_are_not_written_to(exp: Path, name: str) -> None:
    _write(exp / name, '{"text": "of a data set"}\n')
    with pytest.raises(UserError, match=f"{name} was not written by a run, which would write"):
        _folder(exp).check()


@pytest.mark.parametrize("is_anew", [False, True])
@pytest.mark.parametrize(
    ("override", "words"),
    [
        # The case of the next stage into the folder of the one before, however it is spelt.
        ("transfer.init_from=EXP/hybrid", "EXP/hybrid would replace the input EXP/hybrid"),
        ("transfer.init_from=EXP/data/../hybrid", "would replace the input EXP/data/../hybrid"),
        ("transfer.init_from=EXP/link", "EXP/hybrid would replace the input EXP/link"),
        ("transfer.teacher=EXP/checkpoints/t", "EXP/checkpoints would replace the input"),
        ("data.paths=[EXP/tensorboard/d]", "would replace the input EXP/tensorboard/d.idx"),
        ("log.folder=EXP/converted", "EXP/converted/checkpoints lies in the input EXP/converted"),
        ("log.folder=EXP/teacher/new", "lies in the input EXP/teacher"),
    ],
)
def test_nothing_that_a_run_reads_lies_where_it_writes(
    exp: Path, override: str, words: str, is_anew: bool
) -> None:
    _run_in(exp)
    (exp / "link").symlink_to("hybrid")
    before = _files(exp)
    folder = _folder(exp, override.replace("EXP", str(exp)))
    with pytest.raises(UserError) as caught:
        folder.check_removable() if is_anew else folder.check()
    assert words.replace("EXP", str(exp)) in str(caught.value)
    assert str(caught.value).endswith(": choose another log.folder")
    assert _files(exp) == before


def test_a_config_file_of_ones_own_is_never_replaced(exp: Path) -> None:
    own = exp / "config.yaml"
    folder = _folder(exp, config_file=own)
    folder.check()
    folder.write_config()
    assert own.read_text() == "config.yaml"
    # What a run has written itself is there to go on by, and not to be started anew by.
    resolved = RunFolder(load_config(folder.run_config), folder.run_config)
    resolved.check()
    with pytest.raises(UserError, match="--overwrite would replace .*run_config.yaml"):
        resolved.check_removable()
    # One's own file of that name is one's own.
    own.rename(folder.run_config)
    for check in (folder.check, folder.check_removable):
        with pytest.raises(UserError, match="run_config.yaml was not written by a run"):
            check()


def test_a_hybrid_that_no_run_trained_is_not_replaced(exp: Path) -> None:
    _write(exp / "hybrid/model.json", json.dumps({"provenance": {"calibration_tokens": 1}}))
    for check in (_folder(exp).check, _folder(exp).check_removable):
        with pytest.raises(UserError, match=r"model\.json was not written by a run.*move it"):
            check()
    _run_in(exp)
    _folder(exp).check_removable()
    _write(exp / "hybrid/notes.txt", "mine")
    folder, longer = _folder(exp), _folder(exp, "trainer.max_steps=9")
    folder.write_config()
    folder.check()  # it is complete: nothing more is written
    for check in (longer.check, folder.check_removable):
        with pytest.raises(UserError, match=r"hybrid/notes\.txt was not written by a run"):
            check()


@pytest.mark.parametrize("result", ["hybrid", "checkpoints"])
def test_run_goes_on_only_with_what_decides_its_result_unchanged(exp: Path, result: str) -> None:
    folder = _folder(exp)
    folder.write_config()
    changed = _folder(exp, "optim.lr=1", "data.seed=7")
    changed.check()  # a run that failed before its first checkpoint may be put right
    _run_in(exp)
    shutil.rmtree(exp / {"hybrid": "checkpoints", "checkpoints": "hybrid"}[result])
    _folder(exp, "resume.keep=3", "data.num_workers=2", "data.micro_batch_size=2").check()
    with pytest.raises(UserError) as caught:
        changed.check()
    words = str(caught.value)
    assert "holds a run with data.seed 1234 (here 7), optim.lr 0.001 (here 1.0): set it b" in words
    assert "choose another log.folder; a run that goes on may change only model.overlap_br" in words
    assert "--overwrite" not in words and "\n" not in words
    folder.run_config.write_text(f"{HEADER}\ndata: [")
    with pytest.raises(UserError, match=r"run_config\.yaml, of an earlier run: .* not valid YAML"):
        changed.check()


def test_runs_of_earlier_releases_are_known(exp: Path) -> None:
    folder = _folder(exp)
    _run_in(exp)
    with pytest.raises(UserError, match=r"without its run_config\.yaml.* put that back, or choose"):
        folder.check()
    (exp / "config.yaml").write_text(folder.config.to_yaml())
    with pytest.raises(UserError, match=r"rename its config\.yaml to run_config\.yaml to go on"):
        folder.check()
    (exp / "config.yaml").rename(folder.run_config)
    folder.check()


def test_a_run_may_grow_but_not_shrink_below_what_it_has(exp: Path) -> None:
    _run_in(exp)
    _folder(exp).write_config()
    assert _folder(exp).is_complete()
    longer = _folder(exp, "trainer.max_steps=9")
    longer.check()
    assert not longer.is_complete()
    with pytest.raises(UserError, match=r"max_steps is 5, but .* of 6 steps: raise it to 6"):
        _folder(exp, "trainer.max_steps=5").check()
    shutil.rmtree(exp / "checkpoints")
    with pytest.raises(UserError, match=r"trained for 6 steps, but no checkpoint to go on from to"):
        longer.check()


def test_finished_checkpoints_are_numbers_newest_first(exp: Path) -> None:
    folder = _folder(exp, f"log.folder={exp}/run")
    assert folder.finished_checkpoints() == []
    for name in ("step_00000002", "step_00000010", "step_99999999", "step_100000000",
                 "step_00000012", "step_00000010 (copy)", "step_00000011.bak", "step_bad",
                 "step_", "last_step_00000013"):  # fmt: skip
        (folder.checkpoints / name / "weights").mkdir(parents=True)
    (folder.checkpoints / "step_00000012-unfinished").touch()
    (folder.checkpoints / "step_00000014").mkdir()
    names = [path.name for path in folder.finished_checkpoints()]
    assert names == ["step_100000000", "step_99999999", "step_00000010", "step_00000002"]


HOLD = """
import sys, time
from pathlib import Path
from megatron_hydra.training.config import load_config
from megatron_hydra.training.run_folder import RunFolder

with RunFolder(load_config(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_run_at_a_time(exp: Path) -> None:
    """Until it is killed: nothing that it leaves behind keeps the next one out."""
    folder = _folder(exp)
    root = Path(__file__).parents[2]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(exp.parent / "run.yaml")], stdout=subprocess.PIPE, cwd=root
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=rf"log.folder {exp} is in use by process {holder.pid}"):
            folder.lock().__enter__()
    finally:
        holder.kill()
        holder.wait()
    with folder.lock():
        pass


def test_inputs_are_known_by_what_they_hold(exp: Path) -> None:
    config = _folder(exp).config
    began = {"transfer.init_from": "a", "transfer.teacher": "b", "data.paths": "c"}
    every = set(began)
    check_same_inputs(began, began, every, config, exp)  # moved, or spelt otherwise
    for key in began:
        with pytest.raises(UserError) as caught:
            check_same_inputs(began, {**began, key: "x"}, set(), config, exp)
        words = str(caught.value)
        assert f"was trained with another {key} than" in words
        assert words.endswith("put back what the run began with, or choose another log.folder")
        earlier = {**began, key: ""}  # what an earlier release did not note
        check_same_inputs(earlier, began, every - {key}, config, exp)
        with pytest.raises(UserError, match=rf"another {key}"):
            check_same_inputs(earlier, began, {key}, config, exp)


def test_a_complete_run_says_so_of_what_it_was_trained_on_alone(exp: Path) -> None:
    """Catches data or weights made anew under the old names, which nobody then trains on."""
    for name in ("converted", "teacher"):
        _write(exp / name / "weights/__0_0.distcp", name)
    folder = _folder(exp)
    meta = {
        "kind": "hybrid",
        "schema_version": 1,
        "provenance": {"stage": "align", "inputs": input_hashes(folder.config)},
    }
    assert all(meta["provenance"]["inputs"].values())
    _write(exp / "hybrid/model.json", json.dumps(meta))
    folder.write_config()
    folder.check_trained()
    _write(exp / "data/train.bin", "other tokens")
    with pytest.raises(UserError, match=r"hybrid was trained with another data\.paths than"):
        folder.check_trained()
    (exp / "data/train.bin").unlink()
    folder.check_trained()  # what is not there any more, nobody can have meant
    _write(exp / "teacher/weights/__0_0.distcp", "another teacher")
    with pytest.raises(UserError, match=r"hybrid was trained with another transfer\.teacher"):
        folder.check_trained()


def test_moved_inputs_are_other_places(exp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _folder(exp).write_config()
    (exp / "link").symlink_to("teacher")
    monkeypatch.chdir(exp)
    spelt = ["transfer.init_from=./converted", "transfer.teacher=link", "data.paths=[data/train]"]
    assert _folder(exp, *spelt).moved_inputs() == set()
    assert _folder(exp, "transfer.teacher=converted").moved_inputs() == {"transfer.teacher"}


@pytest.mark.parametrize(
    ("overrides", "num_bytes"),
    [
        # 1,000 float32 parameters: the hybrid, and checkpoints with two moments per parameter.
        (["trainer.max_steps=5000"], 4000 + 3 * 12000),
        (["trainer.max_steps=1000", "resume.keep=5"], 4000 + 2 * 12000),
        (["trainer.max_steps=499"], 4000),
        (["trainer.max_steps=5000", "trainer.precision=bf16"], 4000 + 3 * 14000),
        (["trainer.max_steps=5000", "transfer.stage=align"], 4000 + 3 * 4000),
    ],
)
def test_room_is_asked_for_before_it_is_needed(
    exp: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], num_bytes: int
) -> None:
    fields = {"seq_length": 2048, "params_dtype": "float32"}
    _write(exp / "converted/model.json", json.dumps({"config": fields}))
    _write(exp / "converted/weights/__0_0.distcp", "x" * 4000)
    folder = _folder(exp, f"log.folder={exp}/run", *overrides)
    asked = []
    monkeypatch.setattr(run_folder, "check_space", lambda path, size: asked.append((path, size)))
    folder.check_room()
    assert asked == [(folder.checkpoints, num_bytes)]


def test_a_model_is_not_run_beyond_its_length_by_the_way(exp: Path) -> None:
    """Only the stage whose purpose it is trains a model on longer samples than it is built for."""
    check_present(_folder(exp, "data.seq_length=2048").config)
    long = ["data.seq_length=100000", "transfer.stage=long_context"]
    check_present(_folder(exp, *long).config)
    with pytest.raises(UserError) as caught:
        check_present(_folder(exp, long[0]).config)
    assert str(caught.value) == (
        f"data.seq_length is 100000, but transfer.init_from {exp}/converted is built for 2048 "
        "tokens: choose 2048 or fewer, or extend the model with transfer.stage=long_context"
    )
