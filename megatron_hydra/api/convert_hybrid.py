"""`convert` of an exported hybrid: a Hugging Face folder becomes a checkpoint again."""

from __future__ import annotations

from pathlib import Path

from megatron_hydra.errors import UserError
from megatron_hydra.files import check_output, check_outputs
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.progress import Progress, no_progress
from megatron_hydra.provenance import origin
from megatron_hydra.teachers.model_folder import is_checkpoint_folder


def convert_hybrid(
    hybrid: Path,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> HeadPlan:
    """Write the checkpoint of a hybrid that :func:`~megatron_hydra.api.export.export` wrote.

    Its weights are bit-equal to the folder's, in the folder's number format. Norms that no head
    uses, which the folder does not hold, start at one.

    Args:
        hybrid: The Hugging Face folder, its weights trained on or not.
        out: The checkpoint folder.
        overwrite: Replace an earlier checkpoint.
        progress: Shows how far it is.

    Returns:
        Its head plan.

    Raises:
        UserError: For a folder that cannot be used, or an output that is in the way; nothing is
            written then.
    """
    check_outputs([out], [hybrid])
    check_output(out, overwrite, "folder", marker="model.json")
    if is_checkpoint_folder(hybrid):
        raise UserError(f"{hybrid} is a checkpoint folder already")
    from megatron_hydra import cpu

    cpu.install_if_needed()
    from megatron_hydra.export.reading import ExportedWeights, read_exported
    from megatron_hydra.parallel import initialize_model_parallel
    from megatron_hydra.teachers.checkpoint import save_checkpoint
    from megatron_hydra.teachers.model_folder import weights_hash
    from megatron_hydra.teachers.tokenizer import check_tokenizer
    from megatron_hydra.teachers.unfinished_checkpoint import UnfinishedCheckpoint

    config, plan, meta = read_exported(hybrid)
    check_tokenizer(hybrid, config.vocab_size)
    initialize_model_parallel()
    fingerprint = {
        "hybrid": weights_hash(hybrid),
        "plan": plan.to_dict(),
        "config": meta["config"],
        "dtype": str(config.params_dtype),
    }
    work = UnfinishedCheckpoint(out, fingerprint, overwrite)
    provenance = origin(exported_from=meta["provenance"])
    weights = ExportedWeights(hybrid, config, plan)
    with work.going_on():
        work.fill(config, weights.part, progress)
        save_checkpoint(
            out, work.join, config, plan, hybrid, provenance, overwrite,
            teacher_weights_hash=meta["teacher_weights_hash"],
            teacher_license=meta["teacher_license"],
        )  # fmt: skip
    return plan
