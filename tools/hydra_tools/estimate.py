"""``megatron-hydra estimate``: what stages take of GPUs, before any is taken."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hydra_tools.on_plans import read_ratio
from megatron_hydra.api.estimate import (
    ContextHours,
    Estimate,
    LayoutEstimate,
    Model,
    StageEstimate,
    by_context,
    estimate,
)
from megatron_hydra.errors import UserError
from megatron_hydra.evaluation.results import align
from megatron_hydra.files import check_output, check_outputs
from megatron_hydra.selection.cost import DEVICES, find_device
from megatron_hydra.training.config import load_config, overrides_of_stage
from megatron_hydra.training.step_time import ERRORS_PERCENT

_HEADINGS = [
    "layout", "GPUs", "TP", "PP", "CP", "micro-batch", "recomputed", "GiB", "step s", "tokens/s",
    "hours", "GPU-hours",
]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "--config",
        required=True,
        nargs="+",
        metavar="YAML",
        help="the stages, in their order",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="[STAGE.]section.key=value",
        help="for all stages, or for the one whose file is STAGE.yaml",
    )
    parser.add_argument("--gpu", required=True, help=f"one of {', '.join(DEVICES)}")
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="in all")
    parser.add_argument(
        "--nodes", type=int, metavar="N", help="that share them equally (default: 8 GPUs in each)"
    )
    parser.add_argument(
        "--price-per-hour", type=float, metavar="X", help="of one GPU, in any currency"
    )
    parser.add_argument(
        "--teacher",
        metavar="DIR_OR_CONFIG",
        help="the teacher's folder or config.json, where nothing is converted yet",
    )
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument("--plan", help="with --teacher: the head plan")
    heads.add_argument(
        "--fa-fraction",
        type=read_ratio,
        metavar="R",
        help="with --teacher, in place of a plan: the share of FA heads, as 1/4 or 0.25",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="PNG",
        help="draw what all tokens take at contexts of 4K to 512K: full attention, whole layers "
        "of it, single heads of it",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def run(args: argparse.Namespace) -> int:
    """Estimate; print; write."""
    # `--config` takes all words that follow it.
    configs = [word for word in args.config if "=" not in word]
    overrides = [word for word in args.config if "=" in word] + args.overrides
    stages = {Path(path).stem for path in configs}
    if args.teacher is None and (args.plan or args.fa_fraction is not None):
        raise UserError("--plan and --fa-fraction say what is made of a --teacher: name it")
    check_outputs([args.json, args.picture], [Path(path) for path in configs])
    if args.picture:
        check_output(args.picture, args.overwrite, "file")
    model = None
    if args.teacher is not None:
        fraction = None if args.fa_fraction is None else float(args.fa_fraction)
        model = Model.of_teacher(args.teacher, args.plan, fraction)
    runs = [
        load_config(path, overrides_of_stage(Path(path).stem, stages, overrides))
        for path in configs
    ]
    found = estimate(runs, args.gpu, args.gpus, args.nodes, args.price_per_hour, model)
    if args.json:
        found.save(args.json, args.overwrite)
    print("\n".join(_lines(found)))
    if args.picture:
        print(_draw(found, by_context(runs, args.gpu, args.gpus, args.nodes, model), args))
    return 0


def _draw(found: Estimate, points: Sequence[ContextHours], args: argparse.Namespace) -> str:
    """Draw, and say what."""
    from megatron_hydra.report.chart_style import chart_style, save_png
    from megatron_hydra.report.charts import draw_gpu_hours

    lines = {name: [point.gpu_hours[name] for point in points] for name in points[0].gpu_hours}
    device, billions = find_device(found.device), sum(x.num_tokens for x in found.stages) / 1e9
    title = f"{billions:,.3g} billion tokens on {found.num_gpus:,} x {device.name}"
    with chart_style():
        figure = draw_gpu_hours(lines, [point.context_tokens for point in points], title)
        save_png(args.picture, figure, args.overwrite)
    return f"\npicture: {args.picture}"


def _lines(found: Estimate) -> list[str]:
    device = find_device(found.device)
    num_nodes = found.num_gpus // found.gpus_per_node
    lines = [
        f"{found.num_gpus:,} x {device.name} ({device.memory_bytes / 1e9:.0f} GB), "
        f"{found.gpus_per_node} in each of {num_nodes:,} node{'s' * (num_nodes > 1)}"
    ]
    for stage in found.stages:
        lines += ["", *_stage_lines(stage, found.price_per_gpu_hour is not None)]
    if len(found.stages) > 1:
        lines += ["", *_totals(found)]
    errors = "; ".join(f"{what}: {percent}%" for what, percent in ERRORS_PERCENT.items())
    return [
        *lines,
        "",
        "Times are predicted from rates that were measured with random weights of Qwen3-1.7B's "
        "shape, one sequence per step. Against measured steps that they are not calibrated by, "
        f"they were off by at most: {errors}.",
        "Never measured: more than two GPUs, replicas, pipelines, several sequences or "
        "micro-batches per step, other shapes. Assumed: "
        f"{found.network_bytes_per_s / 1e9:.0f} GB/s of each GPU to other nodes, no exchange "
        "hidden behind computation.",
        "FP8 counts as bf16, which needs less memory. Memory leaves out CUDA's context, NCCL and "
        "CUDA graphs. Data, checkpoints and the compilation of kernels take time besides.",
    ]


def _stage_lines(stage: StageEstimate, has_price: bool) -> list[str]:
    rows = [_HEADINGS + ["cost"] * has_price]
    for name, layout in (("as written", stage.as_written), ("fastest", stage.fastest)):
        if layout is not None:
            rows.append(_row(name, layout))
    lines = [
        f"{stage.folder}: {stage.stage}, {stage.num_steps:,} steps, {stage.num_tokens:,} tokens, "
        f"{stage.fa_heads} of {stage.total_heads} heads FA",
        *(f"  {line}" for line in align(rows)),
    ]
    if stage.as_written is None:
        lines.append(f"  not as written: {stage.why_not_as_written}")
    elif stage.as_written.memory_bytes is None:
        lines.append(f"  memory not predicted: {stage.as_written.why_no_memory}")
    elif not stage.as_written.fits:
        lines.append("  as written it does not fit into the GPU's memory")
    if stage.fastest is None:
        lines.append("  no legal layout is known to fit")
    elif stage.fastest.overrides:
        lines.append(f"  fastest: {' '.join(stage.fastest.overrides)}")
    layouts = [each for each in (stage.as_written, stage.fastest) if each is not None]
    if any(layout.waits_for_processor for layout in layouts):
        lines.append(
            "  * waits for the processor, which launches kernels more slowly than they run"
        )
    for title, hours in (
        ("needles", [layout.needle_hours for layout in layouts]),
        ("validation", [layout.validation_hours for layout in layouts]),
    ):
        if any(hours):
            said = " and ".join(f"{each:.3g}" for each in hours)
            lines.append(f"  {title}: {said} of the hours, predicted and never measured")
    lines.append(
        f"  disk: {stage.disk_bytes / 2**30:,.3g} GiB for the checkpoints that are kept "
        f"({stage.checkpoint_bytes / 2**30:,.3g} each), one being written, and the trained hybrid"
    )
    return lines


def _row(name: str, layout: LayoutEstimate) -> list[str]:
    memory = "?" if layout.memory_bytes is None else f"{layout.memory_bytes / 2**30:.1f}"
    cells = [
        name + " *" * layout.waits_for_processor,
        f"{layout.num_gpus:,}",
        str(layout.tensor_parallel),
        str(layout.pipeline_parallel),
        str(layout.context_parallel),
        str(layout.micro_batch),
        str(layout.recomputed_layers),
        memory,
        f"{layout.step_seconds:.3g}",
        f"{layout.tokens_per_second:,.0f}",
        f"{layout.hours:,.3g}",
        f"{layout.gpu_hours:,.3g}",
    ]
    return cells if layout.cost is None else [*cells, f"{layout.cost:,.2f}"]


def _totals(found: Estimate) -> list[str]:
    lines = []
    for name in ("as_written", "fastest"):
        layouts = [getattr(stage, name) for stage in found.stages]
        words = name.replace("_", " ")
        if None in layouts:
            lines.append(f"all stages, {words}: not known, as one has no such layout")
            continue
        line = (
            f"all stages, {words}: {sum(x.hours for x in layouts):,.3g} hours, "
            f"{sum(x.gpu_hours for x in layouts):,.3g} GPU-hours"
        )
        if found.price_per_gpu_hour is not None:
            line += f", {sum(x.cost for x in layouts):,.2f} in all"
        lines.append(line)
    return lines
