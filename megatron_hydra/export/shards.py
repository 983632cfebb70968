"""The safetensors files of a Hugging Face folder, laid out at once and filled a tensor at a time.

The files are mapped into memory, so that what is filled lies on the disk and not in memory. Their
format is a header's length (8 bytes, little endian), the header (JSON: for each tensor its dtype,
shape and place) and the tensors' bytes, see https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hydra.export.modeling_hydra import FLOAT32
from megatron_hydra.unfinished import UnfinishedWork

Shapes = Mapping[str, tuple[int, ...]]
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 8


@dataclass(frozen=True)
class _Place:
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int = 0

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Shards:
    """Files of weights, each tensor with its place.

    Args:
        folder: Exists.
        shapes: Of all tensors, by name.
        max_bytes: Of a file, unless a single tensor is larger.
        dtype: Of all tensors but those of `FLOAT32`, which keep their precision.
    """

    def __init__(self, folder: Path, shapes: Shapes, max_bytes: int, dtype: torch.dtype) -> None:
        files: list[dict[str, _Place]] = [{}]
        for name, shape in shapes.items():
            is_small = name.rpartition(".")[2] in FLOAT32
            place = _Place(shape, torch.float32 if is_small else dtype)
            held = sum(other.num_bytes for other in files[-1].values())
            if files[-1] and held + place.num_bytes > max_bytes:
                files.append({})
            files[-1][name] = place
        self._places: dict[str, tuple[Path, _Place]] = {}
        self.total_bytes = sum(place.num_bytes for file in files for place in file.values())
        self.names: list[str] = []
        for number, file in enumerate(files, start=1):
            path = folder / _name(number, len(files))
            self._places |= {name: (path, place) for name, place in _create(path, file).items()}
            self.names.append(path.name)
        if len(files) > 1:
            self.names.append("model.safetensors.index.json")
            self._write_index(folder / self.names[-1])

    def place(self, name: str) -> Tensor:
        """A tensor's place in its file, to be filled; it holds what was filled in before."""
        path, place = self._places[name]
        mapped = torch.from_file(
            os.fspath(path), shared=True, size=place.start + place.num_bytes, dtype=torch.uint8
        )
        return mapped[place.start :].view(place.dtype).view(place.shape)

    def fill(self, tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Copy tensors to their places; their names."""
        names = []
        for name, tensor in tensors:
            self.place(name).copy_(tensor.detach())
            names.append(name)
        return names

    def sync(self, names: Iterable[str]) -> None:
        """Have the disk hold what was filled into some tensors' places."""
        for path in {self._places[name][0] for name in names}:
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())

    def _write_index(self, path: Path) -> None:
        weight_map = {name: file.name for name, (file, _) in self._places.items()}
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        path.write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", "utf-8")


def _name(number: int, count: int) -> str:
    """By which transformers looks for a file; it tells how many there are."""
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _create(path: Path, tensors: Mapping[str, _Place]) -> dict[str, _Place]:
    """Make a file of empty places, or take one that is there; where they begin."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The widest first, so that every tensor begins at a multiple of its width.
    for name, place in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        header[name] = {
            "dtype": _CODES[place.dtype],
            "shape": list(place.shape),
            "data_offsets": [end, end + place.num_bytes],
        }
        end += place.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = _ALIGNMENT + len(text)
    with path.open("r+b" if path.is_file() else "xb") as stream:
        # So that a full disk says so now: writing to a mapped file would end the process.
        os.posix_fallocate(stream.fileno(), 0, start + end)
        stream.write(len(text).to_bytes(_ALIGNMENT, "little") + text)
    return {
        name: _Place(place.shape, place.dtype, start + header[name]["data_offsets"][0])
        for name, place in tensors.items()
    }


class UnfinishedExport(UnfinishedWork):
    """The files of an export that was not finished, and which of the model's parts they hold."""

    what = writer = "export"
    units = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|part_\d{4}"

    def has(self, name: str) -> bool:
        """Whether a part is in its places."""
        return (self.path / name).is_file()

    def keep(self, name: str) -> None:
        """Note that a part is in its places."""
        (self.path / name).touch()

    def move(self, names: Sequence[str], folder: Path) -> None:
        """Move finished files into a folder."""
        for note in self.path.glob("part_*"):  # a run that is killed while they move begins anew
            note.unlink()
        for name in names:
            os.replace(self.path / name, folder / name)


def write_shards(
    folder: Path, tensors: Mapping[str, Tensor], max_bytes: int, dtype: torch.dtype
) -> None:
    """Write the tensors of a model that is in memory; arguments as of :class:`Shards`."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    Shards(folder, shapes, max_bytes, dtype).fill(tensors.items())
