"""The fastest layout of a run: every one that is legal, by predicted time, until one fits.

Searched are tensor-, pipeline- and context-parallel sizes, the micro-batch, how many layers are
recomputed, and how many of the GPUs are used: where a batch is small, more are not faster. Tensor
parallelism stays within a node. Pipelines, of which neither time nor memory has been measured, are
taken only where nothing else fits. What a step is stays as the configuration has it: batch, length,
precision, losses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.parallel_sizes import divisors
from megatron_hydra.selection.cost import Device
from megatron_hydra.selection.shape import ModelShape
from megatron_hydra.training.config import RunConfig
from megatron_hydra.training.config_checks import check, check_model, check_ranks
from megatron_hydra.training.memory import TrainingMemory, counted_stage, memory_of_run
from megatron_hydra.training.needle_rounds import NeedleRounds
from megatron_hydra.training.step_time import Layout, StepTime, Work, needle_seconds, step_time

_RECOMPUTED_QUARTERS = range(5)  # of a pipeline stage's layers


@dataclass(frozen=True)
class LaidOut:
    """A run at a layout.

    Attributes:
        config: With the layout.
        layout: It.
        time: Of a step.
        needle_seconds: Of all rounds of questions about needles; 0 without.
        validation_seconds: Of all measurements of the loss on validation data; 0 without.
        memory: Of the GPU that needs most; None where the formula does not reach.
        why_no_memory: Then says why.
    """

    config: RunConfig
    layout: Layout
    time: StepTime
    needle_seconds: float
    validation_seconds: float
    memory: TrainingMemory | None
    why_no_memory: str = ""

    @property
    def seconds(self) -> float:
        """Of the whole stage."""
        steps = self.time.seconds * self.config.trainer.max_steps
        return steps + self.needle_seconds + self.validation_seconds


@dataclass(frozen=True)
class Cluster:
    """What a run is to be laid out on.

    Attributes:
        device: Each GPU.
        num_gpus: In all.
        gpus_per_node: In each node.
    """

    device: Device
    num_gpus: int
    gpus_per_node: int = 8


def as_written(config: RunConfig, shape: ModelShape, plan: HeadPlan, cluster: Cluster) -> LaidOut:
    """The run at the layout of its configuration, on all GPUs.

    Raises:
        UserError: If the layout does not fit the model or the GPUs.
    """
    check_model(config, shape.parallel_sizes)
    check_ranks(config, cluster.num_gpus)
    layout = _layout(config, shape, cluster.num_gpus)
    memory, why = memory_of_run(config, shape, plan, cluster.num_gpus)
    return _laid_out(config, shape, plan, cluster, layout, memory, why)


def fastest(
    config: RunConfig, shape: ModelShape, plan: HeadPlan, cluster: Cluster
) -> LaidOut | None:
    """The run at the legal layout that is predicted to be the fastest of those that fit.

    Of layouts of equal time it is the one of the fewest GPUs, then of the smallest parallel sizes
    and the least recomputation. None if none fits, or the memory is not known.

    Args:
        config: Of the run.
        shape: The teacher's.
        plan: The hybrid's.
        cluster: Of whose GPUs a divisor may be used.
    """
    if memory_of_run(config, shape, plan, config.strategy.model_parallel_size)[0] is None:
        return None
    pipelines = [size for size in shape.parallel_sizes.pipeline if size > 1]
    layouts = (_by_time(config, shape, plan, cluster, sizes) for sizes in ([1], pipelines))
    for layout in itertools.chain.from_iterable(layouts):
        changed = with_layout(config, layout)
        try:
            check(changed)
            check_model(changed, shape.parallel_sizes)
            check_ranks(changed, layout.num_gpus)
        except UserError:
            continue
        memory, _ = memory_of_run(changed, shape, plan, layout.num_gpus)
        if memory is not None and memory.peak <= cluster.device.memory_bytes:
            return _laid_out(changed, shape, plan, cluster, layout, memory)
    return None


def with_layout(config: RunConfig, layout: Layout) -> RunConfig:
    """The configuration with another layout; GPUs in all are the launch line's."""
    strategy = config.strategy
    is_same = (layout.tensor, layout.context) == (
        strategy.tensor_model_parallel_size,
        strategy.context_parallel_size,
    )
    recomputed = layout.recomputed_layers // layout.pipeline
    return replace(
        config,
        data=replace(config.data, micro_batch_size=layout.micro_batch),
        transfer=replace(config.transfer),
        model=replace(
            config.model,
            recompute="full" if recomputed else "none",
            recompute_layers=recomputed or None,
        ),
        strategy=replace(
            strategy,
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            context_parallel_size=layout.context,
            sequence_parallel=layout.tensor > 1,
            use_distributed_optimizer=True,
            # Exchanging heads asks for divisible numbers; the ring does not.
            cp_comm_type=strategy.cp_comm_type if is_same else None,
        ),
    )


def _layout(config: RunConfig, shape: ModelShape, num_gpus: int) -> Layout:
    strategy, model = config.strategy, config.model
    pipeline = strategy.pipeline_model_parallel_size
    layers = shape.num_layers // pipeline
    recomputed = min(model.recompute_layers or layers, layers) if model.recompute == "full" else 0
    return Layout(
        tensor=strategy.tensor_model_parallel_size,
        pipeline=pipeline,
        context=strategy.context_parallel_size,
        data=num_gpus // strategy.model_parallel_size,
        micro_batch=config.data.micro_batch_size,
        recomputed_layers=recomputed * pipeline,
        cuda_graphs=model.cuda_graphs,
    )


def _laid_out(
    config: RunConfig,
    shape: ModelShape,
    plan: HeadPlan,
    cluster: Cluster,
    layout: Layout,
    memory: TrainingMemory | None,
    why_no_memory: str = "",
) -> LaidOut:
    work = Work.of(shape, plan, counted_stage(config), config.data.seq_length)
    batch = config.data.global_batch_size
    time = step_time(work, batch, layout, cluster.device, cluster.gpus_per_node)
    needles, rounds = 0.0, NeedleRounds.of(config, layout.num_gpus)
    if rounds is not None:
        of_round, *of_teacher = (
            needle_seconds(shape, asked, rounds, layout, cluster.device)
            for asked in rounds.plans(plan)
        )
        needles = rounds.num_rounds * of_round + sum(of_teacher)
    validation, trainer = 0.0, config.trainer
    if every := trainer.validate_every_n_steps:
        per_replica = trainer.validation_steps * batch // (layout.micro_batch * layout.data)
        once = time.forward_seconds * (per_replica + layout.pipeline - 1)
        validation = -(-trainer.max_steps // every) * once
    return LaidOut(config, layout, time, needles, validation, memory, why_no_memory)


def _by_time(
    config: RunConfig,
    shape: ModelShape,
    plan: HeadPlan,
    cluster: Cluster,
    pipelines: Sequence[int],
) -> Iterator[Layout]:
    """Layouts with pipelines of these sizes, the fastest first; some of them are not legal."""
    work = Work.of(shape, plan, counted_stage(config), config.data.seq_length)
    batch = config.data.global_batch_size

    def order(layout: Layout) -> tuple[float, ...]:
        time = step_time(work, batch, layout, cluster.device, cluster.gpus_per_node)
        parallel = layout.tensor * layout.pipeline * layout.context
        recomputed, micro_batch = layout.recomputed_layers, layout.micro_batch
        return (round(time.seconds, 9), layout.num_gpus, parallel, recomputed, micro_batch)

    yield from sorted(_layouts(config, shape, cluster, pipelines), key=order)


def _layouts(
    config: RunConfig, shape: ModelShape, cluster: Cluster, pipelines: Sequence[int]
) -> Iterator[Layout]:
    """All whose numbers divide one another."""
    batch, length = config.data.global_batch_size, config.data.seq_length
    tensors = [size for size in shape.parallel_sizes.tensor if size <= cluster.gpus_per_node]
    for used in divisors(cluster.num_gpus):
        for tensor, pipeline in itertools.product(tensors, pipelines):
            ranks, rest = divmod(used, tensor * pipeline)
            for data in divisors(0 if rest else math.gcd(ranks, batch)):
                context = ranks // data
                if length % context:
                    continue
                for micro_batch in divisors(batch // data):
                    yield from _recomputations(
                        Layout(
                            tensor, pipeline, context, data, micro_batch,
                            cuda_graphs=config.model.cuda_graphs,
                        ),
                        shape.num_layers // pipeline,
                    )  # fmt: skip


def _recomputations(layout: Layout, layers_per_stage: int) -> Iterator[Layout]:
    numbers = {layers_per_stage * quarter // 4 for quarter in _RECOMPUTED_QUARTERS}
    for number in numbers:
        yield replace(layout, recomputed_layers=number * layout.pipeline)
