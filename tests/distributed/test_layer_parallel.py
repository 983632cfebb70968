"""The layout must not show: any TP size and placement computes and trains the same model.

Catches: heads in the wrong order, collectives that differ between ranks, a gradient that is not
summed over ranks (shared norms) or summed twice, query groups split over ranks, gradient norms
that count a rank's own parameters once only, replicas that drift apart, checkpoint shards at the
wrong place.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from megatron_hydra.testing import run_distributed

pytestmark = pytest.mark.dist

LAYOUTS = [(1, "balanced"), (2, "balanced"), (2, "by_type"), (4, "balanced"), (4, "by_type"),
           (8, "balanced")]  # fmt: skip
VARIANTS = {
    "default": {},
    "dynamic gate, RoPE on FA": dict(fusion="gate", fa_rope=True, la_output_gate="sigmoid"),
    "sequence parallel": dict(sequence_parallel=True, fusion="gate"),
}
NUM_STEPS = 5
# float32; what differs between layouts is the order of sums. Adam divides by the gradient's own
# size, so rounding in near-zero gradients shows in the parameters up to a part of the rate 1e-3.
LOGIT_TOLERANCE, GRADIENT_TOLERANCE, PARAMETER_TOLERANCE = 2e-5, 2e-5, 5e-5


@pytest.fixture(scope="module", params=VARIANTS)
def reference(request, tmp_path_factory) -> tuple[Path, dict]:
    """Weights saved at TP 2, `by_type`, and one rank's results from them."""
    folder, overrides = tmp_path_factory.mktemp("layout"), VARIANTS[request.param]
    run_distributed(_save_initial_weights, 2, folder, {**overrides, "placement": "by_type"})
    single = {name: value for name, value in overrides.items() if name != "sequence_parallel"}
    run_distributed(_train, 1, folder, single, "single")
    return folder, overrides


@pytest.mark.parametrize("tp_size, placement", LAYOUTS)
def test_layout_does_not_show(reference, tp_size, placement):
    folder, overrides = reference
    if overrides.get("sequence_parallel") and tp_size == 1:
        pytest.skip("sequence parallelism needs two ranks")
    name = f"{tp_size}-{placement}"
    run_distributed(_train, tp_size, folder, {**overrides, "placement": placement}, name)
    expected, found = (torch.load(folder / f"{run}.pt") for run in ("single", name))
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=0, atol=LOGIT_TOLERANCE)
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["norms"], expected["norms"], rtol=1e-4, atol=0)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for kind, tolerance in (
        ("gradients", GRADIENT_TOLERANCE),
        ("parameters", PARAMETER_TOLERANCE),
    ):
        for key, value in expected[kind].items():
            torch.testing.assert_close(
                found[kind][key], value, rtol=1e-4, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
            )


def _save_initial_weights(folder: Path, overrides: dict) -> None:
    from megatron.core import dist_checkpointing

    model = _build(overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            if (
                parameter.ndim == 1 and parameter.requires_grad
            ):  # norms, scales: nothing may stay at its neutral value
                generator = torch.Generator().manual_seed(parameter.numel())
                noise = torch.rand(parameter.shape, generator=generator)
                replicated = not getattr(parameter, "tensor_model_parallel", False)
                parameter.mul_(0.5 + noise if replicated else 1.3)
    (folder / "weights").mkdir(exist_ok=True)
    dist_checkpointing.save(model.sharded_state_dict(), str(folder / "weights"))


def _train(folder: Path, overrides: dict, name: str) -> None:
    """Load the weights, train `NUM_STEPS` steps, store what rank 0 can see of the whole."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_hydra.testing.tiny import token_batch

    model = _build(overrides)
    model.load_state_dict(
        dist_checkpointing.load(model.sharded_state_dict(), str(folder / "weights"))
    )
    tokens, positions = token_batch(model.config)
    labels = tokens.roll(-1, dims=1)
    result: dict = {"losses": [], "norms": []}
    with torch.no_grad():
        logits = model(tokens, positions, None)
        result["logits"] = gather_from_tensor_model_parallel_region(logits)
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.0, clip_grad=0.5), [wrapped]
    )
    for step in range(NUM_STEPS):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        loss = wrapped(tokens, positions, None, labels=labels).mean()
        loss.backward()
        finalize_model_grads([wrapped])
        if step == 0:
            result["gradients"] = _whole(model, _gradient)
        _, norm, _ = optimizer.step()
        result["losses"].append(loss.detach())
        result["norms"].append(torch.tensor(norm))
    result["parameters"] = _whole(model, lambda p: p.data)
    _assert_replicas_agree(model)
    if dist.get_rank() == 0:
        torch.save(result, folder / f"{name}.pt")


def _build(overrides: dict):
    import torch.distributed as dist

    from megatron_hydra.model import build_model
    from megatron_hydra.parallel import initialize_model_parallel
    from megatron_hydra.testing.tiny import tiny_config, tiny_plan

    tp_size = int(os.environ["WORLD_SIZE"])
    initialize_model_parallel(tensor=tp_size)
    assert dist.get_world_size() == tp_size
    # A standard deviation that makes logits and gradients of order one.
    config = tiny_config(tensor_model_parallel_size=tp_size, init_method_std=0.2, **overrides)
    return build_model(config, tiny_plan())


def _gradient(parameter):
    return parameter.main_grad if parameter.requires_grad else parameter.data


def _whole(model, value) -> dict[str, torch.Tensor]:
    """Global tensors, assembled on every rank from the checkpoint's description of the shards."""
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    kept = {parameter: parameter.data for parameter in model.parameters()}
    for parameter in kept:
        parameter.data = value(parameter).clone()
    state = model.sharded_state_dict()
    apply_factories(state)
    for parameter, data in kept.items():
        parameter.data = data
    shards = [
        (shard.key, shard.global_shape, shard.global_offset, shard.data)
        for shard in _leaves(state)
        if isinstance(shard, ShardedTensor)
    ]
    everything: list = [None] * dist.get_world_size()
    dist.all_gather_object(everything, shards)
    whole: dict[str, torch.Tensor] = {}
    for key, shape, offset, data in (shard for rank in everything for shard in rank):
        target = whole.setdefault(key, torch.full(shape, torch.nan))
        target[tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))] = data
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


def _leaves(state):
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, (list, tuple)):
        for item in state:
            yield from _leaves(item)
    else:
        yield state


def _assert_replicas_agree(model) -> None:
    import torch.distributed as dist

    for name, parameter in model.named_parameters():
        if not getattr(parameter, "tensor_model_parallel", False):
            others = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
            dist.all_gather(others, parameter.data.contiguous())
            assert all(torch.equal(other, parameter) for other in others), name
