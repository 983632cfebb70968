"""A hybrid at hand exported without a checkpoint, and loaded as anybody loads the folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from megatron_hydra.export.folder import write_model_parts
from megatron_hydra.export.shards import write_shards
from megatron_hydra.export.weights import hybrid_tensors
from megatron_hydra.head_plan import HeadPlan

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

_SHARD_BYTES = 2**30


def export_and_reload(hybrid: GPTModel, plan: HeadPlan, folder: Path) -> Any:
    """Write a hybrid's configuration, model code and weights, and load them by transformers.

    Args:
        hybrid: As :func:`~megatron_hydra.export.weights.hybrid_tensors` takes it.
        plan: Its plan.
        folder: Does not exist.

    Returns:
        transformers' model in evaluation mode, in the hybrid's number format; on the GPU where
        there is one.
    """
    dtype = hybrid.config.params_dtype
    folder.mkdir(parents=True)
    write_model_parts(folder, hybrid.config, plan, dtype)
    write_shards(folder, dict(hybrid_tensors(hybrid)), _SHARD_BYTES, dtype)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=True, use_safetensors=True, local_files_only=True
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
