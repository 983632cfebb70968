"""Trains some steps at each layout of several GPUs, by the command that users have, and tabulates.

    python tools/benchmarks/layouts.py --gpus 8 --out runs/benchmarks/layouts
    python tools/benchmarks/layouts.py --gpus 2 --out DIR --trial    # CPU ranks, a tiny model

Qwen3-1.7B's shape with random weights and an uneven plan (`uneven_plan`), in the settings of
`examples/qwen3_1p7b`, everything recomputed. What a layout leaves of the GPUs are replicas. A run
ends, by a signal that cannot be caught, once it has logged `--steps`; rates are medians of all but
the first two. `predicted GiB` is what `train --dry-run` says; `peak GiB` is of the rank that takes
most.
A row is kept as it comes: the same command goes on where it was, and `--seconds` ends it in time.

Last come the three stages after one another, 20 steps each, as `chain`: the second is killed with
-9 after its checkpoint of step 10 and started again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from hydra_kernels.measure import print_table
from qwen3_1p7b import HEADS, LAYERS, VOCAB
from uneven_plan import uneven_plan

from megatron_hydra.files import versions, write_json
from megatron_hydra.head_plan import HeadPlan

ROOT = Path(__file__).parents[2]
STAGES = ("distill", "long_context")
KIND, SCHEMA_VERSION = "megatron_hydra.layouts_benchmark", 1
CHAIN_STEPS, KILLED_AFTER = 20, 10


@dataclass(frozen=True)
class Layout:
    """A row: sizes, and tokens of a sequence."""

    stage: str
    gpus: int
    tp: int
    cp: int
    pp: int
    tokens: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.stage}_{self.gpus}_tp{self.tp}_cp{self.cp}_pp{self.pp}_{self.tokens}"

    @property
    def replicas(self) -> int:
        """Data-parallel size."""
        return self.gpus // (self.tp * self.cp * self.pp)

    @property
    def micro_batches(self) -> int:
        """Of a step and replica: with pipeline stages enough that most are at work."""
        return 4 * self.pp if self.pp > 1 else 1

    def overrides(self) -> list[str]:
        """What differs from the stage's YAML."""
        return [
            f"strategy.tensor_model_parallel_size={self.tp}",
            f"strategy.pipeline_model_parallel_size={self.pp}",
            f"strategy.context_parallel_size={self.cp}",
            f"strategy.sequence_parallel={str(self.tp > 1).lower()}",
            f"data.seq_length={self.tokens}", "data.micro_batch_size=1",
            f"data.global_batch_size={self.replicas * self.micro_batches}",
        ]  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is trained.

    Attributes:
        examples: Folder of the stages' YAML files.
        lengths: Tokens of short, long and very long sequences.
        overrides: Of all runs.
    """

    examples: Path
    lengths: tuple[int, int, int]
    overrides: tuple[str, ...]


REAL = Setting(
    ROOT / "examples/qwen3_1p7b", (16384, 131072, 524288),
    ("model.recompute=full", "strategy.use_distributed_optimizer=true"),
)  # fmt: skip
TRIAL = Setting(ROOT / "examples/quickstart", (64, 128, 256), ())


def layouts(gpus: int, lengths: Sequence[int]) -> Iterator[Layout]:
    """What is measured, the most telling first."""
    sizes = [size for size in (2, 4, 8) if size <= gpus]
    short, long, longest = lengths
    for stage in STAGES:
        yield from (Layout(stage, size, 1, 1, 1, short) for size in (1, *sizes))
        yield from (Layout(stage, gpus, size, 1, 1, short) for size in sizes)
        yield from (Layout(stage, gpus, 1, 1, size, short) for size in sizes if size < 8)
    for tokens in (long, longest):
        yield from (Layout(stage, gpus, 1, size, 1, tokens) for stage in STAGES for size in sizes)


def main() -> int:
    """Measure what is left, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--gpus", type=int, default=8, help="of this machine: 2, 4 or 8")
    parser.add_argument("--out", type=Path, required=True, help="folder, of rows and of all runs")
    parser.add_argument("--steps", type=int, default=8, help="3 or more")
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing after so many")
    parser.add_argument(
        "--patience", type=float, default=240, help="seconds until a run has failed"
    )
    parser.add_argument("--trial", action="store_true", help="CPU ranks and a tiny model")
    args = parser.parse_args()
    if args.gpus not in (2, 4, 8) or args.steps < 3:
        parser.error("--gpus must be 2, 4 or 8 and --steps 3 or more")
    end = time.monotonic() + args.seconds
    setting = TRIAL if args.trial else REAL
    if args.trial:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args.out.mkdir(parents=True, exist_ok=True)
    write_inputs(args.out / "inputs", args.trial)
    asked = list(layouts(args.gpus, setting.lengths))
    rows = []
    for layout in asked:
        path = args.out / f"{layout.name}.json"
        if not path.exists() and time.monotonic() < end:
            write_json(path, measure(layout, setting, args))
        if path.exists():
            rows.append(json.loads(path.read_text(encoding="utf-8")))
            print_table(rows[-1:])
    chain = args.out / "chain.json"
    if not chain.exists() and len(rows) == len(asked) and time.monotonic() < end:
        write_json(chain, run_chain(setting, args))
    heading = {"kind": KIND, "schema_version": SCHEMA_VERSION, "versions": versions()}
    found = json.loads(chain.read_text(encoding="utf-8")) if chain.exists() else None
    heading |= {"command": " ".join(sys.argv), "rows": rows, "chain": found}
    write_json(args.out / "layouts.json", heading, overwrite=True)
    print()
    print_table(rows)
    print(f"chain: {found}")
    left = len(asked) - len(rows) + (found is None)
    if left:
        print(f"{left} of {len(asked) + 1} are left: the same command goes on")
    else:
        draw(rows, args.out / "layouts.png")
    return int(any(row["failed"] for row in rows) or bool(found and found["failed"]))


def write_inputs(folder: Path, is_trial: bool) -> None:
    """`teacher`, `hybrid` and `data`, where they are not there yet."""
    import numpy as np

    from megatron_hydra import cpu

    cpu.install_if_needed()
    from scoring import write_random_teacher

    from megatron_hydra.training.indexed_dataset import write_indexed_dataset

    source = ROOT / "examples/quickstart/teacher"
    if is_trial:
        heads = {0: (0,), 1: (0, 1, 2), 2: (1, 2, 4, 5, 6), 3: ()}
        plan, vocabulary, num_tokens = HeadPlan.from_fa_heads(heads, 4, 8, 4), 1024, 2**14
    else:
        source = folder / "source"
        plan, vocabulary = uneven_plan(LAYERS * HEADS // 4), VOCAB
        num_tokens = 2**22
        write_random_teacher(source, "qwen3_1p7b")
    if not (folder / "plan.json").exists():
        plan.save(folder / "plan.json")
    if not (folder / "data.idx").exists():
        tokens = np.random.default_rng(0).integers(vocabulary, size=num_tokens)
        write_indexed_dataset(folder / "data", [tokens.tolist()], vocabulary, {})
    for name, planned in (("teacher", []), ("hybrid", ["--plan", f"{folder}/plan.json"])):
        if not (folder / name).exists():
            words = ["--teacher", str(source), *planned, "--calibration-tokens", "0"]
            words += ["--dtype", "float32" if is_trial else "bfloat16", "--out", f"{folder}/{name}"]
            subprocess.run([sys.executable, "-m", "hydra_tools.cli", "convert", *words], check=True)


def measure(layout: Layout, setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """A row."""
    folder = args.out / "runs" / layout.name
    words = train_words(layout.stage, setting, args.out, folder, args.steps + 1)
    words += layout.overrides()
    started = time.monotonic()
    lines, failed = train_until(words, layout.gpus, folder, args.steps, args.patience)
    used = lines[2:]
    row = asdict(layout) | {
        "replicas": layout.replicas, "micro batches": layout.micro_batches, "steps": len(used),
        "tokens/s per GPU": _median(used, "tokens_per_s", 1 / layout.gpus),
        "MFU": _median(used, "mfu"),
        "peak GiB": max((line.get("peak_memory_gib", 0) for line in lines), default=0) or None,
        "predicted GiB": predicted_gib(words, layout.gpus), "seconds": time.monotonic() - started,
        "failed": failed,
    }  # fmt: skip
    return row


def train_words(
    stage: str, setting: Setting, out: Path, folder: Path, steps: int, init_from: Path | None = None
) -> list[str]:
    """The YAML file and overrides of a run."""
    number = 1 + ("align", "distill", "long_context").index(stage)
    words = [str(setting.examples / f"stage{number}_{stage}.yaml"), *setting.overrides]
    words += [f"data.paths=[{out}/inputs/data]", f"log.folder={folder}", "log.every_n_steps=1"]
    words += [f"transfer.init_from={init_from or out / 'inputs/hybrid'}"]
    words += [f"transfer.teacher={out}/inputs/teacher"] if stage != "long_context" else []
    return [*words, f"trainer.max_steps={steps}", "optim.warmup_steps=2"]


def train_until(
    words: Sequence[str], ranks: int, folder: Path, steps: int, patience: float
) -> tuple[list[dict[str, Any]], str]:
    """Train until so many steps are logged, then kill it.

    Returns:
        A line for each logged step, and why it failed; empty where it did not.
    """
    metrics, log = folder / "metrics.jsonl", folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["-m", "hydra_tools.train", "--config", *words]
    end = time.monotonic() + patience
    with log.open("ab") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
        while process.poll() is None and time.monotonic() < end:
            if len(logged(metrics)) >= steps:
                break
            time.sleep(0.2)
        has_ended = process.poll() is not None
        if not has_ended:
            # Ranks first: one whose torchrun dies still saves what it has.
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()
    lines = logged(metrics)
    if len(lines) >= steps or (has_ended and not process.returncode):
        return lines, ""
    if not has_ended:
        return lines, f"{len(lines)} steps in {patience:.0f} s"
    return lines, log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]


def logged(metrics: Path) -> list[dict[str, Any]]:
    """A line for each step of a run's log: of one that ran again its last, none half written."""
    if not metrics.exists():
        return []
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]
    by_step = {line["step"]: line for line in map(json.loads, lines) if "tokens_per_s" in line}
    return [by_step[step] for step in sorted(by_step)]


def predicted_gib(words: Sequence[str], gpus: int) -> float | None:
    """Of the GPU that needs most; None where it is not known."""
    from megatron_hydra.selection.shape import ModelShape
    from megatron_hydra.teachers.model_folder import peek_metadata
    from megatron_hydra.training.config import load_config
    from megatron_hydra.training.memory import memory_of_run

    config = load_config(words[0], words[1:])
    hybrid = Path(config.transfer.init_from)
    shape = ModelShape.from_fields(peek_metadata(hybrid)["config"])
    memory, _ = memory_of_run(config, shape, HeadPlan.load(hybrid / "plan.json"), gpus)
    return None if memory is None else memory.peak / 2**30


def run_chain(setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """The three stages from one another; the second is killed on its way."""
    layout = Layout("align", args.gpus, 1, 1, 1, setting.lengths[0])
    found: dict[str, Any] = {"failed": ""}
    previous = None
    for stage in ("align", *STAGES):
        folder = args.out / "chain" / stage
        words = train_words(stage, setting, args.out, folder, CHAIN_STEPS, previous)
        words += [*layout.overrides(), f"resume.save_every_n_steps={KILLED_AFTER}"]
        if stage == "distill":
            lines, failed = train_until(words, args.gpus, folder, KILLED_AFTER + 3, args.patience)
            found |= {"killed after": len(lines), "failed": found["failed"] or failed}
        # More steps than it has: it ends by itself.
        lines, failed = train_until(words, args.gpus, folder, CHAIN_STEPS + 1, 2 * args.patience)
        steps = [line["step"] for line in lines]
        if not failed and steps[-1] != CHAIN_STEPS:
            failed = f"{stage} ended at step {steps[-1]}"
        if stage == "distill":
            log = folder.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
            found["went on from"] = [
                int(step) for step in re.findall(r"going on from .*step_(\d+)", log)
            ]
            if found["went on from"] != [KILLED_AFTER]:
                failed = failed or f"went on from {found['went on from']}"
        found[stage] = {"first loss": lines[0]["loss"], "last loss": lines[-1]["loss"]}
        found["failed"] = found["failed"] or failed
        previous = folder / "hybrid"
        if failed:
            break
    return found


def _median(lines: Sequence[dict[str, Any]], key: str, factor: float = 1.0) -> float | None:
    values = [line[key] for line in lines if key in line]
    return factor * median(values) if values else None


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Weak scaling of replicas, and the rates of all layouts of all GPUs."""
    from matplotlib.figure import Figure

    from megatron_hydra.report.chart_style import PALETTE, chart_style, save_png
    from megatron_hydra.report.units import format_length

    with chart_style():
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
        for colour, stage in zip(PALETTE, STAGES, strict=False):
            of_stage = [row for row in rows if row["stage"] == stage and row["tokens/s per GPU"]]
            alone = [row for row in of_stage if row["replicas"] == row["gpus"]]
            rates = [row["tokens/s per GPU"] for row in alone]
            left.plot([row["gpus"] for row in alone], rates, "o-", color=colour, label=stage)
            most = max(row["gpus"] for row in rows)
            whole = [row for row in of_stage if row["gpus"] == most]
            names = [
                f"TP {r['tp']} CP {r['cp']} PP {r['pp']}, {format_length(r['tokens'])}"
                for r in whole
            ]
            right.plot([row["tokens/s per GPU"] for row in whole], names, "o", color=colour)
        left.set_xscale("log", base=2)
        left.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        left.set_ylim(bottom=0)
        left.set_xlabel("GPUs, one replica per GPU")
        left.set_ylabel("tokens/s per GPU")
        left.legend()
        right.set_xscale("log")
        right.set_xlabel("tokens/s per GPU")
        save_png(path, figure, overwrite=True)


if __name__ == "__main__":
    sys.exit(main())
