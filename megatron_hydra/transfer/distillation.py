"""Stage 2, distillation: the student's predictions are held to the teacher's, and to the text.

Stage 3 is the same without a teacher: the text alone.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor

from megatron_hydra.transfer.hidden_states import final_hidden_states, unwrapped_model
from megatron_hydra.transfer.losses import DistillationParts, chunked_distillation_loss


def distillation_loss(
    student: torch.nn.Module,
    teacher: torch.nn.Module | None,
    tokens: Tensor,
    position_ids: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    kl_weight: float,
    ce_weight: float,
    chunk_tokens: int,
    temperature: float = 1.0,
) -> DistillationParts:
    """Run student and teacher on a batch and compare what they predict.

    Without a teacher (and kl_weight 0) it is the next-token loss, in chunks.

    Args:
        student: Megatron GPTModel, bare or wrapped (DDP, Float16Module), holding the last
            pipeline stage.
        teacher: The same for the teacher; runs without gradients. Its hidden size may differ.
        tokens: [b, s] integer.
        position_ids: [b, s] integer.
        labels: [b, s] integer, the next tokens; read only where the loss mask is not 0.
        loss_mask: [b, s] floating point, weight of each token.
        kl_weight: Factor on the KL divergence.
        ce_weight: Factor on the cross entropy.
        chunk_tokens: Tokens whose logits exist at once.
        temperature: Softens both distributions of the KL; see `chunked_distillation_loss`.

    Raises:
        UserError: As `chunked_distillation_loss`.
    """
    student_model = unwrapped_model(student)
    group = student_model.pg_collection.tp
    student_hidden = final_hidden_states(student, tokens, position_ids)  # [s, b, h]
    if not student_model.config.sequence_parallel:
        # Each rank's gradient comes from its part of the vocabulary: summed over TP in backward.
        # With sequence parallel the gather's backward does that.
        student_hidden = copy_to_tensor_model_parallel_region(student_hidden, group=group)
    teacher_hidden = teacher_weight = None
    if teacher is not None:
        with torch.no_grad():
            teacher_hidden = final_hidden_states(teacher, tokens, position_ids).flatten(0, 1)
        teacher_weight = _output_weight(unwrapped_model(teacher))
    # Labels follow the hidden states' order, token by token of all sequences, rather than the
    # other way round: a transposed gradient would not be contiguous, and megatron-core 0.16 drops
    # the all-reduce of such a tensor.
    return chunked_distillation_loss(
        student_hidden.flatten(0, 1),
        _output_weight(student_model),
        teacher_hidden,
        teacher_weight,
        labels.t().flatten(),
        loss_mask.t().flatten(),
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        chunk_tokens=chunk_tokens,
        temperature=temperature,
        tp_group=group,
    )


def _output_weight(gpt_model: Any) -> Tensor:
    """[v, h], this TP rank's rows: the embedding's where they are tied."""
    if gpt_model.share_embeddings_and_output_weights:
        return gpt_model.shared_embedding_or_output_weight()
    return gpt_model.output_layer.weight
