"""Conversion in memory for one layer and the largest tensor, there, back, and of a teacher.

Catches: weights that are held whole, or twice; a limit on memory, as batch systems set, that a
model's size decides instead of a layer's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kit.tiny_qwen3 import write_tiny_qwen3
from transformers import Qwen3ForCausalLM

from megatron_hydra.head_plan import HeadPlan

LAYERS, MB = 10, 10**6
SIZES = {
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 128,
    "vocab_size": 8192,
}
MEASURED = """
import gc, json, resource, sys, threading, time

from hydra_tools import cli
from megatron_hydra.cpu import install_if_needed

install_if_needed()
limit, *commands = json.loads(sys.argv[1])

def kept(key):
    lines = open("/proc/self/status").read().splitlines()
    (line,) = [line for line in lines if line.startswith(key)]
    return int(line.split()[1]) * 1024

def watch():
    while True:
        highest[-1] = max(highest[-1], kept("RssAnon"))
        time.sleep(0.002)

found, highest = [], [0]
threading.Thread(target=watch, daemon=True).start()
for small, command in commands:
    # What a first run loads, and keeps, is not the model's.
    assert cli.main(small) == 0
    gc.collect()
    before = kept("RssAnon")
    most = kept("VmData") + limit
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))
    highest.append(before)
    assert cli.main(command) == 0
    found.append(highest[-1] - before)
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
print(json.dumps(found))
"""


def _teacher(folder: Path, **sizes: int) -> None:
    write_tiny_qwen3(folder / "qwen3", **{**SIZES, **sizes})
    model = Qwen3ForCausalLM.from_pretrained(folder / "qwen3", dtype=torch.float32)
    (folder / "qwen3/model.safetensors").unlink()
    model.save_pretrained(folder / "qwen3", max_shard_size="25MB")
    layers = model.config.num_hidden_layers
    fa_heads = {index: [index % 6] for index in range(layers)}
    HeadPlan.from_fa_heads(fa_heads, layers, 6, 3).save(folder / "plan.json")


def _commands(folder: Path) -> list[list[str]]:
    teacher, hybrid = ["--teacher", f"{folder}/qwen3"], f"{folder}/hybrid"
    plan = ["--plan", f"{folder}/plan.json", "--calibration-tokens", "256"]
    files = ["--max-shard-gb", "0.025"]
    return [
        ["convert", *teacher, "--out", f"{folder}/teacher"],
        ["convert", *teacher, *plan, "--calibration-length", "128", "--out", hybrid],
        ["export", "--model", hybrid, *files, "--out", f"{folder}/hf"],
        ["export", "--model", f"{folder}/teacher", *files, "--out", f"{folder}/teacher_hf"],
        ["convert", "--hybrid", f"{folder}/hf", "--out", f"{folder}/back"],
    ]


@pytest.mark.exhaustive  # five commands on 400 MB each, in a process of its own
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' /proc")
def test_a_model_larger_than_the_memory_is_converted(tmp_path: Path) -> None:
    _teacher(tmp_path / "large")
    _teacher(tmp_path / "small", num_hidden_layers=1, hidden_size=64, intermediate_size=64)
    commands = zip(_commands(tmp_path / "small"), _commands(tmp_path / "large"), strict=True)
    # The kernel counts mapped source files too: of a layer's, three of 25 MB.
    limit = 150 * MB
    # A process of its own, which gives freed memory back: what it keeps would hide a later peak.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURED, json.dumps([limit, *commands])],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path), "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    def size(name: str) -> int:
        return sum(path.stat().st_size for path in (tmp_path / "large" / name).rglob("*"))

    embedding = SIZES["vocab_size"] * SIZES["hidden_size"] * 4
    for number, name in enumerate(("teacher", "hybrid", "hf", "teacher_hf", "back")):
        layer = (size(name) - embedding) / LAYERS
        assert size(name) > 2 * limit
        # What a run on 256 tokens takes, and Python, come on top.
        most = layer + embedding + 8 * MB
        assert found[number] < most, (name, found[number] / MB, most / MB)
