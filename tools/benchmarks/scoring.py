"""Times the real `megatron-hydra score`, from its start to the written file, on a random teacher.

    python tools/benchmarks/scoring.py --out scoring.json probes.pairs=8
    python tools/benchmarks/scoring.py --config examples/qwen3_1p7b/score.yaml
    python tools/benchmarks/scoring.py probes.length=32768 probes.pairs=1 probes.names=[text]

A folder of Qwen3-1.7B's shape is written, of random weights in bf16 and with the quickstart's
tokenizer; the verb runs in a process of its own. A random model tells no pair apart and has no
heads that matter, so that two things are set: every pair is kept, and each round of senders has
`--targets` targets more, evenly spread over all layers, as many as the paper found. The time
depends on the targets' number and layers, and on no value.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from head_patch import PRESETS

from megatron_hydra import cpu
from megatron_hydra.files import versions, write_json

_NUM_TARGETS = 29  # of the paper's 448 heads
_VERB = "--run-verb"  # how this file starts itself
_TOKENIZER = Path(__file__).parents[2] / "examples/quickstart/teacher"
_LONGEST = 40960  # tokens that the folder says it is built for, as Qwen3-1.7B does


def main() -> int:
    """Write the teacher, run the verb, print and write the times."""
    if sys.argv[1:2] == [_VERB]:
        return _run_verb(int(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="qwen3_1p7b")
    parser.add_argument("--num-layers", type=int, help="fewer than the preset's")
    parser.add_argument("--targets", type=int, default=_NUM_TARGETS, help="more of them per round")
    parser.add_argument("--folder", type=Path, help="keeps the teacher; used again if it is there")
    parser.add_argument("--out", type=Path, help="JSON file of the times")
    parser.add_argument("--config", help="the verb's")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="the verb's")
    args = parser.parse_args()
    words = ["--config", args.config] if args.config else []
    words += ["model.dtype=bf16", *args.overrides]
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch) / "teacher"
        written_s = _seconds(lambda: write_random_teacher(folder, args.preset, args.num_layers))
        out = Path(scratch) / "scores.json"
        figures = {"teacher_written_s": written_s, **run(folder, out, args.targets, words)}
    print(json.dumps(figures, indent=1))
    if args.out:
        command = " ".join(sys.argv)
        write_json(args.out, {**figures, "versions": versions(), "command": command}, True)
    return 0


def run(folder: Path, out: Path, num_targets: int, words: Sequence[str]) -> dict[str, Any]:
    """The verb on a teacher: seconds of the whole process and of its parts, GiB."""
    command = [sys.executable, __file__, _VERB, str(num_targets)]
    command += ["--teacher", str(folder), "--out", str(out), *words]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    whole_s = time.perf_counter() - start
    print(done.stdout)
    (times,) = (line for line in done.stdout.splitlines() if line.startswith("model "))
    parts = {name: float(value) for name, value in re.findall(r"([\w.]+) ([\d.]+) s\b", times)}
    peaks = re.findall(r"(predicted peak|peak) ([\d.]+) GiB", done.stdout)
    return {
        "whole_s": whole_s,
        "started_s": whole_s - sum(parts.values()),
        "parts_s": parts,
        "gib": {name: float(value) for name, value in peaks},
    }


def write_random_teacher(folder: Path, preset: str, num_layers: int | None = None) -> None:
    """Write a Hugging Face Qwen3 folder of random weights in bf16, unless it is there."""
    import torch
    from safetensors.torch import save_file

    from megatron_hydra.teachers.config_json import FIELDS, LATER_FIELDS
    from megatron_hydra.teachers.conversion import expected_shapes

    if (folder / "model.safetensors").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shape = {**LATER_FIELDS, **PRESETS[preset], "share_embeddings_and_output_weights": True}
    shape["num_layers"] = num_layers or shape["num_layers"]
    config = {name: shape[field] for name, field in FIELDS.items() if field in shape}
    config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu"}
    config |= {"max_position_embeddings": _LONGEST, "eos_token_id": 0, "dtype": "bfloat16"}
    write_json(folder / "config.json", config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = {}
    for name, size in expected_shapes(SimpleNamespace(**shape)).items():
        tensor = torch.ones(size, dtype=torch.bfloat16, device=device)
        if len(size) == 2:
            tensor.normal_(std=size[1] ** -0.5)
        elif "_norm" in name:
            tensor.fill_(3.0)  # heads look at few tokens, so that every pair's runs differ
        tensors[name] = tensor.cpu()
    if device == "cuda":
        torch.cuda.empty_cache()  # the verb's process has the device to itself
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(_TOKENIZER / name, folder)


def _run_verb(num_targets: int, words: Sequence[str]) -> int:
    """`megatron-hydra score`, with every pair kept and so many targets per round."""
    cpu.install_if_needed()
    from hydra_tools.cli import main as run_command

    from megatron_hydra.selection.scorers import path_patching
    from megatron_hydra.selection.scoring_run import ScoringRun

    measure_gaps, rounds = ScoringRun._measure_gaps, iter(range(100))

    def keep_every_pair(scoring: ScoringRun) -> dict[str, Any]:
        scoring.min_gap = dict.fromkeys(scoring.min_gap, -float("inf"))
        # Also where the readout, in 16 bits, does not change or falls.
        return {
            name: replace(record, gaps=tuple(abs(gap) or 1.0 for gap in record.gaps))
            for name, record in measure_gaps(scoring).items()
        }

    def spread(effects: Any, least: float) -> set[tuple[int, int]]:
        num_layers, num_heads = next(iter(effects)).shape[1:]
        step, shift = num_layers * num_heads / num_targets, 5 * next(rounds)
        places = [(int(i * step) + shift) % (num_layers * num_heads) for i in range(num_targets)]
        return {divmod(place, num_heads) for place in places}

    ScoringRun._measure_gaps = keep_every_pair  # type: ignore[method-assign]
    path_patching._heads_above = spread
    return run_command(["score", *words])


def _seconds(function: Any) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
