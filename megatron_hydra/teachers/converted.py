"""The parts of a checkpoint that is converted from a Hugging Face folder, filled one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.build import build_layer
from megatron_hydra.model.config import HydraConfig
from megatron_hydra.parallel import initialize_model_parallel
from megatron_hydra.progress import Progress
from megatron_hydra.teachers.attention_statistics import start_from_attention
from megatron_hydra.teachers.calibration import Measured, measure_heads
from megatron_hydra.teachers.conversion import tensors_by_head
from megatron_hydra.teachers.distributed_weights import sharded_ends, sharded_weights
from megatron_hydra.teachers.loading import load_weights_into
from megatron_hydra.teachers.unfinished_checkpoint import Part, UnfinishedCheckpoint
from megatron_hydra.teachers.weight_names import EMBEDDING
from megatron_hydra.teachers.weight_reuse import (
    ReuseSummary,
    count_new,
    part_of_model,
    reuse_teacher_weights,
)
from megatron_hydra.teachers.weights import TeacherWeights

_SEED = 1234


class Converted:
    """A hybrid that starts from its teacher's weights, or the teacher itself.

    Args:
        config: Of the checkpoint.
        plan: None for the teacher.
        weights: The teacher's.
        reuse: What of a hybrid starts from them, the rest at random.
    """

    def __init__(
        self,
        config: HydraConfig,
        plan: HeadPlan | None,
        weights: TeacherWeights,
        reuse: Literal["all", "no_attention", "nothing"] = "all",
    ) -> None:
        self._config, self._plan, self._weights, self._reuse = config, plan, weights, reuse
        self._measured = Measured()

    def measure(
        self,
        work: UnfinishedCheckpoint,
        batches: Sequence[Tensor],
        recurrence: bool,
        progress: Progress,
    ) -> None:
        """Measure the teacher's heads, unless ``work`` has it of a conversion that was killed.

        Args:
            work: Keeps what is measured.
            batches: Token ids `[b, s]`, int64.
            recurrence: Whether also what recurrent heads are to start from.
            progress: Shows how far it is.
        """
        found = work.load_measured()
        if found is None:
            found = measure_heads(
                self._config,
                self._weights,
                batches,
                progress(range(self._config.num_layers), "head scales", "layer"),
                rms=self._config.has_head_scales,
                attention=recurrence,
            ).tensors()
            work.save_measured(found)
        self._measured = Measured.of(found)

    def part(self, part: Part) -> tuple[dict[str, Any], dict[str, Any]]:
        """A part's weights, as they are saved, and where its values came from, as plain JSON."""
        # Each has random numbers of its own, whatever was made before it.
        initialize_model_parallel(seed=_SEED + part.number)
        state, summary = self._ends(part) if part.layer is None else self._layer(part.layer)
        return state, summary.to_dict()

    @torch.no_grad()
    def _ends(self, part: Part) -> tuple[dict[str, Any], ReuseSummary]:
        summary, tensors = ReuseSummary(), {}
        for row in part.ends:
            (name,) = row.hugging_face
            shape = self._weights.shapes[name]
            tensor = torch.ones(shape, dtype=self._config.params_dtype)
            if self._reuse != "nothing":
                tensor.copy_(self._weights.read([name])[name])
            elif len(shape) > 1:
                config = self._config
                (config.embedding_init_method if row is EMBEDDING else config.init_method)(tensor)
            counts = summary.new if self._reuse == "nothing" else summary.reused
            counts[part_of_model(row.megatron)] += tensor.numel()
            tensors[row.megatron] = tensor
        return sharded_ends(tensors), summary

    def _layer(self, index: int) -> tuple[dict[str, Any], ReuseSummary]:
        is_hybrid, summary = self._plan is not None, ReuseSummary()
        model = build_layer(self._config, self._plan, index, initialize=is_hybrid)
        if not is_hybrid:
            load_weights_into(model, self._weights.read_layer(index), ends=False)
        elif self._reuse == "nothing":
            count_new(model, summary)
        else:
            tensors = tensors_by_head(model.config, self._weights.read_layer(index), ends=False)
            rms, attention = self._measured.of_layer(index)
            summary = reuse_teacher_weights(model, tensors, rms, self._reuse == "all")
            if attention is not None:
                start_from_attention(model, attention, summary)
        return sharded_weights(model), summary
