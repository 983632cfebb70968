"""Stage 2, distillation: the student's predictions are held to the teacher's, and to the text.

Stage 3 is the same without a teacher: the text alone.

Under pipeline parallelism both models are cut into the same number of stages, and what one stage
hands to the next is the hidden states of both, side by side; the losses belong to the last stage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from hydra_kernels.linear_kl import LinearKLOutput, LossOptions, linear_kl
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor

from megatron_hydra.errors import UserError
from megatron_hydra.model.kernel_choice import choose_fused_kernels
from megatron_hydra.transfer.hidden_states import (
    final_hidden_states,
    stage_hidden_states,
    unwrapped_model,
)

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams


def distillation_loss(
    student: torch.nn.Module,
    teacher: torch.nn.Module | None,
    tokens: Tensor,
    position_ids: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    loss: LossOptions,
    packed_seq_params: PackedSeqParams | None = None,
) -> LinearKLOutput:
    """Run student and teacher on a batch and compare what they predict.

    Without a teacher (and kl_weight 0) it is the next-token loss, in chunks. The student's
    `fused_kernels` chooses what computes it.

    Args:
        student: Megatron GPTModel, bare or wrapped (DDP, Float16Module), holding the last
            pipeline stage.
        teacher: The same for the teacher; runs without gradients. Its hidden size may differ.
        tokens: [b, s] integer.
        position_ids: [b, s] integer.
        labels: [b, s] integer, the next tokens; read only where the loss mask is not 0.
        loss_mask: [b, s] floating point, weight of each token.
        loss: Weights and kind of the divergence, see `hydra_kernels.linear_kl`.
        packed_seq_params: Documents of packed sequences, with b = 1; None for whole sequences.

    Raises:
        UserError: Vocabularies or settings that do not fit, or a label outside the vocabulary on a
            token that counts: the datasets and the run's configuration give them.
        ValueError: If the models do not hold the last pipeline stage.
    """
    student_model = unwrapped_model(student)
    group = student_model.pg_collection.tp
    inputs = (tokens, position_ids, packed_seq_params)
    student_hidden = final_hidden_states(student, *inputs)  # [s, b, h]
    if not student_model.config.sequence_parallel:
        # Each rank's gradient comes from its part of the vocabulary: summed over TP in backward.
        # With sequence parallel the gather's backward does that.
        student_hidden = copy_to_tensor_model_parallel_region(student_hidden, group=group)
    teacher_hidden = teacher_weight = None
    if teacher is not None:
        with torch.no_grad():
            teacher_hidden = final_hidden_states(teacher, *inputs).flatten(0, 1)
        teacher_weight = _output_weight(unwrapped_model(teacher))
    # Labels follow the hidden states' order, token by token of all sequences, rather than the
    # other way round: a transposed gradient would not be contiguous, and megatron-core 0.16 drops
    # the all-reduce of such a tensor.
    impl = choose_fused_kernels(student_model.config.fused_kernels)
    try:
        return linear_kl(
            student_hidden.flatten(0, 1),
            _output_weight(student_model),
            teacher_hidden,
            teacher_weight,
            labels.t().flatten(),
            loss_mask.t().flatten(),
            loss=loss,
            vocab_size=student_model.config.vocab_size,
            group=group,
            impl=impl,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def pipeline_output(
    student: torch.nn.Module,
    teacher: torch.nn.Module | None,
    tokens: Tensor,
    position_ids: Tensor,
    packed_seq_params: PackedSeqParams | None = None,
) -> Tensor:
    """Run student and teacher on a pipeline stage before the last.

    Args:
        student: As in `distillation_loss`, of this stage.
        teacher: The same for the teacher.
        tokens: [b, s] integer.
        position_ids: [b, s] integer.
        packed_seq_params: As in `distillation_loss`.

    Returns:
        For `set_pipeline_input` on the next stage: [s, b, h], or [s, b, h + h of the teacher],
        which has no gradient; s / tp under sequence parallelism.
    """
    inputs = (tokens, position_ids, packed_seq_params)
    hidden = stage_hidden_states(student, *inputs)
    if teacher is None:
        return hidden
    with torch.no_grad():
        teacher_hidden = stage_hidden_states(teacher, *inputs)
    return torch.cat([hidden, teacher_hidden], dim=-1)


def set_pipeline_input(
    student: torch.nn.Module, teacher: torch.nn.Module | None, received: Tensor | None
) -> None:
    """Give both models their part of what the previous stage's `pipeline_output` returned.

    Args:
        student: As in `distillation_loss`, of this stage.
        teacher: The same for the teacher; None if the previous stage had none.
        received: None on the first stage.
    """
    student, teacher_input = unwrapped_model(student), None
    if teacher is not None:
        teacher = unwrapped_model(teacher)
        if received is not None:
            sizes = [student.config.hidden_size, teacher.config.hidden_size]
            received, teacher_input = (x.contiguous() for x in received.split(sizes, dim=-1))
            teacher_input = teacher_input.detach()
        teacher.set_input_tensor(teacher_input)
    student.set_input_tensor(received)


def _output_weight(gpt_model: Any) -> Tensor:
    """[v, h], this TP rank's rows, padding too: the embedding's where they are tied."""
    if gpt_model.share_embeddings_and_output_weights:
        return gpt_model.shared_embedding_or_output_weight()
    return gpt_model.output_layer.weight
