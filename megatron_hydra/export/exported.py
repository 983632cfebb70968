"""A checkpoint's weights put into a Hugging Face folder's files, a part of the model at a time."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_hydra.export.config import exported_shapes
from megatron_hydra.export.shards import Shards, UnfinishedExport
from megatron_hydra.export.weights import layer_tensors
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.build import build_layer
from megatron_hydra.model.config import HydraConfig
from megatron_hydra.progress import Progress
from megatron_hydra.teachers.conversion import ends_of, expected_shapes, hugging_face_tensors
from megatron_hydra.teachers.distributed_weights import check_parts, load_ends, load_layer
from megatron_hydra.teachers.unfinished_checkpoint import Part, parts_of


class Exporting:
    """An export under way.

    Args:
        model: Checkpoint folder.
        config: Its model's.
        plan: None for a teacher.
        work: Open; holds what an export that was killed has finished.
        max_bytes: Of a file of weights, unless a single tensor is larger.
        dtype: Of the weights.

    Raises:
        UserError: If the checkpoint's weights are not complete, or are those of another model.
    """

    def __init__(
        self,
        model: Path,
        config: HydraConfig,
        plan: HeadPlan | None,
        work: UnfinishedExport,
        max_bytes: int,
        dtype: torch.dtype,
    ) -> None:
        self._model, self._config, self._plan, self._work = model, config, plan, work
        ends = [row.megatron for rows in ends_of(config) for row in rows]
        check_parts(model, config.num_layers, ends)
        shapes = expected_shapes(config) if plan is None else exported_shapes(config, plan)
        self._shards = Shards(work.path, shapes, max_bytes, dtype)
        self.total_bytes = self._shards.total_bytes

    def write(self, progress: Progress) -> None:
        """Fill the files with the parts that are not there yet."""
        for part in progress(parts_of(self._config), "weights", "part"):
            if not self._work.has(part.name):
                names = self._ends(part) if part.layer is None else self._layer(part.layer)
                self._shards.sync(names)
                self._work.keep(part.name)

    def move(self, folder: Path) -> None:
        """Move the files into the folder."""
        self._work.move(self._shards.names, folder)

    def _ends(self, part: Part) -> list[str]:
        places = {row.megatron: name for row in part.ends for name in row.hugging_face}
        load_ends(self._model, {row: self._shards.place(name) for row, name in places.items()})
        return list(places.values())

    def _layer(self, index: int) -> list[str]:
        model = build_layer(self._config, self._plan, index)
        load_layer(self._model, index, model)
        if self._plan is None:
            own = hugging_face_tensors(model.config, dict(model.named_parameters()), ends=False)
            first, here = "model.layers.0.", f"model.layers.{index}."
            return self._shards.fill(
                (here + name.removeprefix(first), x) for name, x in own.items()
            )
        return self._shards.fill(layer_tensors(model.decoder.layers[0], index))
