"""AdamW and its learning-rate schedule for NeMo's loop on megatron-core 0.16."""

from __future__ import annotations

from collections.abc import Sequence
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
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from nemo.core.optim import McoreDistributedOptimizer
from nemo.lightning.pytorch.optim import LRSchedulerModule

from megatron_hydra.nemo.bad_numbers import NumberWatch
from megatron_hydra.nemo.config import OptimSection

# Tensors of one small vector a head: two-dimensional, but no matrices of the model.
_PER_HEAD_SUFFIXES = (".conv_weight", ".A_log", ".dt_bias", ".head_scale", ".gate_weight")


def skips_weight_decay(parameter: torch.nn.Parameter, name: str) -> bool:
    """Whether a parameter is a norm, a bias or a per-head vector, which are not decayed."""
    return parameter.dim() == 1 or name.endswith(_PER_HEAD_SUFFIXES)


def make_optimizer(
    section: OptimSection,
    max_steps: int,
    use_distributed_optimizer: bool,
    bf16: bool,
    watch: NumberWatch,
) -> HydraOptimizerModule:
    """The optimizer and schedule of a run.

    Args:
        section: Learning rate, schedule and Adam's constants.
        max_steps: Length of the run, in optimizer steps.
        use_distributed_optimizer: Split optimizer state over data-parallel ranks.
        bf16: Train bfloat16 weights with float32 main copies in the optimizer.
        watch: Says which steps are skipped.
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
    module.watch = watch  # no argument: NeMo stores those, and would store the model with it
    return module


class HydraOptimizerModule(nl.MegatronOptimizerModule):
    """Megatron's optimizer, made as megatron-core 0.16 wants it (NeMo 2.7 calls it as 0.15 did)."""

    watch: NumberWatch

    def finalize_model_grads(self, *args: Any, **kwargs: Any) -> None:
        """Reduce the gradients over ranks; a bad one shows where it came from only before."""
        self.watch.look_at_gradients()
        super().finalize_model_grads(*args, **kwargs)

    def optimizers(self, model: Any) -> list[torch.optim.Optimizer]:
        """Make Megatron's optimizer for the DDP-wrapped chunks of a `MegatronParallel`."""
        predicate = ParamWithNamePredicate(name="skips_weight_decay", fn=skips_weight_decay)
        chunks = [chunk.module for chunk in model]
        optimizer = get_megatron_optimizer(
            self.config,
            chunks,
            config_overrides={ParamKey(with_name_predicate=predicate): {"wd_mult": 0.0}},
        )
        self.watch.attach(chunks)
        optimizer = _WatchedOptimizer(optimizer.chained_optimizers, self.watch)
        for group in optimizer.param_groups:
            # Megatron's own scheduler, which NeMo does not use, would apply this.
            group["weight_decay"] = self.config.weight_decay * group["wd_mult"]
        for part in optimizer.chained_optimizers:
            _start_adam_state(part.optimizer)
        return [McoreDistributedOptimizer(optimizer)]


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


def _start_adam_state(optimizer: torch.optim.Optimizer | None) -> None:
    """Give PyTorch's Adam the state of step 0.

    Megatron makes this state itself when it loads a checkpoint into a fresh optimizer, but
    without `step`, which PyTorch's Adam has and Transformer Engine's has not; loading then fails.
    """
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
