"""What does not go together in a training configuration, and a loss's weights where it has none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_hydra.errors import UserError
from megatron_hydra.model.parallel_sizes import ParallelSizes
from megatron_hydra.tasks.needles import find_task
from megatron_hydra.teachers.model_folder import stored_sizes

if TYPE_CHECKING:
    from megatron_hydra.training.config import (
        DataSection,
        RunConfig,
        StrategySection,
        TransferSection,
    )

FP8_TOKEN_MULTIPLE = 16
"""Of a rank's tokens: cuBLAS takes no other sizes in FP8."""


def check(config: RunConfig) -> None:
    """Check values against each other, and fill in what depends on the stage.

    Raises:
        UserError: On the first value that is not allowed.
    """
    transfer, data, optim = config.transfer, config.data, config.optim
    if not data.paths:
        raise UserError("data.paths is empty: name one indexed dataset or more")
    if data.weights and len(data.weights) != len(data.paths):
        raise UserError(
            f"data.weights has {len(data.weights)} values for {len(data.paths)} data.paths"
        )
    if (data.long_document_tokens is None) != (data.long_document_factor == 1):
        raise UserError(
            f"data.long_document_tokens is {data.long_document_tokens} and "
            f"data.long_document_factor is {data.long_document_factor}: up-sampling needs a length "
            "and a factor of 2 or more, a run without it neither"
        )
    for name in ("wandb_name", "wandb_mode"):
        if config.log.wandb_project is None and getattr(config.log, name) is not None:
            raise UserError(
                f"log.{name} is {getattr(config.log, name)}, which needs log.wandb_project: "
                "without one nothing goes to Weights & Biases"
            )
    _check_validation(config)
    _check_needles(config)
    if data.global_batch_size % data.micro_batch_size:
        raise UserError(
            f"data.global_batch_size {data.global_batch_size} is not divisible by "
            f"data.micro_batch_size {data.micro_batch_size}"
        )
    if optim.schedule == "cosine" and optim.min_lr > optim.lr:
        raise UserError(f"optim.min_lr {optim.min_lr} is above optim.lr {optim.lr}")
    if config.model.recompute_layers is not None and config.model.recompute != "full":
        raise UserError(
            f"model.recompute_layers is {config.model.recompute_layers}, which needs "
            f"model.recompute full, not {config.model.recompute}"
        )
    if config.model.cuda_graphs:
        _check_cuda_graphs(config)
    _check_loss_weights(transfer)
    if transfer.teacher is None and (transfer.stage == "align" or transfer.kl_weight):
        raise UserError(f"transfer.teacher is needed for stage {transfer.stage} with its weights")
    _check_sequence_length(data, config.strategy)
    _check_parallel_sizes(transfer, config.strategy)
    if config.trainer.precision == "fp8" and not data.reset_at_document_end:
        _check_fp8(data, config.strategy)


def _check_validation(config: RunConfig) -> None:
    paths, every = config.data.validation_paths, config.trainer.validate_every_n_steps
    if bool(paths) != bool(every):
        raise UserError(
            f"data.validation_paths is {paths} and trainer.validate_every_n_steps is {every}: a "
            "validation loss needs both, a run without one neither"
        )
    for path in paths:
        if path in config.data.paths:
            raise UserError(
                f"data.validation_paths names {path}, which data.paths has too: the loss on what "
                "is trained on tells nothing of other text"
            )
    if every and config.model.cuda_graphs:
        raise UserError(
            "trainer.validate_every_n_steps does not go with model.cuda_graphs, whose graphs are "
            "of training steps alone"
        )


def _check_needles(config: RunConfig) -> None:
    """Check that a model decodes as it trains; see `model.decoding`."""
    find_task(config.trainer.needle_task)
    strategy = config.strategy
    for key, is_on in (
        ("strategy.pipeline_model_parallel_size", strategy.pipeline_model_parallel_size > 1),
        ("strategy.context_parallel_size", strategy.context_parallel_size > 1),
        ("model.cuda_graphs", config.model.cuda_graphs),
        ("trainer.precision fp8", config.trainer.precision == "fp8"),
    ):
        if is_on and config.trainer.needles_every_n_steps:
            raise UserError(
                f"trainer.needles_every_n_steps does not go with {key}: hybrids decode on tensor- "
                "and data-parallel ranks alone, without FP8 and CUDA graphs"
            )


def check_ranks(config: RunConfig, num_ranks: int) -> None:
    """Check that a run can be laid out on so many ranks.

    Raises:
        UserError: If it cannot.
    """
    strategy, data = config.strategy, config.data
    if num_ranks % strategy.model_parallel_size:
        raise UserError(
            f"{num_ranks} ranks are not divisible by tensor_model_parallel_size x "
            "pipeline_model_parallel_size x context_parallel_size = "
            f"{strategy.model_parallel_size}"
        )
    data_parallel = num_ranks // strategy.model_parallel_size
    if data.global_batch_size % (data.micro_batch_size * data_parallel):
        raise UserError(
            f"data.global_batch_size {data.global_batch_size} is not divisible by "
            f"data.micro_batch_size {data.micro_batch_size} x {data_parallel} data-parallel ranks"
        )
    if config.trainer.precision != "fp32" and not strategy.use_distributed_optimizer:
        raise UserError(
            f"trainer.precision {config.trainer.precision} needs "
            "strategy.use_distributed_optimizer: Megatron's plain optimizer cannot save "
            "bfloat16 and float32 parameters side by side"
        )


def check_model(config: RunConfig, sizes: ParallelSizes) -> None:
    """Check that a model of such sizes can be cut as a run's layout says, teacher and hybrid.

    For models that are not there yet: of stored ones reading the configuration checks it.

    Raises:
        UserError: If it cannot.
    """
    strategy = config.strategy
    sizes.check(
        "the model",
        strategy.tensor_model_parallel_size,
        strategy.pipeline_model_parallel_size,
        section="strategy.",
    )
    if config.transfer.teacher is not None and strategy.cp_comm_type == "a2a":
        _check_head_exchange("the teacher", sizes, strategy)


def _check_fp8(data: DataSection, strategy: StrategySection) -> None:
    """Check that a rank's tokens fit FP8 products; packed documents are padded to fit."""
    ranks = strategy.context_parallel_size
    if strategy.sequence_parallel:
        ranks *= strategy.tensor_model_parallel_size
    tokens = data.micro_batch_size * data.seq_length // ranks
    if tokens % FP8_TOKEN_MULTIPLE:
        raise UserError(
            f"trainer.precision is fp8, but a micro-batch has {tokens} tokens per rank, which are "
            f"not divisible by {FP8_TOKEN_MULTIPLE}"
        )


def _check_sequence_length(data: DataSection, strategy: StrategySection) -> None:
    """Check that ranks can share a sample's tokens; packed documents are padded to fit."""
    tensor, context = strategy.tensor_model_parallel_size, strategy.context_parallel_size
    if strategy.sequence_parallel and tensor == 1:
        raise UserError("strategy.sequence_parallel needs tensor_model_parallel_size above 1")
    if data.reset_at_document_end:
        return
    if context > 1 and data.seq_length % (2 * context):
        raise UserError(
            f"data.seq_length {data.seq_length} is not divisible by 2 x "
            f"strategy.context_parallel_size = {2 * context}"
        )
    if strategy.sequence_parallel and data.seq_length % (tensor * context):
        raise UserError(
            f"strategy.sequence_parallel is on, but data.seq_length {data.seq_length} is not "
            f"divisible by tensor_model_parallel_size x context_parallel_size = {tensor * context}"
        )


def _check_parallel_sizes(transfer: TransferSection, strategy: StrategySection) -> None:
    """Check that hybrid and teacher can be cut; folders that are none are refused elsewhere."""
    for name in ("init_from", "teacher"):
        folder = getattr(transfer, name)
        sizes = None if folder is None else stored_sizes(folder)
        if sizes is not None:
            sizes.check(
                f"transfer.{name} {folder}",
                strategy.tensor_model_parallel_size,
                strategy.pipeline_model_parallel_size,
                section="strategy.",
            )
            if name == "teacher" and strategy.cp_comm_type == "a2a":
                _check_head_exchange(f"transfer.teacher {folder}", sizes, strategy)


def _check_head_exchange(teacher: str, sizes: ParallelSizes, strategy: StrategySection) -> None:
    """Check what Transformer Engine asserts in a forward; a hybrid's layers check their own."""
    tensor, context = strategy.tensor_model_parallel_size, strategy.context_parallel_size
    for number, what in (
        (sizes.num_attention_heads // tensor, "query heads"),
        (max(1, sizes.num_query_groups // tensor), "query groups"),
    ):
        if number % context:
            raise UserError(
                f"strategy.cp_comm_type is a2a, but the {number} {what} of {teacher} on a "
                "tensor-parallel rank are not divisible by strategy.context_parallel_size "
                f"{context}; p2p and all_gather do not need that"
            )


def _check_cuda_graphs(config: RunConfig) -> None:
    model, data, strategy = config.model, config.data, config.strategy
    for key, value, allowed in (
        ("transfer.stage", config.transfer.stage, ("distill", "long_context")),
        ("data.reset_at_document_end", data.reset_at_document_end, (False,)),
        ("model.recompute", model.recompute, ("none",)),
        ("strategy.pipeline_model_parallel_size", strategy.pipeline_model_parallel_size, (1,)),
        ("strategy.context_parallel_size", strategy.context_parallel_size, (1,)),
        ("strategy.overlap_grad_reduce", strategy.overlap_grad_reduce, (False,)),
    ):
        if value not in allowed:
            raise UserError(
                f"{key} is {value}, with which model.cuda_graphs does not go: it needs "
                f"{' or '.join(map(str, allowed))}"
            )


def _check_loss_weights(transfer: TransferSection) -> None:
    """Fill in the stage's weights; alignment has none."""
    if transfer.stage == "align":
        for name in ("kl_weight", "ce_weight"):
            if getattr(transfer, name) is not None:
                raise UserError(f"transfer.{name} is given, but stage align does not use it")
        return
    if transfer.kl_weight is None:
        transfer.kl_weight = 0.0 if transfer.stage == "long_context" else 1.0
    if transfer.ce_weight is None:
        transfer.ce_weight = 1.0
    if transfer.kl_weight == 0 and transfer.ce_weight == 0:
        raise UserError("transfer.kl_weight and transfer.ce_weight are both 0: nothing to train")
