"""`estimate`: what stages of a transfer take of GPUs, before any is taken; imports nothing slow."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_hydra.api.dry_run import read_model
from megatron_hydra.errors import UserError
from megatron_hydra.files import check_output, write_json
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.provenance import origin
from megatron_hydra.selection.cost import find_device, weight_bytes
from megatron_hydra.selection.policy import read_shape
from megatron_hydra.selection.shape import ModelShape, even_plan, whole_layers
from megatron_hydra.teachers.config_json import read_config, shape_fields
from megatron_hydra.training.config import RunConfig
from megatron_hydra.training.layout_search import Cluster, LaidOut, as_written, fastest
from megatron_hydra.training.run_inputs import checkpoint_bytes, result_bytes
from megatron_hydra.training.step_time import ERRORS_PERCENT, NETWORK_BYTES_PER_S

GPUS_PER_NODE = 8
CONTEXTS = tuple(1024 * 2**n for n in range(2, 10))  # 4K to 512K
MOST_GPUS = 65_536
_STORED_BYTES = 4  # of a value in what `convert` writes without `--dtype bfloat16`


@dataclass(frozen=True)
class Model:
    """A hybrid, there or not yet.

    Attributes:
        shape: The teacher's.
        plan: The head plan.
    """

    shape: ModelShape
    plan: HeadPlan

    @classmethod
    def of_teacher(
        cls,
        teacher: str | Path,
        plan: str | Path | None = None,
        fa_fraction: float | None = None,
        window_fraction: float = 0.0,
        la_heads: Mapping[str, Any] = MappingProxyType({}),
    ) -> Model:
        """A hybrid that is not converted yet.

        Args:
            teacher: Hugging Face folder, its config.json under any name, or checkpoint folder; no
                weights are read.
            plan: A head plan's file.
            fa_fraction: In place of a plan: the share of heads that keep full attention, which are
                then spread evenly.
            window_fraction: Beside `fa_fraction`: the share that become sliding windows.
            la_heads: What `convert` is told of the others, by the options' names.

        Raises:
            UserError: If neither or both a plan and a fraction are given, a fraction or an option
                is not allowed, or something cannot be read.
        """
        if (plan is None) == (fa_fraction is None):
            raise UserError(
                "a teacher needs either a head plan or a fraction of FA heads, not both"
            )
        if (Path(teacher) / "model.json").is_file():
            shape = ModelShape.from_fields(read_model(str(teacher), "teacher", "the teacher"))
        else:
            shape = ModelShape.from_fields(shape_fields(read_config(teacher)))
        shape = replace(shape, **la_heads)
        if plan is None:
            assert fa_fraction is not None
            return cls(shape, even_plan(shape, fa_fraction, window_fraction))
        found = HeadPlan.load(plan)
        found.check_teacher(shape.num_layers, shape.num_heads, shape.num_query_groups, "")
        planned = read_shape(found)
        if planned is not None:
            shape = replace(shape, **{**planned.la_heads, **la_heads})
        return cls(shape, found)


@dataclass(frozen=True)
class LayoutEstimate:
    """A stage at a layout; times are predicted.

    Attributes:
        num_gpus: That it uses.
        tensor_parallel: Ranks.
        pipeline_parallel: Stages of the pipeline.
        context_parallel: Ranks.
        data_parallel: Replicas.
        micro_batch: Sequences.
        recomputed_layers: Of all.
        memory_bytes: Of the GPU that needs most; None where the formula does not reach.
        why_no_memory: Then says why.
        fits: In the GPU's memory; None where it is not known.
        step_seconds: Of a step.
        waits_for_processor: Whether Python launches kernels more slowly than the GPU runs them.
        tokens_per_second: Of all GPUs.
        hours: Of the stage, the two that follow counted in.
        needle_hours: Of questions about needles; 0 without.
        validation_hours: Of the loss on validation data; 0 without.
        gpu_hours: Of all GPUs that it uses.
        cost: By the price, if there is one.
        overrides: That give the configuration this layout; empty where it has it.
    """

    num_gpus: int
    tensor_parallel: int
    pipeline_parallel: int
    context_parallel: int
    data_parallel: int
    micro_batch: int
    recomputed_layers: int
    memory_bytes: float | None
    why_no_memory: str
    fits: bool | None
    step_seconds: float
    waits_for_processor: bool
    tokens_per_second: float
    hours: float
    needle_hours: float
    validation_hours: float
    gpu_hours: float
    cost: float | None
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class StageEstimate:
    """A stage.

    Attributes:
        stage: As `transfer.stage`.
        folder: Of the run.
        num_steps: Steps.
        num_tokens: Trained on in all.
        fa_heads: That keep full attention, of `total_heads`.
        total_heads: All.
        as_written: At the configuration's layout, on all GPUs; None where that is not possible.
        why_not_as_written: Then says why.
        fastest: The fastest legal layout that fits; None if there is none.
        checkpoint_bytes: Of one checkpoint, at the least.
        disk_bytes: Of the trained hybrid, the checkpoints that are kept and one being written.
    """

    stage: str
    folder: str
    num_steps: int
    num_tokens: int
    fa_heads: int
    total_heads: int
    as_written: LayoutEstimate | None
    why_not_as_written: str
    fastest: LayoutEstimate | None
    checkpoint_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What stages take.

    Attributes:
        device: Key of :data:`~megatron_hydra.selection.cost.DEVICES`.
        num_gpus: There are.
        gpus_per_node: In each node.
        price_per_gpu_hour: If given.
        stages: In their order.
        errors_percent: Of the times, against measured steps that they are not calibrated by.
        network_bytes_per_s: Assumed of each GPU, to other nodes.
    """

    device: str
    num_gpus: int
    gpus_per_node: int
    price_per_gpu_hour: float | None
    stages: tuple[StageEstimate, ...]
    errors_percent: dict[str, int]
    network_bytes_per_s: float

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write it as JSON."""
        check_output(path, overwrite, "file")
        data = {"schema_version": 1, "kind": "estimate", **asdict(self), "provenance": origin()}
        write_json(path, data, overwrite)


def estimate(
    configs: Sequence[RunConfig],
    gpu: str,
    num_gpus: int,
    num_nodes: int | None = None,
    price_per_gpu_hour: float | None = None,
    model: Model | None = None,
) -> Estimate:
    """Predict memory, time, disk and cost of stages, at their layouts and at the fastest.

    Nothing is written, no data set is looked at.

    Args:
        configs: The stages, one after the other.
        gpu: Key of :data:`~megatron_hydra.selection.cost.DEVICES`.
        num_gpus: In all.
        num_nodes: That share them equally; None puts 8 in each.
        price_per_gpu_hour: In any currency.
        model: That all stages train; None reads it from each stage's `transfer.init_from`, or takes
            that of the earlier stage which is to write it.

    Raises:
        UserError: If a GPU is not known, numbers make no sense, or a model is not there.
    """
    cluster = Cluster(find_device(gpu), num_gpus, _gpus_per_node(num_gpus, num_nodes))
    if price_per_gpu_hour is not None and not 0 <= price_per_gpu_hour < float("inf"):
        raise UserError(f"the price per hour is {price_per_gpu_hour}; it must be 0 or more")
    written: dict[Path, Model] = {}
    stages = []
    for config in configs:
        found = model or _stored_model(config, written)
        written[config.folder / "hybrid"] = found
        stages.append(_stage(config, found, cluster, price_per_gpu_hour))
    return Estimate(
        device=gpu,
        num_gpus=num_gpus,
        gpus_per_node=cluster.gpus_per_node,
        price_per_gpu_hour=price_per_gpu_hour,
        stages=tuple(stages),
        errors_percent=dict(ERRORS_PERCENT),
        network_bytes_per_s=NETWORK_BYTES_PER_S,
    )


@dataclass(frozen=True)
class ContextHours:
    """What a number of tokens takes in sequences of one length, at the fastest layout that fits.

    Attributes:
        context_tokens: Of a sequence.
        gpu_hours: By kind of model: `full attention`; `layer-wise`, whole layers of full attention,
            as near as can be to as many heads; `head-level`, the plan's. None where no layout is
            known to fit.
    """

    context_tokens: int
    gpu_hours: dict[str, float | None]


def by_context(
    configs: Sequence[RunConfig],
    gpu: str,
    num_gpus: int,
    num_nodes: int | None = None,
    model: Model | None = None,
    lengths: Sequence[int] = CONTEXTS,
) -> tuple[ContextHours, ...]:
    """Predict what all stages' tokens take at other contexts, trained as the last stage trains.

    A step keeps its number of tokens: longer sequences are fewer, at the least one. Arguments and
    errors are those of :func:`estimate`; `lengths` are tokens of a sequence.
    """
    cluster = Cluster(find_device(gpu), num_gpus, _gpus_per_node(num_gpus, num_nodes))
    last = configs[-1]
    model = model or _stored_model(configs[0], {})
    shape, plan = model.shape, model.plan
    fraction = plan.num_fa_heads / shape.total_heads
    plans = {
        "full attention": even_plan(shape, 1.0),
        "layer-wise": whole_layers(shape, fraction),
        "head-level": plan,
    }
    num_tokens = sum(config.trainer.max_steps * _step_tokens(config) for config in configs)
    found = []
    for length in lengths:
        batch = max(1, _step_tokens(last) // length)
        steps = math.ceil(num_tokens / (batch * length))
        data = replace(last.data, seq_length=length, global_batch_size=batch)
        config = replace(last, data=data, trainer=replace(last.trainer, max_steps=steps))
        hours: dict[str, float | None] = {}
        for name, each in plans.items():
            run = fastest(config, shape, each, cluster)
            hours[name] = run and _layout(run, config, cluster, None).gpu_hours
        found.append(ContextHours(length, hours))
    return tuple(found)


def _gpus_per_node(num_gpus: int, num_nodes: int | None) -> int:
    if not 1 <= num_gpus <= MOST_GPUS:
        raise UserError(f"the number of GPUs is {num_gpus}; allowed: 1 to {MOST_GPUS}")
    if num_nodes is None:
        return min(num_gpus, GPUS_PER_NODE)
    if num_nodes < 1 or num_gpus % num_nodes:
        raise UserError(f"{num_gpus} GPUs are not divisible by {num_nodes} nodes")
    return num_gpus // num_nodes


def _stored_model(config: RunConfig, written: dict[Path, Model]) -> Model:
    folder = Path(config.transfer.init_from)
    if not (folder / "model.json").is_file():
        if folder in written:
            return written[folder]
        raise UserError(
            f"transfer.init_from {folder} is no checkpoint folder yet: name the teacher and a head "
            "plan or a fraction of FA heads (--teacher with --plan or --fa-fraction)"
        )
    shape = ModelShape.from_fields(read_model(str(folder), "hybrid", "transfer.init_from"))
    return Model(shape, HeadPlan.load(folder / "plan.json"))


def _stage(config: RunConfig, model: Model, cluster: Cluster, price: float | None) -> StageEstimate:
    shape, plan = model.shape, model.plan
    why_not, written = "", None
    try:
        written = as_written(config, shape, plan, cluster)
    except UserError as error:
        why_not = str(error)
    found = fastest(config, shape, plan, cluster)
    checkpoint, disk = _disk(config, model)
    return StageEstimate(
        stage=config.transfer.stage,
        folder=config.log.folder,
        num_steps=config.trainer.max_steps,
        num_tokens=config.trainer.max_steps * _step_tokens(config),
        fa_heads=plan.num_fa_heads,
        total_heads=shape.total_heads,
        as_written=None if written is None else _layout(written, config, cluster, price),
        why_not_as_written=why_not,
        fastest=None if found is None else _layout(found, config, cluster, price),
        checkpoint_bytes=checkpoint,
        disk_bytes=disk,
    )


def _step_tokens(config: RunConfig) -> int:
    return config.data.global_batch_size * config.data.seq_length


def _layout(
    run: LaidOut, written: RunConfig, cluster: Cluster, price: float | None
) -> LayoutEstimate:
    layout, seconds, memory = run.layout, run.time.seconds, run.memory
    hours = run.seconds / 3600
    gpu_hours = hours * layout.num_gpus
    return LayoutEstimate(
        num_gpus=layout.num_gpus,
        tensor_parallel=layout.tensor,
        pipeline_parallel=layout.pipeline,
        context_parallel=layout.context,
        data_parallel=layout.data,
        micro_batch=layout.micro_batch,
        recomputed_layers=layout.recomputed_layers,
        memory_bytes=None if memory is None else memory.peak,
        why_no_memory=run.why_no_memory,
        fits=None if memory is None else memory.peak <= cluster.device.memory_bytes,
        step_seconds=seconds,
        waits_for_processor=run.time.waits_for_processor,
        tokens_per_second=_step_tokens(run.config) / seconds,
        hours=hours,
        needle_hours=run.needle_seconds / 3600,
        validation_hours=run.validation_seconds / 3600,
        gpu_hours=gpu_hours,
        cost=None if price is None else gpu_hours * price,
        overrides=_overrides(written, run.config),
    )


def _overrides(written: RunConfig, changed: RunConfig) -> tuple[str, ...]:
    """What makes one configuration the other, layout by layout."""
    found = []
    for section in ("strategy", "data", "model"):
        old, new = getattr(written, section), getattr(changed, section)
        for item in fields(new):
            value = getattr(new, item.name)
            if value != getattr(old, item.name):
                found.append(f"{section}.{item.name}={json.dumps(value).strip(chr(34))}")
    return tuple(found)


def _disk(config: RunConfig, model: Model) -> tuple[int, int]:
    """Bytes of a checkpoint, and of all that a run has on the disk at a time."""
    hybrid, checkpoint = result_bytes(config)
    if not hybrid:
        num_parameters = int(weight_bytes(model.shape, "bf16").of(model.plan) / 2)
        hybrid = num_parameters * _STORED_BYTES
        checkpoint = checkpoint_bytes(config, num_parameters)
    num_saves = config.trainer.max_steps // config.resume.save_every_n_steps
    return checkpoint, hybrid + min(config.resume.keep + 1, num_saves) * checkpoint
