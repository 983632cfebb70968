"""A training that hangs under `ft_launcher` of nvidia-resiliency-ext is ended, and goes on.

With the package itself. Catches: heartbeats that nobody hears, or that stop a healthy run; a limit
that the YAML sets and the launcher does not know; a training that waits for a beat that none sends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from kit.lives import RUN_SECONDS_MAX, paths, write_inputs
from kit.optional import optional_program

from megatron_hydra.errors import UserError
from megatron_hydra.training.config import load_config
from megatron_hydra.training.run_inputs import check_heartbeat

SECONDS = 20  # a busy machine's step is far below


@pytest.mark.dist
@pytest.mark.exhaustive  # two launches, and the silence between them: minutes on a busy machine
def test_a_rank_that_hangs_is_ended_and_the_run_goes_on(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path)
    command = [
        optional_program("ft_launcher"), "--nproc-per-node=2", "--max-restarts=1",
        "-m", "hydra_tools.train", "--config", f"{inputs}/run.yaml", "transfer.stage=align",
        f"log.folder={tmp_path}/run", f"strategy.heartbeat_seconds={SECONDS}",
    ]  # fmt: skip
    log = tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": paths(), "OMP_NUM_THREADS": "1"}
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
    try:
        metrics, end = tmp_path / "run/metrics.jsonl", time.monotonic() + RUN_SECONDS_MAX
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(0.02)
        os.kill(_ranks_of(process.pid)[1], signal.SIGSTOP)
        stopped = time.monotonic()
        assert process.wait(RUN_SECONDS_MAX) == 0, log.read_text()[-4000:]
    finally:
        process.kill()
    said = log.read_text(errors="replace")
    # Far below what ranks wait for each other, which is 30 minutes.
    assert time.monotonic() - stopped > SECONDS
    assert "Did not get subsequent heartbeat" in said and "going on from" in said
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps[-1] == 14 and steps.index(3) > 0 and (tmp_path / "run/hybrid/model.json").is_file()


def _ranks_of(launcher: int) -> list[int]:
    """The ranks' process numbers in order: the launcher starts monitors beside them."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = {}
    for child in children:
        variables = Path(f"/proc/{child}/environ").read_text().split("\0")
        found = [each[11:] for each in variables if each.startswith("LOCAL_RANK=")]
        if found:
            ranks[int(found[0])] = int(child)
    return [ranks[rank] for rank in sorted(ranks)]


def test_heartbeats_that_nobody_hears_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text(
        "data: {paths: [data], seq_length: 8, micro_batch_size: 1, global_batch_size: 1}\n"
        "trainer: {max_steps: 1}\noptim: {lr: 1e-3}\nlog: {folder: run}\n"
        "transfer: {stage: align, init_from: hybrid, teacher: teacher}\n"
    )
    config = load_config(tmp_path / "run.yaml", ["strategy.heartbeat_seconds=90"])
    sentence = (
        "^strategy.heartbeat_seconds is 90, but ft_launcher of nvidia-resiliency-ext is not "
        "installed here: pip install nvidia-resiliency-ext; start the ranks with it"
    )
    with pytest.raises(UserError, match=sentence):
        check_heartbeat(config)
    (tmp_path / "nvidia_resiliency_ext-0.4.1.dist-info").mkdir()
    (tmp_path / "nvidia_resiliency_ext-0.4.1.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: nvidia-resiliency-ext\nVersion: 0.4.1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="resiliency-ext has not started this process; start the"):
        check_heartbeat(config)
    check_heartbeat(load_config(tmp_path / "run.yaml"))
