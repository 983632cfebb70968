"""Teachers that exist only in memory."""

from __future__ import annotations

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_hydra.teachers.conversion import hugging_face_tensors, tensors_by_head


def by_head(teacher: GPTModel) -> dict[str, Tensor]:
    """A whole teacher's weights as a hybrid takes them over, queries, keys and values by head."""
    tensors = {name: p.data for name, p in teacher.named_parameters()}
    return tensors_by_head(teacher.config, hugging_face_tensors(teacher.config, tensors))
