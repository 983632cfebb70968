"""The hybrid as a NeMo model: configuration, weights, teacher and the losses of each stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    model_parallel_cuda_manual_seed,
    reduce_from_tensor_model_parallel_region,
)
from nemo.collections import llm
from nemo.lightning.megatron_parallel import MegatronLossReduction
from torch import Tensor

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.build import build_model
from megatron_hydra.model.options import HydraFields
from megatron_hydra.model.sequence import shard_batch
from megatron_hydra.nemo.data import pack_documents
from megatron_hydra.teachers.checkpoint import load_checkpoint
from megatron_hydra.teachers.distributed_weights import load_weights
from megatron_hydra.training.config import TransferSection
from megatron_hydra.training.config_checks import FP8_TOKEN_MULTIPLE
from megatron_hydra.transfer.alignment import Alignment
from megatron_hydra.transfer.distillation import (
    distillation_loss,
    pipeline_output,
    set_pipeline_input,
)
from megatron_hydra.transfer.hidden_states import unwrapped_model

# What a forward step hands to the loss reduction: the loss to minimise as a sum over tokens, the
# number of tokens, and the parts to log, each a sum over tokens.
StepOutput = dict[str, Any]


@dataclass
class HydraGPTConfig(HydraFields, llm.GPTConfig):
    """NeMo's GPTConfig with the hybrid's fields; builds through :func:`build_model`."""

    plan: HeadPlan | None = None
    # Megatron's GPTModel prefers this to the argument that build_model passes.
    position_embedding_type: str = "rope"  # type: ignore[assignment]
    # Losses are sums over tokens; gradients are divided by the tokens of the whole batch, so that
    # neither the number of micro-batches nor of data-parallel ranks shows.
    calculate_per_token_loss: bool = True

    def __post_init__(self) -> None:
        """Check the fields; NeMo runs this again once the parallel sizes are set."""
        self.check_hydra_fields()
        super().__post_init__()

    def configure_model(
        self,
        tokenizer: Any,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """Build this rank's part of the model."""
        return build_model(
            self,  # type: ignore[arg-type]
            self.plan,
            pre_process=pre_process or parallel_state.is_pipeline_first_stage(),
            post_process=post_process or parallel_state.is_pipeline_last_stage(),
            vp_stage=vp_stage,
        )


class HydraModel(llm.GPTModel):
    """A hybrid with the loss of its stage.

    Args:
        config: Of the hybrid.
        transfer: Stage, first weights, teacher and loss weights.
        seed: Of Megatron's model-parallel random numbers.
        teacher_overrides: Configuration fields that the teacher is built with.
        reset_at: The token that ends a document, where everything restarts after it; None for
            samples that run over document ends.
    """

    def __init__(
        self,
        config: HydraGPTConfig,
        transfer: TransferSection,
        seed: int = 1234,
        teacher_overrides: Mapping[str, Any] | None = None,
        reset_at: int | None = None,
    ) -> None:
        super().__init__(config)
        self.transfer = transfer
        self.seed, self.reset_at = seed, reset_at
        self.teacher_overrides = dict(teacher_overrides or {})
        # In a list, so that no module, state dict, DDP or optimizer finds it.
        self._teacher: list[GPTModel] = []
        self._alignment: Alignment | None = None
        # What a pipeline stage before the last has found in the micro-batches of this step.
        self._stage_sums: list[dict[str, Any]] = []

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Build the student, load its first weights, and load the frozen teacher."""
        if hasattr(self, "module"):
            return
        # NeMo seeds this itself only where CUDA is available. Graphs take random numbers from
        # Transformer Engine's tracker alone.
        model_parallel_cuda_manual_seed(
            self.seed, te_rng_tracker=self.config.cuda_graph_impl == "local", force_reset_rng=True
        )
        # Stages of a distillation send each other the hidden states of two models, and packed
        # rows differ in length: not the shape that Megatron expects. Set after its own check,
        # which would ask for a setting of mixtures of experts.
        self.config.variable_seq_lengths = (
            bool(self.transfer.kl_weight) or self.reset_at is not None
        )
        self.module = self.config.configure_model(self.tokenizer, vp_stage=vp_stage)
        load_weights(Path(self.transfer.init_from), self.module)
        if self.transfer.teacher is not None:
            teacher = load_checkpoint(self.transfer.teacher, **self.teacher_overrides).model
            self._teacher = [teacher.eval().requires_grad_(False)]
        if self.transfer.stage == "align":
            self._alignment = Alignment(self.module, self._teacher[0])

    def data_step(self, dataloader_iter: Iterator[Any]) -> dict[str, Any]:
        """This context-parallel rank's part of the next micro-batch, on the model's device.

        Returns:
            `tokens`, `position_ids`, `labels` and `loss_mask`, `[b, s]` each. Where documents
            are packed, b = 1 and there are `token_weights` and `packed_seq_params` too, see
            :func:`pack_documents`.
        """
        batch = next(dataloader_iter)
        batch = batch[0] if isinstance(batch, tuple) else batch
        batch = {name: batch[name] for name in ("tokens", "position_ids", "labels", "loss_mask")}
        cp_group, packed = parallel_state.get_context_parallel_group(), None
        if self.reset_at is not None:
            config = self.config
            multiple_of = FP8_TOKEN_MULTIPLE if config.fp8 else 1
            if config.sequence_parallel:
                multiple_of *= config.tensor_model_parallel_size
            batch, packed = pack_documents(batch, self.reset_at, cp_group.size(), multiple_of)
        batch = shard_batch(batch, cp_group, packed)
        result = {name: values.cuda(non_blocking=True) for name, values in batch.items()}
        return result if packed is None else {**result, "packed_seq_params": _to_device(packed)}

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Take what the previous pipeline stage sent; Megatron's schedule calls this.

        Args:
            input_tensor: One tensor, `[s, b, h]`, wider where a teacher's hidden states lie
                beside the student's; None on the first stage.
        """
        (received,) = input_tensor
        if self._alignment is not None:
            self._alignment.set_pipeline_input(received)
        else:
            set_pipeline_input(unwrapped_model(self.module), self._kl_teacher, received)

    def forward_step(self, batch: dict[str, Any]) -> StepOutput | Tensor:
        """The stage's loss, or hidden states where the pipeline goes on.

        Args:
            batch: As :meth:`data_step` returns it.
        """
        if self._alignment is not None:
            return self._alignment_step(self._alignment, batch)
        if not parallel_state.is_pipeline_last_stage():
            return pipeline_output(
                unwrapped_model(self.module),
                self._kl_teacher,
                batch["tokens"],
                batch["position_ids"],
                batch.get("packed_seq_params"),
            )
        return self._distillation_step(batch)

    def over_pipeline(self, reduced: dict[str, Tensor] | Tensor) -> dict[str, Tensor]:
        """Give every pipeline stage the scalars of a step.

        Args:
            reduced: What the loss reduction returned on the last stage; ignored on the others.

        Returns:
            The mean over the batch's tokens of the loss and each of its parts.
        """
        if parallel_state.get_pipeline_model_parallel_world_size() == 1:
            return reduced
        stage_sums, self._stage_sums = self._stage_sums, []
        if not parallel_state.is_pipeline_last_stage():
            reduced = _SumReduction().reduce(stage_sums) if stage_sums else {}
        # Each part is found on one stage; those of alignment's sums, on every stage.
        zero = torch.zeros((), device=torch.cuda.current_device())
        values = torch.stack([reduced.get(name, zero) for name in self._part_names])
        torch.distributed.all_reduce(
            values, group=parallel_state.get_pipeline_model_parallel_group()
        )
        return dict(zip(self._part_names, values.unbind(), strict=True))

    @property
    def teacher(self) -> GPTModel | None:
        """This rank's part of the frozen teacher; None where the stage has none."""
        return self._teacher[0] if self._teacher else None

    @property
    def _part_names(self) -> list[str]:
        """The loss and its parts, on all pipeline stages together."""
        if self._alignment is None:
            return ["loss", "ce", *(["kl"] if self.transfer.kl_weight else [])]
        layers = [f"alignment/layer_{layer:02d}" for layer in range(self.config.num_layers)]
        return [*layers, "alignment", "loss"]

    @property
    def _kl_teacher(self) -> GPTModel | None:
        return self._teacher[0] if self.transfer.kl_weight else None

    def _alignment_step(self, alignment: Alignment, batch: dict[str, Any]) -> StepOutput | Tensor:
        weights = batch.get("token_weights")
        num_tokens = batch["tokens"].numel() if weights is None else weights.sum()
        layers = alignment.forward(
            batch["tokens"], batch["position_ids"], batch.get("packed_seq_params"), weights
        )
        losses = torch.stack(list(layers.values()))
        shown = losses.detach()
        if self.config.sequence_parallel:  # each rank has its tokens' share
            shown = reduce_from_tensor_model_parallel_region(shown)
        parts = {f"alignment/{layer}": loss for layer, loss in zip(layers, shown, strict=True)}
        parts["alignment"] = parts["loss"] = shown.sum()
        output = alignment.pipeline_output(losses.sum())
        step_output = _step_output(output, num_tokens, parts)
        if parallel_state.is_pipeline_last_stage():
            return step_output
        self._stage_sums.append(_sums(step_output))
        return output

    def _distillation_step(self, batch: dict[str, Any]) -> StepOutput:
        losses = distillation_loss(
            unwrapped_model(self.module),
            self._kl_teacher,
            batch["tokens"],
            batch["position_ids"],
            batch["labels"],
            batch["loss_mask"],
            loss=self.transfer.loss,
            packed_seq_params=batch.get("packed_seq_params"),
        )
        parts = {"loss": losses.loss_sum, "ce": losses.ce_sum}
        if self.transfer.kl_weight:
            parts["kl"] = losses.kl_sum
        return _step_output(losses.loss_sum, losses.num_tokens, parts)

    @property
    def training_loss_reduction(self) -> MegatronLossReduction:
        """Sums the parts over micro-batches and data-parallel ranks."""
        return _SumReduction()


class _SumReduction(MegatronLossReduction):
    """From sums over tokens to means over the batch's tokens."""

    def forward(
        self, batch: Any, forward_out: StepOutput
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return forward_out["loss"], forward_out["num_tokens"], _sums(forward_out)

    def reduce(self, losses_reduced_per_micro_batch: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        names = ["num_tokens", *losses_reduced_per_micro_batch[0]["names"]]
        sums = torch.stack([micro_batch["sums"] for micro_batch in losses_reduced_per_micro_batch])
        total = sums.sum(dim=0)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(total, group=group)
        means = total / total[0].clamp(min=1)
        return dict(zip(names, means.unbind(), strict=True))


def _to_device(packed: PackedSeqParams) -> PackedSeqParams:
    values = {field.name: getattr(packed, field.name) for field in fields(packed)}
    on_device = {
        name: value.cuda(non_blocking=True)
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    return replace(packed, **on_device)


def _sums(output: StepOutput) -> dict[str, Any]:
    sums = torch.stack([output["num_tokens"].float(), *output["parts"].values()])
    return {"sums": sums, "names": output["parts"].keys()}


def _step_output(loss: Tensor, num_tokens: int | Tensor, parts: dict[str, Tensor]) -> StepOutput:
    count = torch.as_tensor(num_tokens, dtype=torch.int, device=loss.device)
    detached = {name: part.detach().float() for name, part in parts.items()}
    return {"loss": loss, "num_tokens": count, "parts": detached}
