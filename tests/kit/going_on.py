"""What a run goes on from, and what it says of a full disk; checked inside a training process."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint import FileSystemWriter

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan


def check_damaged_checkpoint(
    inputs: Path, folder: Path, overrides: list[str], lines: list[str]
) -> None:
    """Whatever file is damaged, the run goes on from the checkpoint before, or says it cannot."""
    from megatron_hydra.nemo.training import TrainingRun
    from megatron_hydra.training.config import load_config
    from megatron_hydra.training.going_on import check_model, read_identity

    config = load_config(inputs / "run.yaml", overrides)
    last, newest = (folder / f"checkpoints/step_0000000{step}" for step in (2, 4))
    names = sorted(path.name for path in (last / "weights").iterdir())
    assert {".metadata", "__0_0.distcp", "common.pt", "metadata.json"} == set(names)
    for name in names:
        for harm in (_cut_off, Path.unlink, _fill_with_zeros):
            if harm is _fill_with_zeros and name.endswith(".distcp"):
                continue  # seen when it is loaded, as the documentation says
            shutil.rmtree(newest, ignore_errors=True)
            shutil.copytree(last, newest)
            harm(newest / "weights" / name)
            assert TrainingRun(config).checkpoint == last, (name, harm)
            warning = lines.pop()
            assert str(newest) in warning and name in warning, warning
            assert warning.endswith(f"; going on from {last} instead"), warning

    shutil.rmtree(newest)
    shutil.copytree(last, newest)
    assert TrainingRun(config).checkpoint == last
    warning = lines.pop()
    assert warning.startswith(f"{newest} was saved at step 2: it is a copy; going on from"), warning

    steps: list[int] = []
    TrainingRun(config).run(lambda step, scalars: steps.append(step))
    assert steps == [3], "the run that went on"

    plan, identity = HeadPlan.from_fa_heads({0: [1], 1: [0, 2]}, 2, 4, 2), "a" * 64
    other_plan = (
        r"step_00000002 is of another head plan than h: the FA heads of layer 1 are \[0, 3\]"
    )
    run = TrainingRun(config)
    saved, known = read_identity(last), run.identity
    assert saved == known
    with pytest.raises(UserError, match=other_plan):
        check_model(saved, replace(known, plan=plan), last, "h")
    with pytest.raises(UserError, match="step_00000002 is of a hybrid of another teacher than h"):
        check_model(saved, replace(known, teacher_config_hash=identity), last, "h")
    run.identity = replace(known, plan=plan)
    with pytest.raises(UserError, match="another head plan than .*/hybrid"):
        run.run(lambda step, scalars: None)
    _check_other_contents(inputs, folder, overrides, last)

    _cut_off(last / "weights/common.pt")
    with pytest.raises(
        UserError, match=r"at step 2: it is a copy; no checkpoint of .* is whole: put"
    ):
        TrainingRun(config).run(lambda step, scalars: None)


def _check_other_contents(
    inputs: Path, folder: Path, overrides: list[str], checkpoint: Path
) -> None:
    """The same shapes and sizes, wherever they lie: another model, or other tokens."""
    from megatron_hydra.nemo.training import TrainingRun
    from megatron_hydra.training.config import load_config

    other = Path(shutil.copytree(inputs, folder / "other"))
    places = [f"transfer.init_from={other}/hybrid", f"transfer.teacher={other}/teacher",
              f"data.paths=[{other}/data]"]  # fmt: skip
    config = load_config(inputs / "run.yaml", [*overrides, *places])
    assert TrainingRun(config).checkpoint == checkpoint, "the same, elsewhere"
    for key, name in (
        ("data.paths", "data.bin"),
        ("transfer.teacher", "teacher/weights/__0_0.distcp"),
        ("transfer.init_from", "hybrid/weights/__0_0.distcp"),
    ):
        file = other / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"step_00000002 was trained with another {key} than"):
            TrainingRun(config).run(lambda step, scalars: None)


def _cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _fill_with_zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def check_full_disk(inputs: Path, overrides: list[str]) -> None:
    """A real ENOSPC while a checkpoint is written: one sentence, and the one before is whole.

    In the background too, where an error of the writing thread must not get lost.
    """
    from nv_one_logger.core.exceptions import OneLoggerError
    from nv_one_logger.training_telemetry.api.callbacks import (
        on_save_checkpoint_end,
        on_train_end,
        on_training_single_iteration_end,
    )

    from megatron_hydra.nemo.training import TrainingRun
    from megatron_hydra.training.config import load_config

    saving = [*overrides, "resume.save_every_n_steps=1", "resume.keep=1"]
    run = TrainingRun(load_config(inputs / "run.yaml", saving))
    write_data = FileSystemWriter.write_data

    def write_to_full_disk(self: Any, *args: Any) -> Any:
        if "step_00000002" in str(self.path):
            full = os.open("/dev/full", os.O_WRONLY)
            try:
                os.write(full, b"0")
            finally:
                os.close(full)
        return write_data(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", write_to_full_disk)
        with pytest.raises(UserError) as caught:
            run.run(lambda step, scalars: None)
    # Else NeMo's telemetry takes this process for one that is training.
    for end in (on_save_checkpoint_end, on_training_single_iteration_end, on_train_end):
        with suppress(OneLoggerError):  # it has ended
            end()
    sentence = f"cannot write {run.folder.checkpoints}: the disk is full or its quota used up"
    assert str(caught.value).startswith(sentence)
    names = [path.name for path in run.folder.finished_checkpoints()]
    assert names == ["step_00000001"]
