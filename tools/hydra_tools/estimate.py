"""``megatron-hydra estimate``: what stages take of GPUs, before any is taken."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from hydra_tools.on_plans import read_ratio
from hydra_tools.transfer_steps import Step, is_transfer, load_steps
from megatron_hydra.api.estimate import (
    GPUS_PER_NODE,
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
from megatron_hydra.selection.shape import LAHeads
from megatron_hydra.training.config import RunConfig, load_config, overrides_of_stage
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
        help="a transfer.yaml, or the stages in their order",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="[STAGE.]section.key=value",
        help="for all stages, or for the one whose file is STAGE.yaml; of a transfer.yaml, what "
        "`transfer` takes",
    )
    parser.add_argument("--gpu", required=True, help=f"one of {', '.join(DEVICES)}")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help=f"in all (default: {GPUS_PER_NODE} in each node)"
    )
    parser.add_argument(
        "--nodes",
        type=int,
        metavar="N",
        help=f"that share them equally (default: {GPUS_PER_NODE} GPUs in each)",
    )
    parser.add_argument(
        "--price-per-hour", type=float, metavar="X", help="of one GPU, in any currency"
    )
    parser.add_argument(
        "--teacher",
        metavar="DIR_OR_CONFIG",
        help="the teacher's folder or config.json, where nothing is converted yet (default: a "
        "transfer.yaml's)",
    )
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument("--plan", help="with a teacher: the head plan")
    heads.add_argument(
        "--fa-fraction",
        type=read_ratio,
        metavar="R",
        help="with a teacher, in place of a plan: the share of FA heads, as 1/4 or 0.25 (default: "
        "a transfer.yaml's plan.fa_ratio)",
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
    check_outputs([args.json, args.picture], [Path(path) for path in configs])
    if args.picture:
        check_output(args.picture, args.overwrite, "file")
    if args.gpus is None and args.nodes is None:
        raise UserError(f"how many? --gpus N in all, or --nodes N of {GPUS_PER_NODE} GPUs each")
    num_gpus = GPUS_PER_NODE * args.nodes if args.gpus is None else args.gpus
    if len(configs) == 1 and is_transfer(configs[0]):
        runs, model = _transfer(configs[0], overrides, args)
    else:
        runs, model = _stages(configs, overrides, args)
    found = estimate(runs, args.gpu, num_gpus, args.nodes, args.price_per_hour, model)
    if args.json:
        found.save(args.json, args.overwrite)
    print("\n".join(_lines(found)))
    if args.picture:
        print(_draw(found, by_context(runs, args.gpu, num_gpus, args.nodes, model), args))
    return 0


def _stages(
    configs: Sequence[str], overrides: Sequence[str], args: argparse.Namespace
) -> tuple[list[RunConfig], Model | None]:
    """The stages of those files, and the model that is made of the named teacher."""
    if args.teacher is None and (args.plan or args.fa_fraction is not None):
        raise UserError("--plan and --fa-fraction say what is made of a --teacher: name it")
    model = None
    if args.teacher is not None:
        model = Model.of_teacher(args.teacher, args.plan, _number(args.fa_fraction))
    stages = {Path(path).stem for path in configs}
    runs = [
        load_config(path, overrides_of_stage(Path(path).stem, stages, overrides))
        for path in configs
    ]
    return runs, model


def _transfer(
    path: str, overrides: Sequence[str], args: argparse.Namespace
) -> tuple[list[RunConfig], Model | None]:
    """A transfer's stages, and its hybrid: the one that it has converted, or the one to be."""
    section, steps = load_steps(path, overrides)
    runs = [step.run for step in steps if step.run is not None]
    told = (args.teacher, args.plan, args.fa_fraction)
    if told == (None, None, None) and Path(runs[0].transfer.init_from, "model.json").is_file():
        return runs, None
    teacher, plan, fraction = args.teacher or section.teacher, args.plan, args.fa_fraction
    if not Path(teacher).exists():
        published = Path(path).with_name("teacher.json")
        if args.teacher or not published.is_file():
            raise UserError(f"no teacher {teacher} is there: its config.json is enough (--teacher)")
        print(f"run.teacher {teacher} is not there: its shape is taken from {published}\n")
        teacher = str(published)
    planning, converting = (
        next(step for step in steps if step.name == name) for name in ("plan", "convert")
    )
    la_heads = _la_heads(converting)
    if plan is None and planning.output.is_file() and fraction is None:
        plan = planning.output
    if plan is not None:
        model = Model.of_teacher(teacher, plan, _number(fraction), la_heads=la_heads)
        return runs, model
    if fraction is None:
        if (ratio := _told(planning, "fa_ratio")) is None:
            raise UserError(f"{path} has no plan.fa_ratio: name a --plan or --fa-fraction")
        fraction = read_ratio(str(ratio))
    windows = read_ratio(str(_told(planning, "window_ratio") or 0))
    la_heads = {**_la_heads(planning), **la_heads}
    return runs, Model.of_teacher(teacher, None, float(fraction), float(windows), la_heads)


def _la_heads(step: Step) -> dict[str, Any]:
    """What a step is told of the heads without full attention."""
    told = {item.name: _told(step, f"model.{item.name}") for item in fields(LAHeads)}
    return {name: value for name, value in told.items() if value is not None}


def _told(step: Step, key: str) -> Any:
    """An option of a transfer's step; None where it has none."""
    return json.loads(step.settings.get(f"{step.name}.{key}", "null"))


def _number(ratio: Fraction | None) -> float | None:
    return None if ratio is None else float(ratio)


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
