"""`train --dry-run`: all that can be known of a run before a GPU is taken; imports nothing slow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.selection.cost import ServeDtype
from megatron_hydra.selection.shape import ModelShape
from megatron_hydra.teachers.model_folder import peek_metadata
from megatron_hydra.training.config import RunConfig
from megatron_hydra.training.config_checks import check_ranks
from megatron_hydra.training.dataset_checks import check_all_datasets, read_tokens
from megatron_hydra.training.document_lengths import UpSampling, describe_lengths, up_sampling
from megatron_hydra.training.memory import TrainingMemory, decoding_cache_bytes, memory_of_run
from megatron_hydra.training.needle_rounds import NeedleRounds
from megatron_hydra.training.run_files import checkpoint_step
from megatron_hydra.training.run_folder import RunFolder
from megatron_hydra.training.run_inputs import check_present, result_bytes


@dataclass(frozen=True)
class DryRun:
    """What a run would be.

    Attributes:
        folder: Of the run.
        num_ranks: GPUs, or processes, in all.
        data_parallel: Replicas.
        num_tokens: That the run trains on, and that its datasets hold.
        dataset_tokens: See there.
        lengths: What share of these lies in documents of which length, in a sentence.
        up_sampling: Of long documents; None where there is none.
        fa_heads: Of all heads, those that keep full attention.
        total_heads: All.
        saved_step: Finished steps that it would go on from.
        checkpoint_bytes: At the least, of one.
        hybrid_bytes: Of the trained model.
        memory: Predicted for the GPU that needs most; None where the formula does not reach.
        why_no_memory: Then says why.
        needles: The run's questions about needles; None where it asks none.
        needle_cache_bytes: That a batch of these keeps on the GPU that has most; 0 without.
    """

    folder: Path
    num_ranks: int
    data_parallel: int
    num_tokens: int
    dataset_tokens: int
    lengths: str
    up_sampling: UpSampling | None
    fa_heads: int
    total_heads: int
    saved_step: int
    checkpoint_bytes: int
    hybrid_bytes: int
    memory: TrainingMemory | None
    why_no_memory: str
    needles: NeedleRounds | None
    needle_cache_bytes: float


def dry_run(
    config: RunConfig, num_ranks: int | None = None, config_file: str | Path | None = None
) -> DryRun:
    """Check a run as its start would, as far as that takes neither GPU nor Megatron.

    Nothing is written.

    Args:
        config: Of the run.
        num_ranks: It is to have; None takes the fewest that its layout allows.
        config_file: It was read from, which the run must not replace.

    Raises:
        UserError: On the first fault.
    """
    folder = RunFolder(config, config_file)
    folder.check()
    check_present(config)
    model = read_model(config.transfer.init_from, "hybrid", "transfer.init_from")
    if config.transfer.teacher is not None:
        read_model(config.transfer.teacher, "teacher", "transfer.teacher")
    plan = HeadPlan.load(f"{config.transfer.init_from}/plan.json")
    num_ranks = num_ranks or config.strategy.model_parallel_size
    check_ranks(config, num_ranks)
    check_all_datasets(config, model["vocab_size"])
    folder.check_room()
    hybrid_bytes, checkpoint_bytes = result_bytes(config)
    data_parallel = num_ranks // config.strategy.model_parallel_size
    shape = ModelShape.from_fields(model)
    memory, why_no_memory = memory_of_run(config, shape, plan, num_ranks)
    rounds = NeedleRounds.of(config, num_ranks)
    num_tokens = config.trainer.max_steps * config.data.global_batch_size * config.data.seq_length
    return DryRun(
        folder=folder.path,
        num_ranks=num_ranks,
        data_parallel=data_parallel,
        num_tokens=num_tokens,
        dataset_tokens=sum(len(read_tokens(path)) for path in config.data.paths),
        lengths=describe_lengths(config.data.paths),
        up_sampling=up_sampling(config.data, num_tokens),
        fa_heads=sum(len(layer.fa_heads) for layer in plan.layers),
        total_heads=shape.total_heads,
        saved_step=next(map(checkpoint_step, folder.finished_checkpoints()), None) or 0,
        checkpoint_bytes=checkpoint_bytes,
        hybrid_bytes=hybrid_bytes,
        memory=memory,
        why_no_memory=why_no_memory,
        needles=rounds,
        needle_cache_bytes=0.0 if rounds is None else _cache_bytes(config, shape, plan, rounds),
    )


def _cache_bytes(
    config: RunConfig, shape: ModelShape, plan: HeadPlan, rounds: NeedleRounds
) -> float:
    dtype: ServeDtype = "fp32" if config.trainer.precision == "fp32" else "bf16"
    tp_size = config.strategy.tensor_model_parallel_size
    return max(
        decoding_cache_bytes(shape, asked, rounds, tp_size, config.data.seq_length, dtype)
        for asked in rounds.plans(plan)
    )


def read_model(folder: str, kind: str, key: str) -> dict[str, Any]:
    """The configuration of a checkpoint folder's model.

    Args:
        folder: The checkpoint.
        kind: It must be of.
        key: That names it, for the message.

    Raises:
        UserError: If it is of another kind, or damaged.
    """
    meta = peek_metadata(folder)
    if meta.get("kind") != kind or not isinstance(meta.get("config"), dict):
        found = meta.get("kind", "damaged")
        raise UserError(f"{key} {folder} is a {found} checkpoint; a {kind} is needed")
    config: dict[str, Any] = meta["config"]
    return config
