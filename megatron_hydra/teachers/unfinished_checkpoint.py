"""A checkpoint's weights written part by part: a conversion that was killed goes on from those.

So no more than a layer is held in memory, either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_hydra.files import write_beside, write_json
from megatron_hydra.model.config import HydraConfig
from megatron_hydra.progress import Progress
from megatron_hydra.teachers.conversion import ends_of
from megatron_hydra.teachers.distributed_weights import join_weights, save_weights
from megatron_hydra.teachers.weight_names import Weight
from megatron_hydra.unfinished import UnfinishedWork

_RECORD = "record.json"


@dataclass(frozen=True)
class Part:
    """A layer of a model, or what lies before or after all of them.

    Attributes:
        number: In the model's order, from 0.
        layer: From 0; None for an end.
        ends: The parameters of an end.
    """

    number: int
    layer: int | None = None
    ends: Sequence[Weight] = ()

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"part_{self.number:04}"


def parts_of(config: HydraConfig) -> list[Part]:
    """A model's parts, in turn."""
    first, last = ends_of(config)
    layers = [Part(index + 1, index) for index in range(config.num_layers)]
    return [Part(0, ends=first), *layers, Part(len(layers) + 1, ends=last)]


class UnfinishedCheckpoint(UnfinishedWork):
    """The parts of a checkpoint that are written: a folder each, and what the next ones need."""

    what = writer = "conversion"
    units = r"(part_\d{4}|measured\.safetensors)"
    words: ClassVar = {
        "teacher.weights": "teacher",
        "teacher.config": "config.json of the teacher",
    }

    def fill(
        self,
        config: HydraConfig,
        make: Callable[[Part], tuple[dict[str, Any], Mapping[str, Any]]],
        progress: Progress,
    ) -> list[dict[str, Any]]:
        """Write the parts that are not there yet.

        Args:
            config: Of the model.
            make: Of a part, what :func:`~megatron_hydra.teachers.distributed_weights.save_weights`
                takes, and plain JSON to keep with it.
            progress: Shows how far it is.

        Returns:
            What was kept with each part.
        """
        parts = parts_of(config)
        for part in progress(parts, "weights", "part"):
            if not (self.path / part.name / _RECORD).is_file():
                with write_beside(self.path / part.name, overwrite=True) as temporary:
                    temporary.mkdir()
                    state, record = make(part)
                    save_weights(state, temporary)
                    write_json(temporary / _RECORD, record)
                del state
        return [self.parsed(f"{part.name}/{_RECORD}") for part in parts]

    def join(self, folder: Path) -> None:
        """Move all parts into an empty folder, as the weights of one checkpoint."""
        parts = sorted(self.path.glob("part_*"))
        for part in parts:  # a run that is killed while they move begins anew
            (part / _RECORD).unlink()
        join_weights(parts, folder)

    def load_measured(self) -> dict[str, Tensor] | None:
        """What was measured of the teacher; None if it is still to be done."""
        path = self.path / "measured.safetensors"
        with suppress(FileNotFoundError):
            return load_file(path)
        return None

    def save_measured(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep what was measured of the teacher."""
        with write_beside(self.path / "measured.safetensors") as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
