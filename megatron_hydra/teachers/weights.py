"""The tensors of a Hugging Face folder, each checked before and after it is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_hydra.errors import UserError
from megatron_hydra.teachers.config_json import read_config, shape_fields
from megatron_hydra.teachers.conversion import expected_shapes
from megatron_hydra.teachers.model_folder import WeightFiles, weight_files
from megatron_hydra.teachers.weight_names import EMBEDDING, OUTPUT_LAYER

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
(_EMBEDDING,), (_OUTPUT_LAYER,) = EMBEDDING.hugging_face, OUTPUT_LAYER.hugging_face


class TeacherWeights:
    """The tensors of a Hugging Face folder's model, which are read in parts.

    Names are transformers', dtypes the file's own. Tied models may carry a copy of the embedding as
    ``lm_head.weight``; it is left out. One with other values is refused: of transformers' releases,
    4 drops it and 5 uses it and does not tie, so that neither reading is surely the one that the
    model was trained with.

    Args:
        folder: Names, shapes and dtypes of all its files are checked before any tensor is read.

    Attributes:
        shapes: Of the model's tensors, by name.

    Raises:
        UserError: For a file that is missing, truncated or not safetensors, a tensor that is
            missing, unknown or of another shape, a dtype other than float32, bfloat16, float16.
    """

    def __init__(self, folder: str | Path) -> None:
        expected = expected_shapes(SimpleNamespace(**shape_fields(read_config(folder))))
        self._files = _find_tensors(weight_files(folder), expected)
        missing = [name for name in expected if name not in self._files]
        if missing:
            raise UserError(f"{folder} lacks tensor {missing[0]} ({len(missing)} missing in all)")
        self.shapes = expected

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some of the tensors, on the CPU; they lie in the files until they are looked at.

        Raises:
            UserError: For a value that is NaN or infinite, and for a copy of a tied embedding that
                is none.
        """
        tensors: dict[str, Tensor] = {}
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        for path, found in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name in found:
                    tensors[name] = file.get_tensor(name)
                    _check_finite(name, tensors[name], path)
        has_copy = _OUTPUT_LAYER in self._files and _OUTPUT_LAYER not in self.shapes
        if has_copy and _EMBEDDING in tensors:
            path = self._files[_OUTPUT_LAYER]
            with safe_open(path, framework="pt") as file:
                _check_copy(file.get_tensor(_OUTPUT_LAYER), tensors[_EMBEDDING], path)
        return tensors

    def read_layer(self, index: int) -> dict[str, Tensor]:
        """A layer's tensors, named as those of a model's first layer."""
        own, first = f"model.layers.{index}.", "model.layers.0."
        tensors = self.read(name for name in self.shapes if name.startswith(own))
        return {first + name.removeprefix(own): tensor for name, tensor in tensors.items()}


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Read every tensor of the model; see :class:`TeacherWeights`."""
    weights = TeacherWeights(folder)
    return weights.read(weights.shapes)


def _find_tensors(files: WeightFiles, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Path]:
    """Tensor -> its file, from the headers of all files."""
    found: dict[str, Path] = {}
    for path in files.paths:
        for name in _check_header(path, expected):
            if name in found:
                raise UserError(f"tensor {name} is in both {found[name]} and {path}")
            found[name] = path
    for name, path in found.items():
        if files.index is not None and name not in files.tensors:
            raise UserError(f"tensor {name} is in {path}, but {files.index} does not name it")
    return found


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A safetensors file's tensors: dtype, as the format writes it, and shape.

    Raises:
        UserError: If it is truncated or no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error})") from error


def _check_header(path: Path, expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Check the names, shapes and dtypes of a file's tensors; return the names."""
    headers = read_header(path)
    # A tied model's copy of its embedding.
    shapes = {_OUTPUT_LAYER: expected[_EMBEDDING], **expected}
    for name, (dtype, shape) in headers.items():
        if name not in shapes:
            raise UserError(f"{path} has tensor {name}, which the model of config.json has not")
        if shape != shapes[name]:
            raise UserError(
                f"tensor {name} in {path} has shape {shape}; config.json asks for {shapes[name]}"
            )
        if dtype not in _DTYPES:
            raise UserError(
                f"tensor {name} in {path} has dtype {dtype}; allowed: {', '.join(_DTYPES)}"
            )
    return list(headers)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; unlike PyTorch's own, without a copy."""
    low, high = tensor.aminmax()  # NaN if one value is
    return bool(low.isfinite() and high.isfinite())


def _check_finite(name: str, tensor: Tensor, path: Path) -> None:
    if is_finite(tensor):
        return
    num_bad = int((~tensor.isfinite()).sum())
    raise UserError(
        f"tensor {name} in {path} has {num_bad:,} of {tensor.numel():,} values that are NaN or "
        "infinite: every output that meets them is lost, so take an intact copy of the model"
    )


def _check_copy(output_layer: Tensor, embedding: Tensor, path: Path) -> None:
    if not torch.equal(output_layer.to(embedding.dtype), embedding):
        raise UserError(
            f"{path} has an {_OUTPUT_LAYER} other than the embedding, but tie_word_embeddings in "
            "config.json says that they are one: set it to false to keep both, or delete the tensor"
        )
