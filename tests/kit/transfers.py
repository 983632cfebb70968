"""`megatron-hydra transfer` with its steps' commands replaced, for tests of which steps run.

A stand-in writes a file of everything it was given, so that an output differs exactly if what it is
made of does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hydra_tools import cli, transfer

from megatron_hydra.files import content_hash
from megatron_hydra.training.run_files import HEADER

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/quickstart/transfer.yaml"
TEACHER = ROOT / "examples/quickstart/teacher"
STEPS = ("convert_teacher", "score", "plan", "convert", "stage1_align", "stage2_distill",
         "stage3_long_context", "export", "evaluate", "report")  # fmt: skip
STAGES = STEPS[4:7]


def command_stand_in(ran: list[str], fails_at: str = "") -> Callable[..., int]:
    """A runner of commands that notes them and writes what they would, of what they read."""

    def run(self: object, command: Sequence[str]) -> int:
        pairs = [word.lstrip("-").split("=", 1) for word in command if "=" in word]
        given = dict(pairs)
        train = "log.folder" in given
        out = Path(
            json.loads(given.get("log.folder") or given.get("run.out") or "0") or given["out"]
        )
        ran.append(out.name)
        if out.name == fails_at:
            out.parent.mkdir(exist_ok=True)
            if train:
                write_text(out / "metrics.jsonl", '{"step": 1, "time": 0}\n')
                write_text(out / "run_config.yaml", HEADER)
            return 137
        read = [value.split("=")[-1].strip('[]"') for _, value in pairs]
        endings = ("", ".bin", "/weights/__0_0.distcp", "/model.safetensors")
        made_of = [Path(f"{place}{ending}") for place in read for ending in endings]
        content = content_hash([path for path in made_of if path.is_file()])
        content += " ".join(word for word in command if not word.startswith("--overwrite"))
        if not train and out.suffix:
            assert "--overwrite" in command or not out.exists()
            write_text(out, content)
            return 0
        if "export" in command:
            write_text(out / "model.safetensors", content)
            for name in ("config.json", "tokenizer.json"):
                write_text(out / name, "{}")
            return 0
        model = out / "hybrid" if train else out
        steps = int(given.get("trainer.max_steps", 0))
        write_text(
            model / "model.json", json.dumps({"provenance": {"stage": "", "max_steps": steps}})
        )
        write_text(model / "weights/__0_0.distcp", content)
        if not train:
            write_text(model / "config.json", "{}")
        write_text(model / "tokenizer/tokenizer.json", "{}")
        write_text(out / "metrics.jsonl", '{"step": 1, "time": 0}\n')
        return 0

    return run


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def command_of(folder: Path, *more: str) -> list[str]:
    shrunk = [f"{stage}.trainer.max_steps=2" for stage in STAGES]
    data = [f"{stage}.data.paths=[{folder}/data]" for stage in STAGES]
    own = [f"run.folder={folder}/run", f"run.teacher={folder}/teacher", "run.launcher=null"]
    return ["transfer", "--config", str(EXAMPLE), *own, *shrunk, *data, *more]


def steps_run(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str, fails_at: str = ""
) -> list[str]:
    """The steps that a command runs, by their outputs' names."""
    ran: list[str] = []
    monkeypatch.setattr(transfer._Child, "run", command_stand_in(ran, fails_at))
    assert cli.main(command_of(folder, *more)) == (137 if fails_at else 0)
    return ran


def environment() -> dict[str, str]:
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tools"))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
