"""linear_kl's public function: checks its input, calls the implementation named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch

from hydra_kernels.device import check_device
from hydra_kernels.linear_kl import reference
from hydra_kernels.linear_kl.settings import Settings, VocabShards
from hydra_kernels.loss_options import LossOptions

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

Impl = Literal["reference", "triton"]


class LinearKLOutput(NamedTuple):
    """Sums over tokens weighted by the loss mask; dividing by `num_tokens` is the caller's.

    All are scalars, float32 (float64 for float64 weights), equal on every rank of the group.

    Attributes:
        loss_sum: kl_weight * kl_sum + ce_weight * ce_sum; the only one with a gradient.
        kl_sum: The divergence of `kind`, in nats; 0 without a teacher.
        ce_sum: Cross entropy of the labels, in nats.
        num_tokens: Sum of the loss mask.
    """

    loss_sum: Tensor
    kl_sum: Tensor
    ce_sum: Tensor
    num_tokens: Tensor


def linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    loss: LossOptions,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    impl: Impl,
) -> LinearKLOutput:
    """Exact divergence from a teacher and cross entropy, from hidden states and output weights.

    With p the teacher's distribution, q the student's, both softmax(logits / T), and
    m = beta p + (1 - beta) q:

        forward   KL(p || q)
        reverse   KL(q || p)
        jsd       beta KL(p || m) + (1 - beta) KL(q || m)

    times T^2, which keeps the gradient's size (Hinton et al., arXiv 1503.02531); the generalised
    Jensen-Shannon divergence is that of arXiv 2306.13649, section 3. The cross entropy knows no
    temperature. Logits exist for a chunk of tokens at a time, and never the logits of all.

    Gradients are made in the forward pass, for the student's hidden states and weights where they
    require one; the teacher gets none. A weight that requires none costs neither its matrix
    product nor the float32 sum of its gradient. Rows with mask 0 count nothing and get a gradient
    of exactly 0, whatever finite values stand there.

    Args:
        student_hidden: [n, h], the same on every rank. Its gradient is this rank's part only:
            whoever hands it in sums over the group.
        student_weight: [v, h], this rank's rows of the output weights, in vocabulary order; as
            many on every rank.
        teacher_hidden: [n, h of the teacher] or None.
        teacher_weight: [v, h of the teacher], or None as teacher_hidden. It may be
            student_weight itself.
        labels: [n] integer, indices into the whole vocabulary.
        loss_mask: [n] floating point.
        loss: Weights, kind, beta, temperature, chunks.
        vocab_size: Entries of the whole vocabulary, at least one on every rank; rows of the weights
            beyond are padding, which takes no part and gets a gradient of 0. None if there are
            none.
        group: Ranks over which the vocabulary is spread; None for this rank alone.
        impl: "reference" is PyTorch on any device; "triton" needs CUDA, or Triton's interpreter,
            and bfloat16, float16 or float32. Neither stands in for the other. With "triton" and a
            weight that trains, the gradient takes the place of the float32 sum, so a graph can run
            backward once.

    Raises:
        ValueError: Shapes or vocabularies that do not fit, a weight for a teacher that is not
            there, a label outside the vocabulary on a row that counts. On a GPU the labels' check
            waits once, before any work is launched; while a CUDA graph is captured, which allows
            no wait, it is left out.
    """
    shards = _vocab_shards(student_weight.shape[0], vocab_size, group)
    settings = Settings(**vars(loss), shards=shards)
    if loss.kl_weight != 0 and teacher_hidden is None:
        raise ValueError(
            f"kl_weight is {loss.kl_weight} but there is no teacher: only 0 is allowed"
        )
    if (teacher_hidden is None) != (teacher_weight is None):
        raise ValueError("teacher_hidden and teacher_weight go together, got one of them")
    _check_shapes(student_hidden, student_weight, labels, loss_mask)
    if teacher_hidden is not None:
        if teacher_weight.shape[0] != student_weight.shape[0]:
            raise ValueError(
                f"teacher and student must share one vocabulary, but on this rank the student's "
                f"output weights are {tuple(student_weight.shape)}, the teacher's "
                f"{tuple(teacher_weight.shape)}"
            )
        _check_shapes(teacher_hidden, teacher_weight, labels, loss_mask)
    if shards.size < shards.part:  # or the slice's gradient would be a copy for nothing
        student_weight = student_weight[: shards.size]
        teacher_weight = None if teacher_weight is None else teacher_weight[: shards.size]
    _check_labels(labels, loss_mask, shards)
    loss_mask = loss_mask.to(torch.promote_types(student_weight.dtype, torch.float32))
    tensors = student_hidden, student_weight, teacher_hidden, teacher_weight, labels, loss_mask
    if impl == "reference":
        sums = reference.linear_kl(*tensors, settings)
    elif impl == "triton":
        sums = _triton(*tensors, settings)
    else:
        raise ValueError(f"impl must be one of {get_args(Impl)}, got {impl!r}")
    return LinearKLOutput(*sums, loss_mask.sum())


def _triton(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Triton's kernels around cuBLAS's products."""
    check_device(student_hidden, "triton")
    for name, weight in (("student_weight", student_weight), ("teacher_weight", teacher_weight)):
        if weight is not None and weight.dtype.itemsize not in (2, 4):
            raise ValueError(
                f"impl='triton' takes bfloat16, float16 or float32, got {name} of {weight.dtype}"
            )
    from hydra_kernels.linear_kl import triton_linear_kl

    return triton_linear_kl.linear_kl(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        labels,
        loss_mask,
        settings,
    )


def _vocab_shards(part: int, vocab_size: int | None, group: ProcessGroup | None) -> VocabShards:
    num_shards = 1 if group is None else group.size()
    if vocab_size is None:
        vocab_size = num_shards * part
    if not (num_shards - 1) * part < vocab_size <= num_shards * part:
        raise ValueError(
            f"vocab_size {vocab_size} does not end on the last of {num_shards} ranks, each of "
            f"which has {part} rows of output weights"
        )
    return VocabShards(part, vocab_size, group)


def _check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden states and output weights must be [n, h] and [vocabulary, h] with one h, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:1] or loss_mask.shape != labels.shape:
        raise ValueError(
            f"{hidden.shape[0]} rows of hidden states need as many labels and mask values, "
            f"got {tuple(labels.shape)} and {tuple(loss_mask.shape)}"
        )


def _check_labels(labels: Tensor, loss_mask: Tensor, shards: VocabShards) -> None:
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    outside = ((labels < 0) | (labels >= shards.vocab_size)) & (loss_mask != 0)
    if outside.any():
        raise ValueError(
            f"label {labels[outside][0].item()} counts for the loss but lies outside the "
            f"vocabulary: 0 to {shards.vocab_size - 1} are allowed"
        )
