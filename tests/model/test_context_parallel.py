"""Context parallelism and packed rows: no token may feel where it lies or who lies beside it.

Catches: a state, a convolution or attention that leaks over a document's end or is lost at a
rank's border, positions that count the rank's tokens, zig-zag chunks in the wrong order, padding
that counts, gradients that stay on one rank, and an exchange that grows with the sequence.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.distributed import run_distributed
from torch import Tensor

from megatron_hydra.errors import UserError

pytestmark = pytest.mark.dist

# Layers with some, all and no FA heads; the teacher has Megatron's own SelfAttention.
PLANS = {
    "some": {0: (1, 2, 5), 1: (0, 1, 6, 7)},
    "all and none": {0: tuple(range(8)), 1: ()},
    "teacher": None,
}
# Everything that depends on positions is on; logits and gradients are of order one. The epsilon is
# the certificate's: a smaller one lets norms of nearly nothing make much of rounding.
SWITCHES = dict(fa_query_scale="always", fa_rope=True, init_method_std=0.2, layernorm_epsilon=1e-2)
TOTAL = 240
DOCUMENTS = {
    "rows": None,
    "one": [TOTAL],
    "over the borders of ranks": [1, 101, 2, 70, 3, 1, 60, 2],
    "tiny": [1, 2, 3, 4, 5] * 16,
}
# float32, against the largest entry of each tensor; what differs is the order of sums.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Of a plan one rank's results; of packed documents, those of each alone too."""

    @cache
    def of_plan(plan: str) -> Path:
        folder = tmp_path_factory.mktemp("alone")
        run_distributed(_record_alone, 1, plan, folder)
        return folder

    return of_plan


@pytest.mark.parametrize(
    ("plan", "cp_size"),
    [
        *((plan, 2) for plan in PLANS),
        ("some", 4),
        *(pytest.param(plan, 4, marks=pytest.mark.exhaustive) for plan in list(PLANS)[1:]),
    ],
)
def test_context_parallel_does_not_show(
    alone: Callable[[str], Path], plan: str, cp_size: int, tmp_path: Path
) -> None:
    run_distributed(_record, cp_size, plan, tmp_path)
    for documents in DOCUMENTS:
        expected, found = (torch.load(f / f"{documents}.pt") for f in (alone(plan), tmp_path))
        _assert_equal(found, expected, documents)


@pytest.mark.slow
@pytest.mark.exhaustive  # test_hydra_attention.py and test_la_preparation.py hold the kernels alone
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs kernels in Triton's interpreter")
def test_triton_kernels_do_not_show(tmp_path: Path) -> None:
    """Two ranks with our kernels against one without: two pieces per rank, and moved documents."""
    documents = ("rows", "over the borders of ranks")
    for kernels, ranks in (("reference", 1), ("triton", 2)):
        folder = tmp_path / kernels
        folder.mkdir()
        run_distributed(_record, ranks, "some", folder, documents, kernels)
    for name in documents:
        found, expected = (
            torch.load(tmp_path / kernels / f"{name}.pt") for kernels in ("triton", "reference")
        )
        _assert_equal(found, expected, name)


@pytest.mark.parametrize("documents", [name for name in DOCUMENTS if name != "rows"])
@pytest.mark.parametrize("plan", PLANS)
def test_packed_documents_equal_each_alone(
    alone: Callable[[str], Path], plan: str, documents: str
) -> None:
    each, results = (torch.load(alone(plan) / f"{name}{documents}.pt") for name in ("each of ", ""))
    _assert_equal(results, each, documents)


@pytest.mark.parametrize("packed", [False, True])
def test_what_la_heads_hand_over_does_not_grow_with_the_sequence(packed: bool) -> None:
    run_distributed(_check_payload, 2, packed)


def test_lengths_that_are_not_divisible_are_an_error() -> None:
    from types import SimpleNamespace

    from megatron_hydra.model.sequence import shard_batch

    group = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    with pytest.raises(
        UserError, match="^the sequence length 6 is not divisible by 2 x context_pa"
    ):
        shard_batch({"tokens": torch.zeros(1, 6)}, group)


def test_all_to_all_needs_divisible_heads() -> None:
    run_distributed(_refuse_all_to_all, 2)


def _refuse_all_to_all() -> None:
    with pytest.raises(
        UserError, match="the 3 FA heads of layer 0 on tensor-parallel rank 0 are not"
    ):
        _model("some", cp_comm_type="a2a")


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], documents: str) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error, largest = (found[name] - value).abs().max(), value.abs().max()
        assert error <= TOLERANCE * largest, f"{documents}, {name}: off by {error:.1e}"


def _record(
    plan: str, folder: Path, names: tuple[str, ...] = tuple(DOCUMENTS), kernels: str = "auto"
) -> None:
    """Logits of every token, the loss and all gradients, whole on rank 0."""
    import torch.distributed as dist

    for documents in names:
        model = _model(plan, fused_kernels=kernels)
        results = _run(model, _batch(), DOCUMENTS[documents])
        if dist.get_rank() == 0:
            torch.save(results, folder / f"{documents}.pt")


def _record_alone(plan: str, folder: Path) -> None:
    _record(plan, folder)
    for documents, lengths in DOCUMENTS.items():
        if lengths is not None:
            torch.save(_results_of_each(plan, lengths), folder / f"each of {documents}.pt")


def _results_of_each(plan: str, lengths: list[int]) -> dict[str, Tensor]:
    """The same of documents that each run alone, put together."""
    model, batch = _model(plan), _batch()
    rows = {name: tensor.reshape(1, -1) for name, tensor in batch.items()}
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    runs = []
    for start, end in pairwise(ends):
        document = {name: row[:, start:end] for name, row in rows.items()}
        runs.append(_run(model, document, None))
    results = {name: sum(run[name] for run in runs) for name in runs[0] if name != "logits"}
    results["logits"] = torch.cat([run["logits"] for run in runs], dim=1)
    return results


def _run(model: Any, batch: dict[str, Tensor], lengths: list[int] | None) -> dict[str, Tensor]:
    import torch.distributed as dist
    import torch.nn.functional as F
    from megatron.core import parallel_state

    from megatron_hydra.model.sequence import (
        SequenceLayout,
        pad_documents,
        shard_batch,
    )

    group, packing = parallel_state.get_context_parallel_group(), None
    if lengths is not None:
        rows = {name: tensor.reshape(1, -1) for name, tensor in batch.items()}
        ends = torch.tensor([0, *lengths]).cumsum(0)
        batch, packing = pad_documents(rows, ends, group.size())
    local = shard_batch(batch, group, packing)
    model.zero_grad()
    logits = model(local["tokens"], local["position_ids"], None, packed_seq_params=packing)
    losses = F.cross_entropy(logits.transpose(1, 2), local["labels"], reduction="none")
    loss = (losses * local["loss_mask"]).sum()
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    results = {"loss": loss.detach(), **gradients}
    for value in results.values():
        dist.all_reduce(value, group=group)

    layout = SequenceLayout.of(logits.shape[1], packing, group)
    total = logits.shape[1] * group.size()
    whole = logits.new_zeros(logits.shape[0], total, logits.shape[2])
    whole[:, layout.stream_index()] = logits.detach()
    dist.all_reduce(whole, group=group)
    if packing is not None:
        whole = whole[batch["loss_mask"].bool()][None]  # without padding
    return {key: value.clone() for key, value in {**results, "logits": whole}.items()}


def _check_payload(packed: bool) -> None:
    from megatron_hydra.model import context_parallel

    sent = []
    gather = context_parallel.gather_from_sequence_parallel_region

    def count(x: Tensor, **kwargs: Any) -> Tensor:
        sent.append(x.numel() * x.element_size())
        return gather(x, **kwargs)

    context_parallel.gather_from_sequence_parallel_region = count
    model, bytes_of = _model("some"), {}
    for length in (16, 64, 240):
        sent.clear()
        batch = {name: tensor[:1, :length] for name, tensor in _batch(rows=1).items()}
        _run(model, batch, [3, length - 3] if packed else None)
        bytes_of[length] = list(sent)
    assert bytes_of[16] == bytes_of[64] == bytes_of[240]
    # A state and a transition of 8 x 8 per head, and 3 tokens of 3 x 8 channels: float32, and two
    # pieces per rank where rows are cut zig-zag.
    pieces, heads = (1 if packed else 2), (5, 4)
    expected = [4 * pieces * n * size for n in heads for size in (3 * 3 * 8, 2 * 8 * 8)]
    assert bytes_of[16] == expected


def _model(plan: str, **overrides: Any) -> Any:
    from kit.tiny import tiny_config, tiny_plan

    from megatron_hydra.model.build import build_model
    from megatron_hydra.parallel import initialize_model_parallel

    cp_size = int(os.environ["WORLD_SIZE"])
    initialize_model_parallel(context=cp_size)
    switches = {**SWITCHES, **overrides}
    config = tiny_config(context_parallel_size=cp_size, seq_length=TOTAL, **switches)
    model = build_model(config, None if PLANS[plan] is None else tiny_plan(PLANS[plan]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and parameter.requires_grad:  # nothing at its neutral value
                parameter.mul_(0.5 + torch.rand(parameter.shape, generator=generator))
            elif parameter.ndim == 2 and parameter.shape[1] == config.la_conv_kernel_size:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def _batch(rows: int = 2) -> dict[str, Tensor]:
    from kit.tiny import tiny_config, token_batch

    tokens, positions = token_batch(tiny_config(), rows, TOTAL // rows)
    return {
        "tokens": tokens,
        "position_ids": positions,
        "labels": tokens.roll(-1, dims=1),
        "loss_mask": torch.ones_like(tokens, dtype=torch.float32),
    }
