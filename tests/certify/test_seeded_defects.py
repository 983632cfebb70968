"""A certificate must fail where a layout is wrong, and name what is: defects are put in here.

Each defect is in force on layouts of several ranks alone, so that the reference stays right.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.distributed import run_distributed

pytestmark = [pytest.mark.dist, pytest.mark.slow]

FA_HEADS = {0: (1, 2, 5), 1: (0, 1, 6, 7)}
# Defect -> the check to run, and what must be named in a failing row: quantity and place.
DEFECTS = {
    "two heads swapped": ("tensor parallel: tp2 balanced", "gradients", "head"),
    "norm gradient not summed over ranks": (
        "sequence parallel: tp2 sp balanced",
        "replica drift",
        "input_layernorm",
    ),
    "a replica changed": ("data parallel: dp", "replica drift", "final_layernorm"),
    "gradients not summed over data parallel": (
        "data parallel: dp",
        "gradients",
        "decoder.layers",
    ),
    "mean of means": ("data parallel: dp", "gradient norm", "step 0"),
    "documents leak": ("packed documents: cp2 micro4 packed", "logits", "document"),
    "convolution's tail lost": ("context parallel: cp2", "logits", "document"),
    "not a number": ("data parallel: dp", "loss", "step 1"),
    "loaded Adam state changed": (
        "checkpoint there and back: tp2 sp by_type",
        "loaded back",
        "exp_avg_sq",
    ),
    "exported heads swapped": ("exported and reloaded: tp2 sp by_type", "logits", "document"),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, list[dict]]:
    """Every defect's failing rows."""
    folder = tmp_path_factory.mktemp("defects")
    run_distributed(_certify_all, 2, folder)
    return {defect: json.loads((folder / f"{defect}.json").read_text()) for defect in DEFECTS}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_fails_the_certificate_and_is_named(rows, defect):
    check, quantity, place = DEFECTS[defect]
    failed = [row for row in rows[defect] if not row["passed"]]
    named = [row for row in failed if row["quantity"] == quantity and place in row["at"]]
    assert named, failed
    assert all(f"{row['check']}: {row['layout']}" == check for row in failed)
    assert not any(math.isnan(row["difference"]) for row in failed)


def _certify_all(folder: Path) -> None:
    from kit.tiny import tiny_fields

    from megatron_hydra.certify.certificate import WELL_CONDITIONED, _Certifier, certify
    from megatron_hydra.certify.checks import Limits
    from megatron_hydra.certify.layouts import Layout
    from megatron_hydra.certify.training import Run
    from megatron_hydra.certify.worlds import Ranks
    from megatron_hydra.head_plan import HeadPlan

    ranks, rank = Ranks(), int(os.environ["RANK"])
    # Rank 0 alone makes the references, where no defect is in force: once for all.
    _Certifier._reference = _made_once(_Certifier._reference)
    plan = HeadPlan.from_fa_heads(FA_HEADS, 2, 8, 4)
    for index, (defect, (name, _, _)) in enumerate(DEFECTS.items()):
        scratch = folder / str(index)
        scratch.mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            _put_in(defect, patch)
            certificate = certify(
                Run(tiny_fields(**WELL_CONDITIONED), plan, scratch / "weights", scratch, 2),
                Limits(2, 2, 1),
                48,
                ranks,
                world_size=2,
                rank=rank,
                select=lambda check, name=name: (
                    f"{check.name}: {check.layout.name}" == name and check.other in (None, Layout())
                ),
            )
        if rank == 0:
            (folder / f"{defect}.json").write_text(json.dumps(asdict(certificate.file)["rows"]))


def _made_once(reference: Callable[..., Any]) -> Callable[..., Any]:
    """A certifier's `_reference(layout, batch)`, of which all models and batches here are one's."""
    made: dict[Any, Any] = {}

    def get(self: Any, layout: Any, batch: Any) -> Any:
        if layout not in made:
            made[layout] = reference(self, layout, batch)
        return made[layout]

    return get


def _put_in(defect: str, patch: pytest.MonkeyPatch) -> None:
    """Break one thing, in worlds of several ranks."""
    import torch.distributed as dist
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_hydra.certify import training
    from megatron_hydra.export import reloading
    from megatron_hydra.model import context_parallel, fusion
    from megatron_hydra.model.mixers import gated_delta_net

    def several() -> bool:
        return dist.get_world_size() > 1

    def after(owner: type, method: str, change) -> None:
        """Let `change(self, result)` see and replace what a method returns."""
        original = getattr(owner, method)

        def changed(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            return change(self, result) if several() else result

        patch.setattr(owner, method, changed)

    def final_norm(trainer) -> torch.nn.Parameter:
        return trainer.chunks[-1].decoder.final_layernorm.weight

    if defect == "two heads swapped":

        def swap(fusion, _):
            fusion.order[[0, 1]] = fusion.order[[1, 0]]

        after(fusion.HeadFusion, "__init__", swap)
    elif defect == "norm gradient not summed over ranks":

        def unmark(layer, _):
            layer.input_layernorm.weight.sequence_parallel = False

        after(TransformerLayer, "__init__", unmark)
    elif defect == "a replica changed":

        def drift(trainer, result):
            if dist.get_rank() == 1:
                final_norm(trainer).data[0] *= 1 + 1e-6
            return result

        after(training.Trainer, "step", drift)
    elif defect == "not a number":

        def poison(trainer, result):
            final_norm(trainer).data[0] = torch.nan
            return result

        after(training.Trainer, "step", poison)
    elif defect == "gradients not summed over data parallel":

        def only_scale(chunks, num_tokens, **kwargs):
            if not several():
                return original_finalize(chunks, num_tokens, **kwargs)
            dist.all_reduce(num_tokens)
            for chunk in chunks:
                chunk.scale_gradients(2.0 / num_tokens)

        original_finalize = training.finalize_model_grads
        patch.setattr(training, "finalize_model_grads", only_scale)
    elif defect == "mean of means":

        def own_mean(loss_mask, losses):
            total, count, shown = original_sum(loss_mask, losses)
            return (total / count * 43, torch.full_like(count, 43), shown) if several() else (
                total, count, shown,
            )  # fmt: skip

        original_sum = training._masked_sum
        patch.setattr(training, "_masked_sum", own_mean)
    elif defect == "documents leak":
        original_rule = gated_delta_net.gated_delta_rule

        def one_document(*args, cu_seqlens=None, **kwargs):
            return original_rule(*args, cu_seqlens=None if several() else cu_seqlens, **kwargs)

        patch.setattr(gated_delta_net, "gated_delta_rule", one_document)
    elif defect == "convolution's tail lost":
        after(
            context_parallel.Pieces,
            "tokens_before",
            lambda pieces, tail: None if tail is None else 0.0 * tail,
        )
    elif defect == "loaded Adam state changed":

        def halve(trainer, _):
            for part in trainer.optimizer.chained_optimizers:
                for state in part.optimizer.state.values():
                    state["exp_avg_sq"] *= 0.5

        after(training.Trainer, "load", halve)
    elif defect == "exported heads swapped":

        def swapped(hybrid):  # of layer 0, which has five LA heads of eight channels
            for name, tensor in original_tensors(hybrid):
                is_query = name == "model.layers.0.self_attn.la.q_proj.weight"
                yield (
                    name,
                    torch.cat((tensor[8:16], tensor[:8], tensor[16:])) if is_query else tensor,
                )

        original_tensors = reloading.hybrid_tensors
        patch.setattr(reloading, "hybrid_tensors", swapped)
    else:
        raise AssertionError(defect)
