"""AdamW and its learning-rate schedule for NeMo's loop on megatron-core 0.16."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any

import nemo.lightning as nl
import torch
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from nemo.core.optim import McoreDistributedOptimizer
from nemo.lightning.pytorch.optim import LRSchedulerModule

from megatron_hydra.model.fusion import HeadFusion
from megatron_hydra.model.gradients import shared_gradients_whole
from megatron_hydra.model.mixers.kinds import KINDS
from megatron_hydra.nemo.bad_numbers import NumberWatch
from megatron_hydra.nemo.stragglers import StragglerWatch
from megatron_hydra.training.config import OptimSection

# Tensors of one small vector per head: two-dimensional, but no matrices of the model.
_PER_HEAD_SUFFIXES = tuple(
    f".{name}"
    for names in (*(kind.head_tensors for kind in KINDS.values()), HeadFusion.own_parameters)
    for name in names
)


def skips_weight_decay(parameter: torch.nn.Parameter, name: str) -> bool:
    """Whether a parameter is a norm, a bias or a per-head vector, which are not decayed."""
    return parameter.dim() == 1 or name.endswith(_PER_HEAD_SUFFIXES)


def make_optimizer(
    section: OptimSection,
    max_steps: int,
    use_distributed_optimizer: bool,
    bf16: bool,
    watch: NumberWatch | None = None,
    stragglers: StragglerWatch | None = None,
) -> HydraOptimizerModule:
    """The optimizer and schedule of a run.

    Args:
        section: Learning rate, schedule and Adam's constants.
        max_steps: Length of the run, in optimizer steps.
        use_distributed_optimizer: Split optimizer state over data-parallel ranks.
        bf16: Train bfloat16 weights with float32 main copies in the optimizer.
        watch: Says which steps are skipped; None skips none.
        stragglers: Is told when a step's gradients are there.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,
        adam_beta1=section.beta1,
        adam_beta2=section.beta2,
        adam_eps=section.eps,
        clip_grad=section.clip_grad,
        use_distributed_optimizer=use_distributed_optimizer,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        barrier_with_L1_time=False,
    )
    module = HydraOptimizerModule(config, HydraScheduler(section, max_steps))
    # No arguments: NeMo stores those, and would store the model with them.
    module.watch, module.stragglers = watch, stragglers
    return module


class HydraOptimizerModule(nl.MegatronOptimizerModule):
    """Megatron's optimizer, made as megatron-core 0.16 wants it (NeMo 2.7 calls it as 0.15 did)."""

    watch: NumberWatch | None = None
    stragglers: StragglerWatch | None = None

    def finalize_model_grads(self, chunks: Any, *args: Any, **kwargs: Any) -> None:
        """Reduce the gradients over ranks; a bad one shows where it came from only before.

        With `overlap_grad_reduce` that has begun: bad ones show on all ranks that they are summed
        over.
        """
        if self.stragglers is not None:
            self.stragglers.when_computed()
        has_begun = chunks[0].ddp_config.overlap_grad_reduce
        if self.watch is not None and not has_begun:
            self.watch.look_at_gradients()
        with shared_gradients_whole(chunks):
            super().finalize_model_grads(chunks, *args, **kwargs)
        if self.watch is not None and has_begun:
            self.watch.look_at_gradients()

    def optimizers(self, model: Any) -> list[torch.optim.Optimizer]:
        """Make Megatron's optimizer for the DDP-wrapped chunks of a `MegatronParallel`."""
        predicate = ParamWithNamePredicate(name="skips_weight_decay", fn=skips_weight_decay)
        chunks = [chunk.module for chunk in model]
        optimizer = get_megatron_optimizer(
            self.config,
            chunks,
            config_overrides={ParamKey(with_name_predicate=predicate): {"wd_mult": 0.0}},
        )
        if self.watch is not None:
            self.watch.attach(chunks)
            optimizer = _WatchedOptimizer(optimizer.chained_optimizers, self.watch)
        for group in optimizer.param_groups:
            # Megatron's own scheduler, which NeMo does not use, would apply this.
            group["weight_decay"] = self.config.weight_decay * group["wd_mult"]
        for part in optimizer.chained_optimizers:
            _start_adam_state(part.optimizer)
            if isinstance(part, DistributedOptimizer):
                _match_places(part)
        return [HydraOptimizer(optimizer)]


class HydraOptimizer(McoreDistributedOptimizer):
    """NeMo's wrapper of Megatron's optimizer, whose distributed state is saved and loaded right.

    Megatron keeps one step count for all parameters, in the param groups. PyTorch's Adam has one
    per parameter, which Megatron then looks for among the loaded tensors, where none is, and makes
    one tensor of for all parameters, which would count every parameter's step.
    """

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What Megatron's checkpoints are to hold of this rank, or, loading, to be asked for."""
        with ExitStack() as stack:
            for part in self.mcore_optimizer.chained_optimizers:
                if isinstance(part, DistributedOptimizer):
                    stack.enter_context(_padding_left_out(part))
            return super().sharded_state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what Megatron's checkpoints hold; Adam gets a step count per parameter."""
        (part,) = self.mcore_optimizer.chained_optimizers  # more only with mixtures of experts
        if not isinstance(part, DistributedOptimizer) or not _is_pytorch_adam(part.optimizer):
            super().load_state_dict(state_dict)
            return
        groups_only = {key: value for key, value in state_dict.items() if key != "param_state"}
        super().load_state_dict(groups_only)
        adam = part.optimizer
        for parameter_state in adam.state.values():
            del parameter_state["step"]
        part.load_parameter_state_from_fully_reshardable(state_dict["param_state"])
        for group in adam.param_groups:
            for parameter in group["params"]:
                adam.state[parameter]["step"] = torch.tensor(float(group["step"]))


class _WatchedOptimizer(ChainedOptimizer):
    """Megatron's optimizer, which leaves weights and state alone where the watch finds a step bad.

    Args:
        chained_optimizers: As Megatron makes them.
        watch: Looks at every step.
    """

    def __init__(self, chained_optimizers: Sequence[MegatronOptimizer], watch: NumberWatch) -> None:
        super().__init__(list(chained_optimizers))
        self.watch = watch
        self._grad_norm = 0.0

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Whether the step is to be skipped, the same on every rank.

        Raises:
            UserError: If the run ends here.
        """
        has_overflow = super().prepare_grads()
        self._grad_norm = super().get_grad_norm()
        return self.watch.finds_bad(self._grad_norm) or has_overflow

    def get_grad_norm(self) -> float:
        """Of the prepared gradients, before clipping; Megatron asks right after preparing them."""
        return self._grad_norm


class HydraScheduler(LRSchedulerModule):
    """Linear warm-up, then a cosine down to the least rate, or a constant rate.

    Args:
        section: Rates, schedule and warm-up.
        max_steps: Step at which the cosine ends.
    """

    def __init__(self, section: OptimSection, max_steps: int) -> None:
        super().__init__()
        self.section = section
        self.max_steps = max_steps

    def scheduler(self, model: Any, optimizers: Any) -> dict[str, Any]:
        """Lightning's description of the schedule."""
        section, max_steps = self.section, self.max_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizers, lambda step: section.learning_rate(step, max_steps) / (section.lr or 1.0)
        )
        return {
            "optimizer": optimizers,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 1},
        }


@contextmanager
def _padding_left_out(optimizer: DistributedOptimizer) -> Iterator[None]:
    """Let the gradient buffers say where parameters lie when buckets stand without padding.

    So Megatron lays the state out to be saved, but it then cuts out each parameter's part at the
    place with padding. Wrong are those behind a padded bucket; tied embeddings, which have a
    bucket of their own on pipeline stages, are in one or have one behind them.
    """
    kept = [buffer.param_index_map for buffer in optimizer.buffers]
    for buffer in optimizer.buffers:
        padding = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
        before = list(accumulate(padding, initial=0))
        buffer.param_index_map = {
            parameter: (start - before[bucket], end - before[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, param_index_map in zip(optimizer.buffers, kept, strict=True):
            buffer.param_index_map = param_index_map


def _match_places(optimizer: DistributedOptimizer) -> None:
    """Say where the optimizer holds each parameter, which its checkpoints go by.

    Megatron counts places in the order of the gradient buffers, but then puts a group's float32
    parameters before those of lower precision. In a group that has both, one parameter would get
    the state of another.
    """
    groups = zip(optimizer.model_fp32_groups, optimizer.model_float16_groups, strict=True)
    for group_index, (float32, float16) in enumerate(groups):
        for place, parameter in enumerate([*float32, *float16]):
            optimizer.model_param_group_index_map[parameter] = (group_index, place)


def _is_pytorch_adam(optimizer: Any) -> bool:
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def _start_adam_state(optimizer: Any) -> None:
    """Give PyTorch's Adam the state of step 0.

    Megatron makes this state itself when it loads a checkpoint into a fresh optimizer, but
    without `step`, which PyTorch's Adam has and Transformer Engine's has not; loading then fails.
    """
    if not _is_pytorch_adam(optimizer):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
