"""linear_kl on a GPU: cuBLAS's products, Triton's passes over a chunk's logits between them.

Shapes: n tokens (rows), c rows of a chunk, h hidden size, v vocabulary entries of this rank.

The student's logits of a chunk become their own gradient in place, so that the two products of the
gradient run over the whole chunk. The teacher's logits are needed only while the gradient of the
same rows is made: they exist for a part of the chunk at a time. Logits and gradient are written
once and read twice (thrice for the jsd); nothing waits for the device.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch.distributed import ReduceOp

from hydra_kernels.linear_kl.triton_kernels import (
    GROUP,
    NUM_FACTORS,
    NUM_STATISTICS,
    gradient_kernel,
    jsd_sums_kernel,
    merge_kernel,
    scale_kernel,
    statistics_kernel,
)
from hydra_kernels.loss_options import TEACHER_SHARE

if TYPE_CHECKING:
    from torch import Tensor

    from hydra_kernels.linear_kl.settings import Settings

_logger = logging.getLogger(__name__)

# Columns that a program of the statistics holds: 8 per thread, one 16-byte load in bf16.
_BLOCK, _NUM_WARPS = 1024, 4
_MOST_BLOCKS = 8  # of a split
_GRADIENT_BLOCK, _GRADIENT_NUM_WARPS = 4096, 8
_MERGED_ROWS = 32
_PADDING = 64  # elements; rows of logits begin on 128 bytes
_FIRST_NARROWED = 2**20


def linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_sum, kl_sum, ce_sum). Args: as `api.linear_kl`; the mask in float32."""
    return _LinearKL.apply(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        labels.contiguous(),
        loss_mask.contiguous(),
        settings,
        torch.is_grad_enabled(),
    )


class _LinearKL(torch.autograd.Function):
    """Loss sums, with the gradients computed in forward; backward scales them."""

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
        num_tokens = labels.shape[0]
        # Where nothing runs, nothing is written.
        allocate = torch.empty_like if num_tokens else torch.zeros_like
        grad_hidden = allocate(student_hidden) if wants_hidden else None
        weight_sum = allocate(student_weight, dtype=torch.float32) if wants_weight else None
        rows_of_loss = loss_mask.new_zeros(2, num_tokens)  # divergence, cross entropy
        chunk = _Chunk(
            student_weight,
            teacher_weight,
            settings,
            min(settings.chunk_tokens, num_tokens),
            stacked=not wants_weight and _is_same(student_weight, teacher_weight),
        )
        for start in range(0, num_tokens, settings.chunk_tokens):
            rows = slice(start, start + settings.chunk_tokens)
            hidden = student_hidden[rows].to(student_weight.dtype)
            gradient = chunk.losses(
                hidden,
                None if teacher_hidden is None else teacher_hidden[rows],
                labels[rows],
                loss_mask[rows],
                rows_of_loss[:, rows],
                with_gradient=wants_hidden or wants_weight,
            )
            if grad_hidden is not None:
                grad_hidden[rows] = gradient @ student_weight
            if weight_sum is not None:
                _add_product(weight_sum, gradient.t(), hidden, is_first=start == 0)
        kl_sum, ce_sum = rows_of_loss.sum(dim=1)
        ctx.save_for_backward(grad_hidden)
        ctx.weight_sum, ctx.weight_dtype = weight_sum, student_weight.dtype
        ctx.wants_weight = wants_weight
        ctx.mark_non_differentiable(kl_sum, ce_sum)
        return settings.kl_weight * kl_sum + settings.ce_weight * ce_sum, kl_sum, ce_sum

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        grad_weight = None
        if ctx.wants_weight:
            if ctx.weight_sum is None:
                raise RuntimeError(
                    "backward ran before: the gradient of the output weights took the place of "
                    "its sum, so impl='triton' allows one backward; name impl='reference' for more"
                )
            grad_weight = _scaled_in_place(ctx.weight_sum, grad_loss, ctx.weight_dtype)
            ctx.weight_sum = None
        if grad_hidden is not None:
            # The factor stays in float32: bf16 would round it, and every row alike.
            grad_hidden = (grad_hidden.float() * grad_loss).to(grad_hidden.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


class _Chunk:
    """The buffers of a chunk's logits, used again by every chunk, and the passes over them.

    Args:
        student_weight: [v, h].
        teacher_weight: [v, h of the teacher] or None.
        settings: The loss's settings.
        num_rows: Rows of the largest chunk.
        stacked: The weights are one matrix: multiply both models' hidden states at once.
    """

    def __init__(
        self,
        student_weight: Tensor,
        teacher_weight: Tensor | None,
        settings: Settings,
        num_rows: int,
        stacked: bool,
    ) -> None:
        self.student_weight, self.teacher_weight = student_weight, teacher_weight
        self.settings, self.stacked = settings, stacked
        self.part_rows = num_rows
        if teacher_weight is not None and not stacked:
            self.part_rows = max(1, int(num_rows * TEACHER_SHARE))
        dtype, num_columns = student_weight.dtype, student_weight.shape[0]

        def buffer(rows: int, dtype: torch.dtype) -> Tensor:
            stride = triton.cdiv(num_columns, _PADDING) * _PADDING
            return student_weight.new_empty(rows, stride, dtype=dtype)[:, :num_columns]

        self.in_place = not settings.float32_logits or dtype == torch.float32
        both = 2 if stacked else 1
        if self.in_place:
            self.logits = buffer(both * num_rows, dtype)
            self.gradient = self.logits[:num_rows]
        else:
            self.logits = buffer(both * self.part_rows, torch.float32)
            self.gradient = buffer(num_rows, dtype)
        self.teacher_logits = None
        if teacher_weight is not None and not stacked:
            teacher_dtype = torch.float32 if settings.float32_logits else teacher_weight.dtype
            self.teacher_logits = buffer(self.part_rows, teacher_dtype)

    def losses(
        self,
        hidden: Tensor,
        teacher_hidden: Tensor | None,
        labels: Tensor,
        loss_mask: Tensor,
        rows_of_loss: Tensor,
        with_gradient: bool,
    ) -> Tensor:
        """Write a chunk's losses [2, c]; the gradient of its logits, [c, v].

        The gradient's memory is the next chunk's.
        """
        num_rows = hidden.shape[0]
        gradient = self.gradient[:num_rows]
        whole = self.in_place and not self.stacked
        if whole:
            _product(hidden, self.student_weight, gradient)
        for start in range(0, num_rows, self.part_rows):
            part = slice(start, min(start + self.part_rows, num_rows))
            teacher_part = None if teacher_hidden is None else teacher_hidden[part]
            if whole:
                student, teacher = gradient[part], self._teacher(teacher_part)
            else:
                student, teacher = self._both(hidden[part], teacher_part)
            _row_losses(
                student,
                teacher,
                labels[part],
                loss_mask[part],
                rows_of_loss[:, part],
                gradient[part] if with_gradient else None,
                self.settings,
            )
        return gradient

    def _both(self, hidden: Tensor, teacher_hidden: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Student's and teacher's logits of a part."""
        num_rows = hidden.shape[0]
        if self.stacked:
            hidden = torch.cat((hidden, teacher_hidden.to(hidden.dtype)))
        logits = _product(hidden, self.student_weight, self.logits[: hidden.shape[0]])
        if self.stacked:
            return logits[:num_rows], logits[num_rows:]
        return logits, self._teacher(teacher_hidden)

    def _teacher(self, hidden: Tensor | None) -> Tensor | None:
        if hidden is None:
            return None
        hidden = hidden.to(self.teacher_weight.dtype)
        return _product(hidden, self.teacher_weight, self.teacher_logits[: hidden.shape[0]])


def _row_losses(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor,
    rows_of_loss: Tensor,
    gradient: Tensor | None,
    settings: Settings,
) -> None:
    """Losses [2, c] and gradient [c, v] of c rows from their logits [c, v].

    One collective; one more for the jsd.
    """
    shards, has_teacher = settings.shards, teacher is not None
    num_rows, num_columns = student.shape
    softening = 1 / settings.temperature
    flags = {"HAS_TEACHER": has_teacher, "KIND": settings.kind}
    is_soft = settings.temperature != 1
    logits = (student, teacher if has_teacher else student)
    strides = tuple(x.stride(0) for x in logits)
    # As even splits as blocks and groups of them allow; as many on every rank, also on one whose
    # columns end in padding: a split without columns counts nothing.
    num_blocks = triton.cdiv(shards.part, _BLOCK)
    num_blocks = triton.cdiv(num_blocks, triton.cdiv(num_blocks, _MOST_BLOCKS))
    num_blocks = GROUP.value * triton.cdiv(num_blocks, GROUP.value)
    num_splits = triton.cdiv(shards.part, num_blocks * _BLOCK)
    grid = (num_rows, num_splits)
    loop = {"NUM_BLOCKS": num_blocks, "BLOCK": _BLOCK, "num_warps": _NUM_WARPS}

    num_stored = NUM_STATISTICS if has_teacher else 3
    statistics = loss_mask.new_empty(num_splits, num_stored, num_rows)
    statistics_kernel[grid](
        *logits, labels, loss_mask, statistics, num_rows, *strides, num_columns,
        shards.first, softening, **flags, IS_SOFT=is_soft, **loop,
    )  # fmt: skip
    statistics = shards.all_gather(statistics)
    factors = loss_mask.new_empty(NUM_FACTORS, num_rows)
    merge_kernel[(triton.cdiv(num_rows, _MERGED_ROWS),)](
        statistics, loss_mask, *rows_of_loss, factors, num_rows, len(statistics),
        settings.kl_weight, settings.ce_weight, settings.temperature, **flags,
        SPLITS=triton.next_power_of_2(len(statistics)), ROWS=_MERGED_ROWS, num_warps=4,
    )  # fmt: skip
    if has_teacher and settings.kind == "jsd":
        sums = loss_mask.new_empty(num_splits, 2, num_rows)
        jsd_sums_kernel[grid](
            *logits, loss_mask, factors, sums, num_rows, *strides, num_columns,
            softening, settings.jsd_beta, **loop,
        )  # fmt: skip
        p_to_m, q_to_m = shards.all_reduce(sums.sum(dim=0), ReduceOp.SUM)
        factors[5] = q_to_m
        rows = settings.jsd_beta * p_to_m + (1 - settings.jsd_beta) * q_to_m
        rows = rows * loss_mask * settings.temperature**2
        # Rows that do not count were never summed: their numbers are whatever lay there.
        rows_of_loss[0] = torch.where(loss_mask != 0, rows, 0.0)
    if gradient is not None:
        gradient_kernel[(num_rows, triton.cdiv(num_columns, _GRADIENT_BLOCK))](
            *logits, labels, loss_mask, factors, gradient, num_rows, *strides,
            gradient.stride(0), num_columns, shards.first, settings.ce_weight, softening,
            settings.jsd_beta, **flags, IS_SOFT=is_soft, BLOCK=_GRADIENT_BLOCK,
            num_warps=_GRADIENT_NUM_WARPS,
        )  # fmt: skip


def _is_same(x: Tensor, y: Tensor | None) -> bool:
    """Whether both name the same memory in the same way."""
    return (
        y is not None
        and (x.data_ptr(), x.shape, x.stride(), x.dtype)
        == (y.data_ptr(), y.shape, y.stride(), y.dtype)
    )  # fmt: skip


def _product(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """hidden @ weight^T into out, whose dtype is the weight's or float32."""
    if out.dtype == weight.dtype:
        return torch.mm(hidden, weight.t(), out=out)
    if weight.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    return torch.mm(hidden.to(out.dtype), weight.t().to(out.dtype), out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    """total (+)= left @ right, total in float32; the first product writes over what was there."""
    beta = 0 if is_first else 1
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, beta=beta, out=total)
    elif not left.is_cuda:
        torch.addmm(total, left.to(total.dtype), right.to(total.dtype), beta=beta, out=total)
    elif _adds_in_float32(left.dtype, left.device):
        # cuBLAS adds as it writes: no product of the weights' size of its own.
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)
    elif is_first:
        total.copy_(left @ right)
    else:
        total += left @ right


@functools.cache
def _adds_in_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this PyTorch's addmm adds bf16's product to a float32 sum; it says so once if not."""
    total = torch.zeros(16, 16, device=device)
    x = torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, x, x, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError) as error:
        _logger.warning(
            "PyTorch %s cannot add a product in %s to a float32 sum (%s): each chunk's gradient of "
            "the output weights is rounded before it is added, and takes memory of its own",
            torch.__version__, dtype, error,
        )  # fmt: skip
        return False
    return True


def _scaled_in_place(total: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """total * scale in dtype, within total's own memory.

    A narrower result is written from the front: elements a to 2a of it end where element a of the
    total begins, so each step, which doubles what is done, writes over what was read before.
    """
    if total.dtype == dtype:
        return total.mul_(scale)
    source, target = total.view(-1), total.view(-1).view(dtype)
    num_elements = source.numel()
    done = min(_FIRST_NARROWED, num_elements)
    target[:done] = source[:done] * scale
    while done < num_elements:
        end = min(2 * done, num_elements)
        # PyTorch's own product with another dtype's output reads one element at a time.
        grid = (triton.cdiv(end - done, _BLOCK),)
        scale_kernel[grid](source, target, scale, done, end, BLOCK=_BLOCK, num_warps=_NUM_WARPS)
        done = end
    return target[:num_elements].view_as(total)
