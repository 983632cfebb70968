"""linear_kl in PyTorch, on any device: chunks of tokens, gradients in the forward pass.

Shapes: n tokens (rows), c rows of a chunk, h hidden size, v vocabulary entries of this rank.

As the loss is a scalar, its gradients can be taken in the forward pass and merely scaled in
backward. Against computing the logits again this saves two of six matrix products per chunk, for
one float32 buffer of the output weights' size. All but the products is in float32 at least.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import ReduceOp

if TYPE_CHECKING:
    from torch import Tensor

    from hydra_kernels.linear_kl.settings import Settings


def linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_sum, kl_sum, ce_sum). Args: as `api.linear_kl`; the mask in float32 at least."""
    return _LinearKL.apply(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        labels,
        loss_mask,
        settings,
        torch.is_grad_enabled(),
    )


class _LinearKL(torch.autograd.Function):
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
        settings: Settings,
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
                teacher_logits = _logits(teacher_hidden[rows], teacher_weight, settings)
            kl, ce, grad_logits = _chunk_loss(
                _logits(hidden, student_weight, settings),
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
            # The factor stays in float32: bf16 would round it, and every row alike.
            grad_hidden = (grad_hidden.to(grad_loss.dtype) * grad_loss).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _chunk_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor,
    settings: Settings,
    with_grad: bool,
) -> tuple[Tensor | float, Tensor, Tensor | None]:
    """Divergence and cross entropy sums of c rows, and the weighted loss's gradient of the logits.

    Overwrites the logits, student and teacher [c, v]. With d = logits less their maximum and
    Z = sum of exp(d) over the whole vocabulary, the cross entropy is log Z - d[label].
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
        q = hard if settings.temperature == 1 else student.mul_(softening).exp()
        p = teacher.mul_(softening).exp()
        sums += [q.sum(dim=-1), p.sum(dim=-1)]
    hard_z, label_logit, *soft_z = shards.all_reduce(torch.stack(sums), ReduceOp.SUM)

    counts = loss_mask != 0
    ce = _weighted_sum(hard_z.log() - label_logit, loss_mask)
    kl: Tensor | float = 0.0
    grad = None
    if with_grad:
        ce_scale = settings.ce_weight * loss_mask
        grad = hard * (ce_scale / hard_z)[:, None]
        grad.scatter_add_(1, column, -(ce_scale * is_ours)[:, None])
    if teacher is not None:
        q_z, p_z = (z[:, None] for z in soft_z)
        rows, residual = _divergence(
            teacher.sub_(p_z.log()), student.sub_(q_z.log()), p.div_(p_z), q / q_z, settings
        )
        kl = _weighted_sum(rows, loss_mask) * settings.temperature**2
        if grad is not None:
            # T^2 of the loss times 1 / T of the softened logits.
            kl_scale = settings.kl_weight * settings.temperature * loss_mask
            grad.addcmul_(residual, kl_scale[:, None])
    if grad is not None:
        grad.masked_fill_(~counts[:, None], 0)
    return kl, ce, grad


def _divergence(
    log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """The divergence of each row [c], and its gradient of q's logits [c, v].

    From d KL / d logits = q (g - sum of q g) with g the divergence's derivative by q:

        forward   q - p
        reverse   q (log(q / p) - KL(q || p))
        jsd       (1 - beta) q (log(q / m) - KL(q || m))
    """
    all_reduce = settings.shards.all_reduce
    if settings.kind == "forward":
        rows = all_reduce((p * (log_p - log_q)).sum(-1), ReduceOp.SUM)
        return rows, q - p
    if settings.kind == "reverse":
        log_ratio = log_q - log_p
        rows = all_reduce((q * log_ratio).sum(-1), ReduceOp.SUM)
        return rows, log_ratio.sub_(rows[:, None]).mul_(q)
    beta = settings.jsd_beta
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    log_ratio = log_q - log_m
    terms = [(p * (log_p - log_m)).sum(-1), (q * log_ratio).sum(-1)]
    p_to_m, q_to_m = all_reduce(torch.stack(terms), ReduceOp.SUM)
    residual = log_ratio.sub_(q_to_m[:, None]).mul_(q).mul_(1 - beta)
    return beta * p_to_m + (1 - beta) * q_to_m, residual


def _weighted_sum(rows: Tensor, loss_mask: Tensor) -> Tensor:
    """Rows that do not count may be infinite, and infinity times 0 is no 0."""
    return torch.where(loss_mask != 0, rows * loss_mask, 0).sum()


def _logits(hidden: Tensor, weight: Tensor, settings: Settings) -> Tensor:
    """[c, v], rounded to the weights' dtype or not, then in float32 at least."""
    hidden = hidden.to(weight.dtype)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if not settings.float32_logits or weight.dtype == dtype:
        return (hidden @ weight.t()).to(dtype)
    if weight.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=dtype)
    return hidden.to(dtype) @ weight.to(dtype).t()
