"""The certified hybrid's logits when it is a Hugging Face folder and transformers runs it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch import Tensor

from megatron_hydra.certify.layouts import Batch, Layout
from megatron_hydra.certify.training import Run, build_chunks
from megatron_hydra.export.reloading import export_and_reload
from megatron_hydra.teachers.distributed_weights import set_weights, sharded_weights


@torch.no_grad()
def exported_logits(run: Run, folder: Path, batch: Batch) -> dict[str, Tensor]:
    """Export weights that were saved at any layout, and run what transformers loads of them.

    For one rank in a world of its own.

    Args:
        run: Model and plan.
        folder: Has `weights`, as :meth:`~megatron_hydra.certify.training.Trainer.save` wrote
            them; the exported folder `hf` is written beside.
        batch: Documents, each a sequence of its own.

    Returns:
        `document 3` -> float32 `[tokens, vocab]` on the CPU.
    """
    local = dataclasses.replace(run, fields={**run.fields, "backend": "local"})
    (hybrid,) = build_chunks(local, Layout())
    state = dist_checkpointing.load(
        {"model0": sharded_weights(hybrid)},
        str(folder / "weights"),
        strict=StrictHandling.RAISE_ALL,
    )
    set_weights(hybrid, state["model0"])
    model = export_and_reload(hybrid, run.plan, folder / "hf")
    del hybrid
    return {
        f"document {index}": model(document.tokens[None].to(model.device)).logits[0].float().cpu()
        for index, document in enumerate(batch.documents)
    }
