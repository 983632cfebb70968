"""Stage 1, alignment: each hybrid attention learns its teacher attention's output, alone.

Teacher-forced: the teacher runs, and every hybrid attention gets the teacher's input of its layer
and is held to the teacher's attention output after the output projection. So the layers are
independent, and the teacher's stream is all that flows from layer to layer, and from one pipeline
stage to the next. Each stage's losses are its own; before the last stage they enter the backward
pass through the stage's output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_hydra.errors import UserError
from megatron_hydra.transfer.hidden_states import stage_hidden_states

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams


_FUSED_NORM = "in_proj.layer_norm_weight"


class Alignment:
    """Holds a student's attentions to a teacher's; the rest of the student is frozen.

    The student's parameters outside its attentions are the teacher's own, so they take the
    teacher's storage: only the hybrid attentions exist beside the teacher.

    Args:
        student: This pipeline stage of the hybrid; only its attentions require gradients
            afterwards.
        teacher: The teacher on the same tensor- and pipeline-parallel layout; frozen.

    Raises:
        UserError: If the student does not carry the teacher's weights.
    """

    def __init__(self, student: GPTModel, teacher: GPTModel) -> None:
        trained = list(hybrid_attention_parameters(student))
        student.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        teacher.requires_grad_(False)
        _share_frozen_parameters(student, teacher)
        self.teacher = teacher.eval()
        self.losses: dict[str, Tensor] = {}
        self._token_weights: Tensor | None = None
        self._received: Tensor | None = None
        self._stage_output: Tensor | None = None
        self._layer_input: Tensor | None = None
        self._with_gradients = True
        config = student.config
        for i, (student_layer, teacher_layer) in enumerate(
            zip(student.decoder.layers, teacher.decoder.layers, strict=True)
        ):
            recomputes = config.recompute_granularity == "full" and (
                config.recompute_method == "uniform" or i < config.recompute_num_layers
            )
            teacher_layer.register_forward_pre_hook(self._keep_input, with_kwargs=True)
            teacher_layer.self_attention.register_forward_hook(
                self._compare_with(student_layer, recomputes), with_kwargs=True
            )

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        packed_seq_params: PackedSeqParams | None = None,
        token_weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Run the teacher with the hybrid attentions beside it.

        Args:
            tokens: `[b, s]`, int64.
            position_ids: `[b, s]`, int64.
            packed_seq_params: Documents of packed sequences, with b = 1; None for whole ones.
            token_weights: `[b, s]` floating point, 0 where a token is padding; None for ones.

        Returns:
            `layer_00` and so on, of this pipeline stage, numbered over the whole model: that
            layer's error, summed over this rank's tokens, each the mean square over the channels
            of the attention output; float32 scalars. The stage's loss is their sum. Under
            sequence or context parallelism a rank's tokens are its share.
        """
        self.losses, self._with_gradients = {}, torch.is_grad_enabled()
        self._token_weights = self._as_hidden_states(token_weights)
        with torch.no_grad():
            self._stage_output = stage_hidden_states(
                self.teacher, tokens, position_ids, packed_seq_params
            )
        losses, self.losses, self._layer_input = self.losses, {}, None
        return losses

    def set_pipeline_input(self, received: Tensor | None) -> None:
        """Give the teacher what the previous stage's `pipeline_output` returned; first stage: None.

        Args:
            received: `[s, b, h]`, `s / tp` under sequence parallelism.
        """
        self._received = received
        self.teacher.set_input_tensor(None if received is None else received.detach())

    def pipeline_output(self, loss: Tensor) -> Tensor:
        """What this stage hands to Megatron's schedule after `forward`.

        Args:
            loss: Scalar, what this stage adds to the loss.

        Returns:
            On the last stage `loss`; before it the teacher's hidden states `[s, b, h]` for the
            next stage. The backward pass starts the loss's own, whatever comes from the next
            stage, and hands zeros to the stage before.
        """
        output, self._stage_output = self._stage_output, None
        if self.teacher.post_process:
            output = loss.detach()
        received, self._received = self._received, None
        return _LossBesideOutput.apply(output, loss, received)

    def _keep_input(self, layer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self._layer_input = args[0] if args else kwargs["hidden_states"]

    def _compare_with(self, student_layer: Any, recomputes: bool) -> Any:
        config = student_layer.config

        def compare(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if kwargs.get("inference_context") is not None:
                return  # it generates, beside the training
            layer_input, weights = self._layer_input, self._token_weights
            # A layer without gradients adds its input to its attention's output in place.
            target = output[0].clone() if recomputes else output[0]

            def error(*_: Tensor) -> Tensor:
                # From the layer's input, not the attention's: Transformer Engine fuses the
                # teacher's norm into its attention. A recomputation finds no context of FP8.
                with get_fp8_context(config):
                    found, _ = student_layer.self_attention(
                        student_layer.input_layernorm(layer_input),
                        None,
                        rotary_pos_emb=kwargs.get("rotary_pos_emb"),
                        packed_seq_params=kwargs.get("packed_seq_params"),
                    )
                # [s, b]
                errors = (found.float() - target.float()).square().mean(dim=-1)
                return (errors if weights is None else errors * weights).sum()

            with torch.set_grad_enabled(self._with_gradients):  # the teacher runs without
                if recomputes and self._with_gradients:
                    # Reentrant: the other kind keeps what a kernel stores beside its saved
                    # tensors, as FlashQLA does. It wants an input that has a gradient.
                    anchor = layer_input.new_empty(0).requires_grad_()
                    loss = checkpoint(error, anchor, use_reentrant=True, preserve_rng_state=False)
                else:
                    loss = error()
            # Megatron counts layers from 1.
            self.losses[f"layer_{student_layer.layer_number - 1:02d}"] = loss

        return compare

    def _as_hidden_states(self, token_weights: Tensor | None) -> Tensor | None:
        """`[s, b]`, or this rank's rows of it under sequence parallelism."""
        if token_weights is None:
            return None
        token_weights = token_weights.t().contiguous()
        if self.teacher.config.sequence_parallel:
            group = self.teacher.pg_collection.tp
            return scatter_to_sequence_parallel_region(token_weights, group=group)
        return token_weights


def hybrid_attention_parameters(model: GPTModel) -> Iterator[torch.nn.Parameter]:
    """The parameters that alignment trains: every layer's attention, but for constants.

    The norm before it is the teacher's, also where Transformer Engine fuses it with the projection.
    """
    for layer in model.decoder.layers:
        for name, parameter in layer.self_attention.named_parameters():
            if parameter.requires_grad and not name.endswith(_FUSED_NORM):
                yield parameter


class _LossBesideOutput(torch.autograd.Function):
    """An output whose backward pass starts that of a loss which it does not depend on."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, received: Tensor | None) -> Tensor:
        ctx.save_for_backward(loss, received)
        # A copy: Megatron frees what it has sent, and refuses to free a view.
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, Tensor | None]:
        loss, received = ctx.saved_tensors
        upstream = None if received is None else torch.zeros_like(received)
        return None, torch.ones_like(loss), upstream


def _share_frozen_parameters(student: GPTModel, teacher: GPTModel) -> None:
    of_teacher = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        if name.endswith(_FUSED_NORM):
            name = name.replace("in_proj", "linear_qkv")
        if parameter.requires_grad or name not in of_teacher:
            continue
        if not torch.equal(parameter, of_teacher[name]):
            raise UserError(
                f"the student's {name} differs from the teacher's: alignment starts from a "
                "hybrid that was converted from this teacher"
            )
        parameter.data = of_teacher[name].data
