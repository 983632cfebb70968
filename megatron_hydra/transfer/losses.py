"""Exact KL to the teacher and cross entropy over a TP-sharded vocabulary, in chunks of tokens.

Shapes: n tokens (rows), c rows of a chunk, h hidden size, v vocabulary entries of this TP rank.

No logits of all tokens ever exist: a chunk's logits are computed from hidden states and output
weights, used for loss and gradient at once, and dropped. Gradients are taken in the forward pass,
as the loss is a scalar: backward merely scales them. Against recomputing in backward this saves
two of six matrix products a chunk, for one float32 buffer of the output weights' size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from megatron_hydra.errors import UserError


class DistillationParts(NamedTuple):
    """Sums over tokens weighted by the loss mask; dividing by `num_tokens` is the caller's.

    All are scalars, float32 (float64 for float64 weights), equal on every TP rank.

    Attributes:
        loss_sum: kl_weight * kl_sum + ce_weight * ce_sum; the only one with a gradient.
        kl_sum: KL(teacher || student), in nats; 0 without a teacher.
        ce_sum: Cross entropy of the labels, in nats.
        num_tokens: Sum of the loss mask.
    """

    loss_sum: Tensor
    kl_sum: Tensor
    ce_sum: Tensor
    num_tokens: Tensor


def chunked_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    kl_weight: float,
    ce_weight: float,
    chunk_tokens: int,
    temperature: float = 1.0,
    tp_group: ProcessGroup | None = None,
) -> DistillationParts:
    """KL(teacher || student) and cross entropy from hidden states and output weights.

    With temperature T both distributions of the KL are softmax(logits / T) and the KL is
    multiplied by T^2, which keeps its gradient's size (Hinton et al., arXiv 1503.02531). The cross
    entropy knows no temperature.

    Args:
        student_hidden: [n, h], the same on every TP rank. Its gradient is this rank's part only:
            whoever hands it in sums over TP.
        student_weight: [v, h], this rank's rows of the output weights, in vocabulary order.
        teacher_hidden: [n, h of the teacher] or None.
        teacher_weight: [v, h of the teacher], or None as teacher_hidden.
        labels: [n] integer, indices into the whole vocabulary.
        loss_mask: [n] floating point.
        kl_weight: Factor on the KL divergence.
        ce_weight: Factor on the cross entropy.
        chunk_tokens: Rows whose logits exist at once, 1 or more.
        temperature: Above 0.
        tp_group: Ranks over which the vocabulary is spread; None for this rank alone.

    Raises:
        UserError: Shapes, vocabularies or settings that do not fit, or a label outside the
            vocabulary on a row that counts.
    """
    shards = _VocabShards(student_weight.shape[0], tp_group)
    _check_settings(kl_weight, chunk_tokens, temperature, teacher_hidden is not None)
    _check_shapes(student_hidden, student_weight, labels, loss_mask)
    if teacher_hidden is not None:
        if teacher_weight.shape[0] != student_weight.shape[0]:
            raise UserError(
                f"teacher and student must share one vocabulary, but on this rank the student's "
                f"output weights are {tuple(student_weight.shape)}, the teacher's "
                f"{tuple(teacher_weight.shape)}"
            )
        _check_shapes(teacher_hidden, teacher_weight, labels, loss_mask)
    _check_labels(labels, loss_mask, shards)
    loss_mask = loss_mask.to(_loss_dtype(student_weight))
    loss_sum, kl_sum, ce_sum = _ChunkedDistillationLoss.apply(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        labels,
        loss_mask,
        _Settings(kl_weight, ce_weight, chunk_tokens, temperature, shards),
        torch.is_grad_enabled(),
    )
    return DistillationParts(loss_sum, kl_sum, ce_sum, loss_mask.sum())


@dataclass(frozen=True)
class _VocabShards:
    """How the vocabulary is spread over TP ranks: equal parts, in order."""

    size: int
    group: ProcessGroup | None

    @property
    def num_shards(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def first(self) -> int:
        return 0 if self.group is None else self.group.rank() * self.size

    def all_reduce(self, x: Tensor, op: ReduceOp.RedOpType) -> Tensor:
        """Reduce x over the ranks in place; x is contiguous and the caller's own."""
        if self.num_shards > 1:
            dist.all_reduce(x, op=op, group=self.group)
        return x


@dataclass(frozen=True)
class _Settings:
    kl_weight: float
    ce_weight: float
    chunk_tokens: int
    temperature: float
    shards: _VocabShards


class _ChunkedDistillationLoss(torch.autograd.Function):
    """Loss sums, with the gradients computed in forward; see the top of the file for why."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        labels: Tensor,
        loss_mask: Tensor,
        settings: _Settings,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight = (grad_enabled and wants for wants in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(student_hidden) if wants_hidden else None
        # Summed over chunks in float32, or bf16 weights would lose the later chunks' share.
        grad_weight = (
            torch.zeros_like(student_weight, dtype=loss_mask.dtype) if wants_weight else None
        )
        kl_sum, ce_sum = loss_mask.new_zeros(()), loss_mask.new_zeros(())
        for start in range(0, labels.shape[0], settings.chunk_tokens):
            rows = slice(start, start + settings.chunk_tokens)
            hidden = student_hidden[rows].to(student_weight.dtype)
            teacher_logits = None
            if teacher_hidden is not None:
                teacher_logits = _logits(teacher_hidden[rows], teacher_weight)
            kl, ce, grad_logits = _chunk_loss(
                _logits(hidden, student_weight),
                teacher_logits,
                labels[rows],
                loss_mask[rows],
                settings,
                with_grad=wants_hidden or wants_weight,
            )
            kl_sum += kl
            ce_sum += ce
            if grad_logits is not None:
                grad_logits = grad_logits.to(student_weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ student_weight
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = student_weight.dtype
        ctx.mark_non_differentiable(kl_sum, ce_sum)
        loss_sum = settings.kl_weight * kl_sum + settings.ce_weight * ce_sum
        return loss_sum, kl_sum, ce_sum

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _chunk_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor,
    settings: _Settings,
    with_grad: bool,
) -> tuple[Tensor | float, Tensor, Tensor | None]:
    """KL and cross entropy sums of c rows, and the weighted loss's gradient of the logits.

    Overwrites the logits, student and teacher [c, v].

    Two collectives: the maxima, then all sums at once. With d = logits less their maximum,
    e = exp(d), Z = sum of e over the whole vocabulary, and T = 1:

        CE = log Z_s - d_s[label]
        KL = sum(e_t (d_t - d_s)) / Z_t - log Z_t + log Z_s
    """
    shards, softening = settings.shards, 1 / settings.temperature
    logits = [student] if teacher is None else [student, teacher]
    maxima = shards.all_reduce(torch.stack([x.amax(dim=-1) for x in logits]), ReduceOp.MAX)
    for x, maximum in zip(logits, maxima):
        x -= maximum[:, None]

    is_ours = (labels >= shards.first) & (labels < shards.first + shards.size)
    column = torch.where(is_ours, labels - shards.first, 0)[:, None]
    hard = student.exp()
    sums = [hard.sum(dim=-1), student.gather(1, column)[:, 0] * is_ours]
    if teacher is not None:
        soft = hard if settings.temperature == 1 else (student * softening).exp()
        target = (teacher * softening).exp()
        difference = teacher.sub_(student).mul_(softening)
        sums += [soft.sum(dim=-1), target.sum(dim=-1), (target * difference).sum(dim=-1)]
    hard_z, label_logit, *sums = shards.all_reduce(torch.stack(sums), ReduceOp.SUM)

    ce = ((hard_z.log() - label_logit) * loss_mask).sum()
    kl: Tensor | float = 0.0
    grad = None
    if with_grad:
        ce_scale = settings.ce_weight * loss_mask
        grad = hard * (ce_scale / hard_z)[:, None]
        grad.scatter_add_(1, column, -(ce_scale * is_ours)[:, None])
    if teacher is not None:
        soft_z, target_z, weighted = sums
        rows = weighted / target_z - target_z.log() + soft_z.log()
        kl = (rows * loss_mask).sum() * settings.temperature**2
        if grad is not None:
            # T^2 of the loss times 1 / T of the softened logits.
            kl_scale = settings.kl_weight * settings.temperature * loss_mask
            residual = (soft / soft_z[:, None]).sub_(target.div_(target_z[:, None]))
            grad.addcmul_(residual, kl_scale[:, None])
    return kl, ce, grad


def _loss_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[c, v], multiplied in the weights' dtype as Megatron does, then in float32 at least."""
    return (hidden.to(weight.dtype) @ weight.t()).to(_loss_dtype(weight))


def _check_settings(
    kl_weight: float, chunk_tokens: int, temperature: float, has_teacher: bool
) -> None:
    if chunk_tokens < 1:
        raise UserError(f"chunk_tokens must be 1 or more, got {chunk_tokens}")
    if temperature <= 0:
        raise UserError(f"temperature must be above 0, got {temperature}")
    if kl_weight != 0 and not has_teacher:
        raise UserError(f"kl_weight is {kl_weight} but there is no teacher: only 0 is allowed")


def _check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise UserError(
            "hidden states and output weights must be [n, h] and [vocabulary, h] with one h, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:1] or loss_mask.shape != labels.shape:
        raise UserError(
            f"{hidden.shape[0]} rows of hidden states need as many labels and mask values, "
            f"got {tuple(labels.shape)} and {tuple(loss_mask.shape)}"
        )


def _check_labels(labels: Tensor, loss_mask: Tensor, shards: _VocabShards) -> None:
    vocab_size = shards.size * shards.num_shards
    outside = ((labels < 0) | (labels >= vocab_size)) & (loss_mask != 0)
    if outside.any():
        raise UserError(
            f"label {labels[outside][0].item()} counts for the loss but lies outside the "
            f"vocabulary: 0 to {vocab_size - 1} are allowed"
        )
