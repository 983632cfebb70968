"""`export`: a checkpoint becomes a Hugging Face folder that runs without this package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_hydra.disk import check_space
from megatron_hydra.errors import UserError
from megatron_hydra.evaluation.generation import Generation, results_markdown
from megatron_hydra.export.hub import check_push, push_folder
from megatron_hydra.files import check_output, check_outputs, versions, write_beside
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.progress import Progress, no_progress
from megatron_hydra.selection.cost import (
    ServeDtype,
    cache_bytes_per_token,
    state_bytes,
    weight_bytes,
)
from megatron_hydra.selection.shape import ModelShape
from megatron_hydra.teachers.model_folder import check_model_folder
from megatron_hydra.unfinished import num_bytes_kept

_FORMATS: dict[str, ServeDtype] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: The Hugging Face folder.
        plan: Of the hybrid; None for a teacher.
        weight_bytes: Of all tensors.
        dtype: Of the weights, but for a hybrid's few float32 ones.
        cache_bytes_per_token: Keys and values that a token adds, of the model and of its teacher.
        state_bytes: That a sequence keeps whatever its length.
        address: On the Hub; None if it was not pushed.
    """

    folder: Path
    plan: HeadPlan | None
    weight_bytes: int
    dtype: str
    cache_bytes_per_token: tuple[int, int]
    state_bytes: int
    address: str | None = None


def export(
    model: Path,
    out: Path,
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    max_shard_bytes: int = 5 * 10**9,
    results: Path | None = None,
    push: str | None = None,
    public: bool = False,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> Exported:
    """Write a checkpoint as a Hugging Face folder.

    A hybrid comes with its model code, for transformers' `trust_remote_code`; a teacher as its
    family's own model. The folder is written beside its place and moved there when complete.

    Args:
        model: Checkpoint folder of a hybrid or a teacher.
        out: The folder.
        dtype: Of the weights; None leaves them as they are stored.
        max_shard_bytes: Of a file of weights.
        results: What ``evaluate --hf`` wrote, for the model card; None leaves it out.
        push: Then upload the folder to this repository of the Hugging Face Hub, `NAME` or
            `OWNER/NAME`, with huggingface_hub's login; None uploads nothing.
        public: Whether a repository that is made for it can be seen by all.
        overwrite: Replace an earlier folder.
        progress: Shows how far it is.

    Raises:
        UserError: For a checkpoint that cannot be read, an output that is in the way, or nobody who
            is logged in to the Hub; nothing is written then. Also if the Hub refuses the folder,
            which is there then.
    """
    check_outputs([out], [model, results])
    check_output(out, overwrite, "folder", marker="config.json")
    if max_shard_bytes < 1:
        raise UserError(f"a file of weights of {max_shard_bytes} bytes: it must be 1 or more")
    if not check_model_folder(model):
        raise UserError(f"{model} is a Hugging Face folder already")
    table = "" if results is None else results_markdown(Generation.load(results))
    if push is not None:
        check_push(push)
    elif public:
        raise UserError("--public says how --push makes a repository; give both or none")
    from megatron_hydra import cpu

    cpu.install_if_needed()
    import torch

    from megatron_hydra.export import folder
    from megatron_hydra.export.exported import Exporting
    from megatron_hydra.export.shards import UnfinishedExport
    from megatron_hydra.parallel import initialize_model_parallel
    from megatron_hydra.teachers.checkpoint import read_checkpoint
    from megatron_hydra.teachers.model_folder import weights_hash
    from megatron_hydra.teachers.tokenizer import check_tokenizer

    initialize_model_parallel()
    stored = read_checkpoint(model)
    config, plan = stored.config, stored.plan
    check_tokenizer(stored.tokenizer_folder, config.vocab_size)
    of_weights = config.params_dtype if dtype is None else getattr(torch, dtype)
    name = str(of_weights).removeprefix("torch.")
    shape = ModelShape.from_config(config)
    check_space(out, weight_bytes(shape, _FORMATS[name]).of(plan) - num_bytes_kept(out))
    per_token = cache_bytes_per_token(shape, _FORMATS[name])
    cache = (int(per_token.of(plan)), int(per_token.of(None)))
    state = int(0 if plan is None else state_bytes(shape, _FORMATS[name]).of(plan))
    fingerprint = {"model": weights_hash(model), "dtype": name, "file": max_shard_bytes}
    work = UnfinishedExport(out, fingerprint, overwrite)
    with work.going_on():
        weights = Exporting(model, config, plan, work, max_shard_bytes, of_weights)
        weights.write(progress)
        with write_beside(out, overwrite, kind="folder", marker="config.json") as temporary:
            temporary.mkdir(parents=True)
            figures = folder.CardFigures(cache, state, name, versions(), table)
            parts = (stored.meta, stored.tokenizer_folder, of_weights, figures)
            if plan is None:
                folder.write_teacher_parts(temporary, config, *parts)
            else:
                folder.write_hybrid_parts(temporary, config, plan, *parts)
            weights.move(temporary)
    address = None if push is None else push_folder(out, push, public)
    return Exported(out, plan, weights.total_bytes, name, cache, state, address)
