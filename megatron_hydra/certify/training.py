"""Trains one model at one layout with Megatron's own loop, and records all that may differ.

Nothing here is the library's but what finalizes gradients: GPTModel, pipeline schedule, DDP and
optimizer are called as a training script calls them.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_hydra.certify.global_tensors import (
    Piece,
    assemble,
    gradient_pieces,
    parameter_pieces,
    shard_pieces,
)
from megatron_hydra.certify.layouts import Batch, Layout, MicroBatch, micro_batches, row_length
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.build import build_model
from megatron_hydra.model.config import HydraConfig
from megatron_hydra.model.gradients import finalize_model_grads
from megatron_hydra.model.parallel_sizes import real_part
from megatron_hydra.teachers.distributed_weights import save_weights, set_weights, sharded_weights

LEARNING_RATE = 1e-3
# Where a gradient is all rounding error, Adam at its usual 1e-8 would move the parameter by a
# whole learning rate in a random direction.
ADAM_EPS = 1e-6
_BUCKET_SIZE = 10_000  # values; Megatron has it matter only where sums overlap


@dataclass
class Record:
    """What rank 0 knows of a run; tensors are global and on the CPU."""

    logits: dict[str, Tensor] = field(default_factory=dict)
    """`document 3` -> `[tokens, vocab]`, before training, in evaluation mode."""
    losses: list[float] = field(default_factory=list)
    """Mean over the batch's tokens, one per step."""
    grad_norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of the first step, by the checkpoint's names."""
    parameters: dict[str, Tensor] = field(default_factory=dict)
    """After the last step."""
    optimizer_state: dict[str, Tensor] = field(default_factory=dict)
    drift: float = 0.0
    """Largest difference between replicas, of gradients and parameters."""
    drift_at: str = ""
    peak_bytes: list[int] = field(default_factory=list)
    """A rank each."""


@dataclass(frozen=True)
class Run:
    """What all layouts have in common."""

    fields: dict[str, Any]
    """HydraConfig's, without the layout's."""
    plan: HeadPlan
    weights: Path
    """The first weights, as :func:`save_first_weights` wrote them."""
    scratch: Path
    """A folder that all ranks see."""
    num_steps: int = 3

    @property
    def resolved_plan(self) -> HeadPlan:
        return self.plan.resolved(self.fields.get("la_kind", HydraConfig.la_kind))


def save_first_weights(run: Run) -> None:
    """Save random weights of which no part is neutral, from one rank alone.

    At its own initialisation a gate or a norm is the identity, where a swapped head goes unseen.
    """
    (model,) = build_chunks(run, Layout())
    std = run.fields["hidden_size"] ** -0.5
    with torch.no_grad():
        for index, (_, parameter) in enumerate(model.named_parameters()):
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(index)
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter) * (0.2 if parameter.ndim == 1 else std))
    _save({"model0": sharded_weights(model)}, run.weights)


def train(run: Run, layout: Layout, batch: Batch, nudge: bool = False) -> Record:
    """Load the first weights at a layout, train, and record; the parallel state is set up.

    Collective.

    Args:
        run: Model and weights.
        layout: As the parallel state was set up for.
        batch: The whole batch.
        nudge: Change the last bit of the weights at random first: what that does is what
            rounding may do.

    Returns:
        The record on rank 0; on the others one without tensors.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(run, layout, batch)
    trainer.load_weights(run.weights)
    if nudge:
        trainer.nudge_weights()
    return trainer.record(run.num_steps)


class Trainer:
    """A model at a layout with its optimizer and this rank's part of a batch."""

    def __init__(self, run: Run, layout: Layout, batch: Batch) -> None:
        self.run, self.layout = run, layout
        self.chunks = build_chunks(run, layout)
        self.config = self.chunks[0].config
        low = self.config.params_dtype == torch.bfloat16
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_grad_reduce=layout.overlap_grad_reduce,
            bucket_size=_BUCKET_SIZE,
        )
        self.wrapped = [
            DistributedDataParallel(self.config, ddp_config, chunk) for chunk in self.chunks
        ]
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=LEARNING_RATE,
                adam_eps=ADAM_EPS,
                weight_decay=0.0,
                clip_grad=0.5,
                bf16=low,
                params_dtype=self.config.params_dtype,
                use_distributed_optimizer=layout.distributed_optimizer,
                barrier_with_L1_time=False,
            ),
            self.wrapped,
        )
        self.gradients: list[Piece] = []  # of the first step
        # No method of the trainer: the model must not hold the optimizer. Where that has float32
        # parameters, its shares of them hold the model through autograd, where Python sees no
        # cycle, and both would stay in memory.
        self.config.finalize_model_grads_func = partial(_finalize, self.wrapped, self.gradients)
        if layout.overlap_grad_reduce:
            each = [chunk.no_sync for chunk in self.wrapped]
            self.config.no_sync_func = each if len(each) > 1 else each[0]
        self.rows = row_length(batch, layout)
        self.micro_batches = micro_batches(
            batch,
            layout,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            parallel_state.get_context_parallel_rank(),
        )
        self.document_lengths = [len(document) for document in batch.documents]

    def load_weights(self, folder: Path) -> None:
        """Load weights that were saved at any layout."""
        state = self._model_state()
        loaded = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_ALL)
        self._set_weights(loaded)
        self.optimizer.reload_model_params()

    def nudge_weights(self) -> None:
        """Multiply every weight by 1 - eps, 1 or 1 + eps at random; for one rank alone."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for chunk in self.chunks:
                for parameter in chunk.parameters():
                    eps = torch.finfo(parameter.dtype).eps
                    signs = torch.randint(-1, 2, parameter.shape, generator=generator)
                    parameter.mul_(1 + eps * signs.to(parameter))
        self.optimizer.reload_model_params()

    def save(self, folder: Path, with_optimizer: bool = True) -> None:
        """Save weights, and the optimizer's state where that is wanted; collective."""
        state = self._model_state()
        if with_optimizer:
            state["optimizer"] = self._optimizer_state(state, is_loading=False)
        _save(state, folder)

    def load(self, folder: Path) -> None:
        """Load weights and optimizer state that were saved at any layout; collective."""
        # PyTorch's Adam has no state, and so no place to load one into, before its first step.
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.step()
        state = self._model_state()
        state["optimizer"] = self._optimizer_state(state, is_loading=True)
        loaded = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_ALL)
        self._set_weights(loaded)
        self.optimizer.load_state_dict(loaded["optimizer"])

    def record(self, num_steps: int) -> Record:
        """Logits, then `num_steps` steps, and what came out; collective."""
        record = Record()
        logits = assemble(self.logits(), self.run.scratch)
        record.logits = logits.tensors
        for _ in range(num_steps):
            loss, norm = self.step()
            record.losses.append(loss)
            record.grad_norms.append(norm)
        scalars = torch.tensor([record.losses, record.grad_norms], dtype=torch.float64)
        assert self.gradients, "the first step keeps them"
        gradients = assemble(self.gradients, self.run.scratch)
        parameters = parameter_pieces(self.chunks, lambda p: p.data)
        parameters.append(Piece("losses and gradient norms", (2, num_steps), (0, 0), scalars))
        after = assemble(parameters, self.run.scratch)
        after.tensors.pop("losses and gradient norms", None)
        record.gradients, record.parameters = gradients.tensors, after.tensors
        for kind, assembly in (("logits", logits), ("gradient", gradients), ("parameter", after)):
            if assembly.drift > record.drift:
                record.drift, record.drift_at = assembly.drift, f"{kind} {assembly.drift_at}"
        # Megatron's bf16 optimizer describes its state by the place of each parameter among the
        # bf16 ones, which is wrong in a model that has float32 parameters too.
        if not self.layout.distributed_optimizer and self.config.params_dtype == torch.float32:
            record.optimizer_state = self.optimizer_tensors()
        peaks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(peaks, _peak_bytes())
        record.peak_bytes = peaks
        return record

    def step(self) -> tuple[float, float]:
        """One optimizer step; the loss (mean over the batch's tokens) and the gradient norm."""
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
            chunk.train()
        self.optimizer.zero_grad()
        outputs = self._schedule(_loss_step, forward_only=False)
        _, norm, _ = self.optimizer.step()
        return self._mean_loss(outputs), float(norm)

    def state_tensors(self) -> dict[str, Tensor]:
        """Parameters and Adam's moments as global tensors on rank 0; collective."""
        pieces = parameter_pieces(self.chunks, lambda p: p.data)
        return {**assemble(pieces, self.run.scratch).tensors, **self.optimizer_tensors()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Adam's moments as global tensors on rank 0; collective."""
        state = self._optimizer_state(self._model_state(), is_loading=False)
        return assemble(shard_pieces(state), self.run.scratch).tensors

    def _schedule(self, forward_step: Callable, **options: Any) -> list[Any]:
        batches = [iter(self.micro_batches) for _ in self.wrapped]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches if len(batches) > 1 else batches[0],
            model=self.wrapped if len(self.wrapped) > 1 else self.wrapped[0],
            num_microbatches=len(self.micro_batches),
            seq_length=self.rows or 0,
            micro_batch_size=len(self.micro_batches[0].tokens),
            **options,
        )

    def logits(self) -> list[Piece]:
        """This rank's part of the batch's, in evaluation mode; collective."""
        for chunk in self.wrapped:
            chunk.eval()
        with torch.no_grad():
            outputs = self._schedule(_logit_step, forward_only=True, collect_non_loss_data=True)
        if not outputs:
            return []
        vocab = self.config.vocab_size
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        first, number = real_part(vocab, self.layout.tp, tp_rank)
        pieces = []
        for micro_batch, logits in zip(self.micro_batches, outputs, strict=True):
            for document in micro_batch.document.unique().tolist():
                if document < 0:
                    continue
                here = micro_batch.document == document
                shape = (self.document_lengths[document], vocab)
                data = logits[here.to(logits.device)][:, :number].float().cpu()
                pieces.append(
                    Piece(f"document {document}", shape, (0, first), data, micro_batch.place[here])
                )
        return pieces

    def _mean_loss(self, outputs: Sequence[Tensor]) -> float:
        """Over all data- and context-parallel ranks, on every pipeline stage."""
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for output in outputs:
            total += output
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group(True))
        dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
        return (total[0] / total[1]).item()

    def _model_state(self) -> dict[str, Any]:
        return {f"model{i}": sharded_weights(chunk) for i, chunk in enumerate(self.chunks)}

    def _set_weights(self, loaded: dict[str, Any]) -> None:
        for index, chunk in enumerate(self.chunks):
            set_weights(chunk, loaded[f"model{index}"])

    def _optimizer_state(self, model_state: dict[str, Any], is_loading: bool) -> Any:
        metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
        merged = {f"{chunk}.{k}": v for chunk, s in model_state.items() for k, v in s.items()}
        return self.optimizer.sharded_state_dict(merged, is_loading=is_loading, metadata=metadata)


def build_chunks(run: Run, layout: Layout) -> list[GPTModel]:
    """This rank's model chunks, bare."""
    config = HydraConfig(**{**run.fields, **layout.config_fields()})
    chunks = []
    for vp_stage in range(layout.vpp or 1):
        stage = vp_stage if layout.vpp else None
        chunk = build_model(
            config,
            run.plan,
            pre_process=parallel_state.is_pipeline_first_stage(
                ignore_virtual=False, vp_stage=stage
            ),
            post_process=parallel_state.is_pipeline_last_stage(
                ignore_virtual=False, vp_stage=stage
            ),
            vp_stage=stage,
        )
        chunks.append(chunk.cuda())
    return chunks


def _loss_step(
    batches: Iterator[MicroBatch], model: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    batch = next(batches)
    losses = _forward(batch, model, labels=batch.labels.cuda())
    return losses, partial(_masked_sum, batch.loss_mask.cuda())


def _masked_sum(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = (losses.float() * loss_mask).sum()
    count = loss_mask.sum()
    return total, count.int(), torch.stack((total.detach(), count)).double()


def _logit_step(
    batches: Iterator[MicroBatch], model: torch.nn.Module
) -> tuple[Tensor, Callable[..., Tensor]]:
    return _forward(next(batches), model), lambda logits, non_loss_data: logits


def _forward(batch: MicroBatch, model: torch.nn.Module, **kwargs: Any) -> Tensor:
    if batch.packed_seq_params is not None:
        kwargs["packed_seq_params"] = batch.packed_seq_params
    return model(batch.tokens.cuda(), batch.positions.cuda(), None, **kwargs)


def _finalize(
    wrapped: Sequence[DistributedDataParallel], kept: list[Piece], *args: Any, **kwargs: Any
) -> None:
    """Megatron's `finalize_model_grads_func`, which keeps the first gradients."""
    finalize_model_grads(*args, **kwargs)
    if not kept:
        kept += gradient_pieces(wrapped)


def _save(state: dict[str, Any], folder: Path) -> None:
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    save_weights(state, folder)


def _peak_bytes() -> int:
    """Of the GPU since the layout began; of the process since its start where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
