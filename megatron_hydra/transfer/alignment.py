"""Stage 1, alignment: each hybrid attention learns its teacher attention's output, alone.

Teacher-forced: the teacher runs, and every hybrid attention gets the teacher's input of its layer
and is held to the teacher's attention output after the output projection. So the layers are
independent, and the teacher's stream is all that flows from layer to layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_hydra.errors import UserError
from megatron_hydra.transfer.hidden_states import without_output_layer


class Alignment:
    """Holds a student's attentions to a teacher's; the rest of the student is frozen.

    The student's parameters outside its attentions are the teacher's own, so they take the
    teacher's storage: only the hybrid attentions exist beside the teacher.

    Args:
        student: The hybrid; only its attentions require gradients afterwards.
        teacher: The teacher on the same tensor-parallel layout; frozen.

    Raises:
        UserError: If the student does not carry the teacher's weights, or the model is split
            into pipeline stages.
    """

    def __init__(self, student: GPTModel, teacher: GPTModel) -> None:
        if student.config.pipeline_model_parallel_size > 1:
            raise UserError("alignment needs pipeline_model_parallel_size 1")
        trained = list(hybrid_attention_parameters(student))
        student.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        teacher.requires_grad_(False)
        _share_frozen_parameters(student, teacher)
        self.teacher = teacher.eval()
        self.losses: list[Tensor] = []
        self._layer_input: Tensor | None = None
        for student_layer, teacher_layer in zip(
            student.decoder.layers, teacher.decoder.layers, strict=True
        ):
            teacher_layer.register_forward_pre_hook(self._keep_input, with_kwargs=True)
            teacher_layer.self_attention.register_forward_hook(
                self._compare_with(student_layer), with_kwargs=True
            )

    def forward(self, tokens: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        """Run the teacher with the hybrid attentions beside it.

        Args:
            tokens: `[b, s]`, int64.
            position_ids: `[b, s]`, int64.

        Returns:
            `layer_00` and so on: mean squared error of that layer's attention output, float32
            scalars; the stage's loss is their sum. Under sequence parallelism, each rank's share.
        """
        self.losses = []
        with torch.no_grad(), without_output_layer(self.teacher):
            self.teacher(tokens, position_ids, None)
        losses, self.losses = self.losses, []
        return {f"layer_{layer:02d}": loss for layer, loss in enumerate(losses)}

    def _keep_input(self, layer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self._layer_input = args[0] if args else kwargs["hidden_states"]

    def _compare_with(self, student_layer: Any) -> Any:
        def compare(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            # From the layer's input, not the attention's: Transformer Engine fuses the teacher's
            # norm into its attention.
            with torch.enable_grad():
                hidden = student_layer.input_layernorm(self._layer_input)
                found, _ = student_layer.self_attention(
                    hidden, None, rotary_pos_emb=kwargs.get("rotary_pos_emb")
                )
                self.losses.append(_mean_squared_error(found, output[0], student_layer.config))

        return compare


def hybrid_attention_parameters(model: GPTModel) -> Iterator[torch.nn.Parameter]:
    """The parameters that alignment trains: every layer's attention, but for constants."""
    for layer in model.decoder.layers:
        yield from (p for p in layer.self_attention.parameters() if p.requires_grad)


def _mean_squared_error(found: Tensor, target: Tensor, config: Any) -> Tensor:
    """This rank's share of the mean over all tokens: all of it without sequence parallelism."""
    ranks = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return (found.float() - target.float()).square().sum() / (found.numel() * ranks)


def _share_frozen_parameters(student: GPTModel, teacher: GPTModel) -> None:
    of_teacher = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        if parameter.requires_grad or name not in of_teacher:
            continue
        if not torch.equal(parameter, of_teacher[name]):
            raise UserError(
                f"the student's {name} differs from the teacher's: alignment starts from a "
                "hybrid that was converted from this teacher"
            )
        parameter.data = of_teacher[name].data
