"""Training state saved at one layout and loaded at another: the same numbers, and on from there.

Catches: moments that land on another parameter or head, a step count that is lost, shared between
parameters or counted twice, float32 main weights that are rounded through bfloat16, a layout that
shows in the checkpoint, and an optimizer that forgets something that the next step needs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kit.distributed import run_distributed
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

pytestmark = pytest.mark.dist

METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
STEPS_BEFORE, STEPS_AFTER, GLOBAL_BATCH = 3, 2, 4


@dataclass(frozen=True)
class Layout:
    """Parallel sizes and placement of one side of a test."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    placement: str = "balanced"
    overlap: bool = False
    """Gradients in many buckets, some padded, that are summed as they come."""

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data * self.context

    def __str__(self) -> str:
        sizes = f"tp{self.tensor}-pp{self.pipeline}-dp{self.data}-cp{self.context}"
        return f"{sizes}-{self.placement}{'-overlap' * self.overlap}"


LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(tensor=2, placement="by_type"),
    Layout(pipeline=2),
    Layout(data=2),
    Layout(tensor=4, placement="by_type"),
    Layout(tensor=2, data=2),
    Layout(tensor=2, pipeline=2, placement="by_type"),
    Layout(pipeline=2, data=2),
    Layout(context=2),
    Layout(tensor=2, context=2),
    Layout(tensor=2, data=2, placement="by_type", overlap=True),
]
PRECISIONS = ("fp32", "bf16")
# What `make test` keeps: each kind of split once, in the precision that has more to go wrong there
# (bf16 has main weights, which replicas share). In float32, test_resume.py goes on at one layout.
SAVED_AT = Layout(tensor=2, placement="by_type")
COVERING = {
    "fp32": [Layout(pipeline=2), Layout(context=2)],
    "bf16": [SAVED_AT, Layout(data=2, overlap=True)],
}
# One of them with a vocabulary and an MLP width that tensor-parallel ranks pad.
SIZES = {"fp32": {"vocab_size": 61, "ffn_hidden_size": 49}, "bf16": {}}


@pytest.mark.slow
def test_state_moves_between_layouts(tmp_path: Path) -> None:
    """From one to each, all on two ranks: one launch."""
    run_distributed(_check_all, 2, tmp_path, [SAVED_AT], COVERING)
    for precision in PRECISIONS:
        _compare(tmp_path / precision, [SAVED_AT], COVERING[precision], precision)


@pytest.mark.exhaustive
def test_state_moves_between_all_layouts(tmp_path: Path) -> None:
    for saving, loading in ((LAYOUTS, []), ([], LAYOUTS)):
        for size in (1, 2, 4):
            here = [[x for x in side if x.world_size == size] for side in (saving, loading)]
            loading_here = dict.fromkeys(PRECISIONS, here[1])
            run_distributed(_check_all, size, tmp_path, here[0], loading_here, LAYOUTS)
    run_distributed(_train_exactly, 1, tmp_path / "exact")
    exact = _stored(tmp_path / "exact")
    undisturbed = [_stored(tmp_path / f"bf16/{layout}/end") for layout in LAYOUTS]
    rounding = {
        name: max(_distance(name, end[name], value) for end in undisturbed)
        for name, value in exact.items()
        if name in undisturbed[0]
    }
    for precision in PRECISIONS:
        known = rounding if precision == "bf16" else {}
        _compare(tmp_path / precision, LAYOUTS, LAYOUTS, precision, known)


def _check_all(
    folder: Path,
    saving: list[Layout],
    loading: dict[str, list[Layout]],
    saved_at: list[Layout] | None = None,
) -> None:
    """Save at some layouts and load at others, of one world size, in both precisions."""
    for precision in PRECISIONS:
        for layout in saving:
            _train_through(folder / precision, layout, precision)
        for layout in loading[precision]:
            _go_on(folder / precision, layout, saved_at or saving, precision)


def _compare(
    folder: Path,
    saved_at: list[Layout],
    loaded_at: list[Layout],
    precision: str,
    rounding: dict[str, float] | None = None,
) -> None:
    for source in saved_at:
        middle, end = _stored(folder / f"{source}/middle"), _stored(folder / f"{source}/end")
        assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in middle)
        trained = [name for name in middle if name.startswith(("optimizer.", "step"))]
        unchanged = [name for name in trained if torch.equal(middle[name], end[name])]
        assert not unchanged, unchanged
        for target in loaded_at:
            went_on = folder / f"{source}-to-{target}"
            _assert_equal(_stored(went_on / "middle"), middle, f"{went_on}: loaded")
            if target == source:
                _assert_equal(_stored(went_on / "end"), end, f"{went_on}: trained on")
            else:
                what = f"{went_on}: trained on"
                _assert_close(_stored(went_on / "end"), end, precision, what, rounding or {})


def _assert_equal(found: dict, expected: dict, what: str) -> None:
    assert found.keys() == expected.keys(), what
    wrong = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not wrong, (what, wrong)


def _assert_close(
    found: dict, expected: dict, precision: str, what: str, rounding: dict[str, float]
) -> None:
    """Other orders of sums; Adam divides gradients by their size, near-zero ones' rounding too.

    In bf16, gradients differ by their rounding, which the moments show, and a weight by its last
    bit. Where it is known how far runs that were never moved are from float32, twice that is
    allowed: a recurrence's decays have few numbers, and gradients that nearly cancel. State of
    another parameter or head would be off by its own size.
    """
    assert found.keys() == expected.keys(), what
    for name, value in expected.items():
        is_moment = "optimizer.state.exp_avg" in name
        tolerance = {"fp32": 2e-5, "bf16": 0.2 if is_moment else 2**-7}[precision]
        if is_moment:
            tolerance = max(tolerance, 2 * rounding.get(name, 0.0))
        error = _distance(name, found[name], value)
        assert error <= tolerance, (what, name, error)


def _distance(name: str, found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative; a second moment is of squares, which have twice the error."""
    value, difference = expected.float(), found.float() - expected.float()
    if "optimizer.state.exp_avg" in name:
        error = difference.norm() / value.norm()
        return float(error / 2 if "exp_avg_sq" in name else error)
    return float(difference.abs().max() / value.abs().max().clamp(min=1.0))


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole, by their global names; with the param groups."""
    file = folder.with_suffix(".pt")
    if not file.exists():
        dcp_to_torch_save(folder, file)
    tensors = {
        name: value
        for name, value in torch.load(file, weights_only=False).items()
        if isinstance(value, torch.Tensor)
    }
    groups = torch.load(folder / "common.pt", weights_only=False)["optimizer"]["optimizer"]
    for group in groups["param_groups"]:
        tensors[f"step, {group['wd_mult']}"] = torch.tensor(float(group["step"]))
    return tensors


def _train_through(folder: Path, layout: Layout, precision: str) -> None:
    training = _Training(layout, precision, seed=7)
    training.train(0, STEPS_BEFORE)
    training.save(folder / f"{layout}/middle")
    training.train(STEPS_BEFORE, STEPS_AFTER)
    training.save(folder / f"{layout}/end")


def _train_exactly(folder: Path) -> None:
    """The bf16 runs' model, steps and first weights in float32, on one rank."""
    training = _Training(Layout(), "fp32", seed=7, sizes=SIZES["bf16"])
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.copy_(parameter.bfloat16())
    (inner,) = training.optimizer.mcore_optimizer.chained_optimizers
    inner.reload_model_params()
    training.train(0, STEPS_BEFORE + STEPS_AFTER)
    training.save(folder)


def _go_on(folder: Path, layout: Layout, saved_at: list[Layout], precision: str) -> None:
    for source in saved_at:
        # Of another seed: a load that leaves something out must not find it right already.
        training = _Training(layout, precision, seed=11)
        training.load(folder / f"{source}/middle")
        assert training.adam_steps() <= {float(STEPS_BEFORE)}
        training.save(folder / f"{source}-to-{layout}/middle")
        training.train(STEPS_BEFORE, STEPS_AFTER)
        assert training.adam_steps() <= {float(STEPS_BEFORE + STEPS_AFTER)}
        training.save(folder / f"{source}-to-{layout}/end")


@cache
def _ranks() -> Any:
    from megatron_hydra.certify.worlds import Ranks

    return Ranks()


class _Training:
    """A hybrid under Megatron's DDP and distributed optimizer, without NeMo's loop."""

    def __init__(
        self, layout: Layout, precision: str, seed: int, sizes: dict[str, int] | None = None
    ) -> None:
        import torch.distributed as dist
        from kit.tiny import tiny_config, tiny_plan
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
        )
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
        from megatron.core.transformer.module import Float16Module

        from megatron_hydra.certify.layouts import Layout as ParallelSizes
        from megatron_hydra.model.build import build_model
        from megatron_hydra.model.gradients import finalize_model_grads
        from megatron_hydra.nemo.optimizer import make_optimizer
        from megatron_hydra.teachers.loading import megatron_fields
        from megatron_hydra.training.config import OptimSection

        # Each in a world of its own: the groups of hundreds of layouts would keep threads by the
        # thousand.
        _ranks().enter(ParallelSizes(tp=layout.tensor, pp=layout.pipeline, cp=layout.context))
        assert dist.get_world_size() == layout.world_size == int(os.environ["WORLD_SIZE"])
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        self.layout, bf16 = layout, precision == "bf16"
        self.config = tiny_config(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            context_parallel_size=layout.context,
            placement=layout.placement,
            calculate_per_token_loss=True,
            init_method_std=0.2,
            head_init_seed=seed,
            **(SIZES[precision] if sizes is None else sizes),
            **megatron_fields(torch.bfloat16 if bf16 else torch.float32),
            qk_layernorm=True,
        )
        self.model = build_model(
            self.config,
            tiny_plan(),
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
        module = Float16Module(self.config, self.model) if bf16 else self.model
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=layout.overlap,
            bucket_size=5000,
        )
        self.wrapped = DistributedDataParallel(self.config, ddp, module)
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.no_sync_func = self.wrapped.no_sync if layout.overlap else None
        optimizer = make_optimizer(
            OptimSection(lr=1e-3, weight_decay=0.1, clip_grad=0.5), 100, True, bf16
        )
        (self.optimizer,) = optimizer.optimizers([SimpleNamespace(module=self.wrapped)])

    def train(self, first: int, num_steps: int) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        for step in range(first, first + num_steps):
            self.wrapped.zero_grad_buffer()
            self.optimizer.zero_grad()
            get_forward_backward_func()(
                forward_step_func=self._forward,
                data_iterator=self._batches(step),
                model=[self.wrapped],
                num_microbatches=GLOBAL_BATCH // self.layout.data,
                seq_length=24,
                micro_batch_size=1,
            )
            self.optimizer.step()

    def _batches(self, step: int) -> Any:
        from kit.tiny import token_batch
        from megatron.core import parallel_state
        from megatron.core.utils import get_batch_on_this_cp_rank

        tokens, positions = token_batch(self.config, GLOBAL_BATCH, 24, seed=step)
        first = parallel_state.get_data_parallel_rank()
        for sample in range(first, GLOBAL_BATCH, self.layout.data):
            batch = {
                "tokens": tokens[sample : sample + 1],
                "position_ids": positions[sample : sample + 1],
                "labels": tokens[sample : sample + 1].roll(-1, dims=1),
            }
            yield get_batch_on_this_cp_rank(batch)

    def _forward(self, batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

        def loss_function(losses: torch.Tensor) -> tuple:
            count = torch.tensor(losses.numel(), dtype=torch.int)
            return losses.float().sum(), count, {}

        return output, loss_function

    def adam_steps(self) -> set[float]:
        """The step counts of this rank's parameters in PyTorch's Adam."""
        states = self.optimizer.mcore_optimizer.chained_optimizers[0].optimizer.state.values()
        return {float(state["step"]) for state in states}

    def save(self, folder: Path) -> None:
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies.fully_parallel import (
            FullyParallelSaveStrategyWrapper,
        )

        from megatron_hydra.teachers.distributed_weights import InProcessSave

        folder.mkdir(parents=True, exist_ok=True)
        strategy = FullyParallelSaveStrategyWrapper(InProcessSave("torch_dist", 1), None, False)
        dist_checkpointing.save(self._state(), str(folder), strategy)

    def load(self, folder: Path) -> None:
        from megatron.core import dist_checkpointing

        state = dist_checkpointing.load(self._state(is_loading=True), str(folder))
        self.model.load_state_dict(state["model"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])

    def _state(self, is_loading: bool = False) -> dict[str, Any]:
        model = _without_extra(self.model.sharded_state_dict())
        return {
            "model": model,
            "optimizer": self.optimizer.sharded_state_dict(
                model, is_loading=is_loading, metadata=METADATA
            ),
        }


def _without_extra(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if "_extra_state" not in name}
