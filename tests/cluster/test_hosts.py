"""`examples/multinode/torchrun.sh` on two hosts: what died and comes back, unshared folders.

Catches: ranks that start anew and read the addresses of the dead, until both hosts wait for ever;
half a model on each host's own disk, and exit code 0; hosts whose own name is an address of none.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from kit.cluster import HERE, HOSTS, ROOT, call, kill_rank, until
from kit.lives import write_inputs

from megatron_hydra.api.status import status_of
from megatron_hydra.training.config import load_config

pytestmark = [pytest.mark.cluster]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


class Pair:
    """The script on both hosts, one rank each.

    Args:
        inputs: Of the run.
        folder: Its run folder; logs lie beside it.
        environment: Of the script.
        private: Whether the second host has a disk of its own there.
    """

    def __init__(
        self, inputs: Path, folder: Path, environment: dict[str, str], private: bool = False
    ) -> None:
        self.overrides = ["transfer.stage=align", f"log.folder={folder}"]
        self.overrides += ["trainer.max_steps=60", "resume.save_every_n_steps=10"]
        self.config = load_config(inputs / "run.yaml", self.overrides)
        self.logs = [folder.with_name(f"{folder.name}.{host}.log") for host in HOSTS]
        self.inputs, self.environment = inputs, environment
        own = {"PRIVATE": str(folder)} if private else {}
        self.processes = [self.start(0), self.start(1, **own)]

    def start(self, number: int, **own: str) -> subprocess.Popen[bytes]:
        """The same line again is the same run again."""
        return subprocess.Popen(
            [f"{HERE}/hosts.sh", "on", HOSTS[number], "timeout", "600",
             "examples/multinode/torchrun.sh", "--config", f"{self.inputs}/run.yaml",
             *self.overrides],
            cwd=ROOT, stdout=self.logs[number].open("a"), stderr=subprocess.STDOUT,
            env={**os.environ, "HEAD_NODE": HOSTS[0], "NUM_NODES": "2",
                 "GPUS_PER_NODE": "1", **self.environment, **own},
        )  # fmt: skip

    def codes(self) -> list[int]:
        return [process.wait(700) for process in self.processes]

    def said(self) -> str:
        return "".join(log.read_text(errors="replace") for log in self.logs)


def test_a_rank_that_died_comes_back_within_the_run(tmp_path: Path, inputs: Path) -> None:
    pair = Pair(inputs, tmp_path / "run", {"TORCHRUN_OPTIONS": "--max-restarts=2"})
    until(lambda: status_of(pair.config).saved_step >= 10, 300, "a checkpoint")
    kill_rank(HOSTS[1])
    assert pair.codes() == [0, 0], pair.said()[-4000:]
    assert "going on from" in pair.said() and status_of(pair.config).is_complete


def test_a_machine_that_died_comes_back_within_the_run(tmp_path: Path, inputs: Path) -> None:
    """The other one's torchrun lives on; the same line on the new machine joins it."""
    pair = Pair(inputs, tmp_path / "run", {"TORCHRUN_OPTIONS": "--max-restarts=2"})
    until(lambda: status_of(pair.config).saved_step >= 10, 300, "a checkpoint")
    call(f"{HERE}/hosts.sh", "crash", HOSTS[1])
    call(f"{HERE}/slurm.sh", "slurmd", HOSTS[1])  # for the tests that follow
    assert pair.processes[1].wait(60) != 0 and pair.processes[0].poll() is None
    pair.processes[1] = pair.start(1)
    assert pair.codes() == [0, 0], pair.said()[-4000:]
    assert "going on from" in pair.said() and status_of(pair.config).is_complete


def test_hosts_that_know_no_address_of_their_own_train_by_the_network_that_is_named(
    tmp_path: Path, inputs: Path
) -> None:
    """As the script's head says. Without it each would tell the other to call 127.0.1.1."""
    pair = Pair(inputs, tmp_path / "run", {"BARE": "1", "GLOO_SOCKET_IFNAME": "eth0"})
    assert pair.codes() == [0, 0], pair.said()[-4000:]
    assert status_of(pair.config).is_complete


def test_hosts_that_share_no_folder_end_with_one_sentence(tmp_path: Path, inputs: Path) -> None:
    pair = Pair(inputs, tmp_path / "run", {}, private=True)
    assert 0 not in pair.codes()
    sentence = (
        "is not one folder for all machines: rank 1 on node1 does not see what rank 0 on node0"
    )
    assert sentence in pair.said()
    assert not list((tmp_path / "run").glob("checkpoints/*"))
