"""The loss of distillation, as the transfer calls it: `hydra_kernels.linear_kl` and its errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from hydra_kernels.linear_kl import LinearKLOutput, LossOptions, linear_kl

from megatron_hydra.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


def chunked_distillation_loss(
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
    impl: Literal["reference", "triton"] = "reference",
) -> LinearKLOutput:
    """Divergence from the teacher and cross entropy from hidden states and output weights.

    Args and returns: as `hydra_kernels.linear_kl.linear_kl`.

    Raises:
        UserError: Shapes, vocabularies or settings that do not fit, or a label outside the
            vocabulary on a row that counts: the datasets and the run's configuration give them.
    """
    try:
        return linear_kl(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            loss_mask,
            loss=loss,
            vocab_size=vocab_size,
            group=group,
            impl=impl,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
