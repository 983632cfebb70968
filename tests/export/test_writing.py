"""How the folder is written: whole or not at all though it is killed, and in little memory.

Catches: a folder cut off by `kill -9` that something takes for a model, another end after it than
without it, weights that are held in memory twice.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from hydra_tools import cli  # noqa: E402
from kit import forks  # noqa: E402
from kit.tiny_models import PLAN_OF_KINDS, write_models  # noqa: E402
from kit.tiny_qwen3 import write_tiny_qwen3  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from megatron_hydra.head_plan import HeadPlan  # noqa: E402

KILLED_EXPORT = """
import os, signal, sys
from pathlib import Path

place, *arguments = sys.argv[1:]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def watch(event, details):
    written = {"open": 0, "os.rename": 1}.get(event)
    if written is not None and isinstance(details[written], str | os.PathLike):
        is_read = event == "open" and details[1] in ("r", "rb")
        if Path(details[written]).name == place and not is_read:
            die()

from hydra_tools import cli
from megatron_hydra.cpu import install_if_needed

install_if_needed()
from megatron_hydra.export import shards

def half(tensors, path, **options):
    whole(tensors, path, **options)
    if path.name == "part-1.safetensors":
        os.truncate(path, path.stat().st_size // 2)
        die()

whole = shards.save_file
if place == "half a file":
    shards.save_file = half
else:
    sys.addaudithook(watch)
sys.exit(cli.main(arguments))
"""
PLACES = ["plan.json", "README.md", "half a file", "model-00002-of-00018.safetensors",
          "model.safetensors.index.json"]  # fmt: skip
"""What is about to be written, or given its name, when the kill comes."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Checkpoint `hybrid`, and `hf`, exported of it undisturbed."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, PLAN_OF_KINDS)
    assert cli.main([*_export(folder), f"{folder}/hf"]) == 0
    return folder


def _export(models: Path) -> list[str]:
    return ["export", "--model", f"{models}/hybrid", "--max-shard-gb", "1e-5", "--out"]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _kill(place: str, arguments: list[str], folder: Path) -> None:
    (folder / "killed.py").write_text(KILLED_EXPORT)
    program = [f"{folder}/killed.py", place, *arguments]
    code = forks.start(program, dict(os.environ), folder / "log").wait(600)
    assert code == -9, (folder / "log").read_text()
    for name in ("killed.py", "log"):
        (folder / name).unlink()


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_export_is_no_model_and_the_next_ends_as_if_nothing_had_been(
    models, tmp_path, capsys, place
):
    assert place in [*_files(models / "hf"), "half a file"]
    command = [*_export(models), f"{tmp_path}/hf"]
    _kill(place, command, tmp_path)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".hf.") and left.name.endswith(".partial")
    # By a name that nothing could stumble over.
    shutil.copytree(left, tmp_path / "copy")
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "copy", trust_remote_code=True)
    back = ["convert", "--hybrid", f"{tmp_path}/copy", "--out", f"{tmp_path}/back"]
    assert cli.main(back) == 2 and not (tmp_path / "back").exists()
    assert cli.main(command) == 0
    assert _files(tmp_path / "hf") == _files(models / "hf")
    capsys.readouterr()
    assert cli.main(command) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.endswith(f"output {tmp_path}/hf exists: name another, or pass --overwrite")
    assert _files(tmp_path / "hf") == _files(models / "hf")


@pytest.mark.parametrize("place", ["half a file", "hf"])
def test_a_killed_export_over_an_earlier_one_leaves_that_whole(models, tmp_path, place):
    """`hf`: when the earlier folder has been put aside, and the new one is not in its place yet."""
    assert cli.main([*_export(models), f"{tmp_path}/hf", "--dtype", "bfloat16"]) == 0
    earlier = _files(tmp_path / "hf")
    command = [*_export(models), f"{tmp_path}/hf", "--overwrite"]
    _kill(place, command, tmp_path)
    (old,) = tmp_path.glob(".hf.*.old") if place == "hf" else [tmp_path / "hf"]
    assert _files(old) == earlier != _files(models / "hf")
    assert (tmp_path / "hf").exists() == (place != "hf")
    assert cli.main(command) == 0
    assert _files(tmp_path / "hf") == _files(models / "hf")


MEASURED_EXPORT = """
import json, sys
from pathlib import Path

from hydra_tools import cli
from megatron_hydra.cpu import install_if_needed

install_if_needed()
import megatron_hydra.api.export
from megatron_hydra.export import folder, shards, weights
from megatron_hydra.parallel import initialize_model_parallel
from megatron_hydra.teachers import checkpoint, conversion

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(key)]
    return int(line.split()[1]) * 1024

def start():
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    return resident("VmRSS")

def write(*arguments):
    whole.append(resident("VmHWM"))
    before = start()
    done = write_shards(*arguments)
    added.append(resident("VmHWM") - before)
    return done

whole, added, write_shards, shards.write_shards = [], [], shards.write_shards, write
initialize_model_parallel()
before = start()
assert cli.main(sys.argv[1:]) == 0
whole.append(resident("VmHWM"))
print(json.dumps({"whole": max(whole) - before, "writing": added[0]}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A hybrid of 44 MB, in float32; the embedding has 8.4 MB."""
    folder = tmp_path_factory.mktemp("large")
    fields = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    write_tiny_qwen3(folder / "qwen3", **fields, vocab_size=8192, head_dim=64)
    HeadPlan.from_fa_heads({i: [i % 4] for i in range(8)}, 8, 4, 2).save(folder / "plan.json")
    convert = ["convert", "--teacher", f"{folder}/qwen3", "--plan", f"{folder}/plan.json"]
    convert += ["--calibration-tokens", "256", "--out", f"{folder}/hybrid"]
    assert cli.main(convert) == 0
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' /proc")
def test_memory_holds_a_file_of_weights_beside_the_model(large, tmp_path):
    """In a process that gives freed memory back, as its peak tells nothing otherwise."""
    found = {}
    for size in ("0.004", "5"):
        out = tmp_path / size
        export = ["export", "--model", f"{large}/hybrid", "--max-shard-gb", size, "--out", str(out)]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", MEASURED_EXPORT, *export],
            env={**os.environ, "PYTHONPATH": ":".join(sys.path), "MALLOC_MMAP_THRESHOLD_": "65536"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found[size] = json.loads(done.stdout.splitlines()[-1])
    files = sorted((tmp_path / "0.004").glob("*.safetensors"))
    weights, largest = sum(file.stat().st_size for file in files), 8192 * 256 * 4
    assert len(files) > 8 and weights > 40e6
    assert found["0.004"]["writing"] < largest + 4e6
    # Loading holds what is read beside the model; lazy imports come on top.
    assert found["0.004"]["whole"] < 2.2 * weights
    assert found["5"]["writing"] > 0.8 * weights, "the measurement does not see what is held"
