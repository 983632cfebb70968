"""The tensors of a Hugging Face folder, each checked before and after it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_hydra.errors import UserError
from megatron_hydra.teachers.base import EMBEDDING, OUTPUT_LAYER
from megatron_hydra.teachers.config_json import read_config, shape_fields
from megatron_hydra.teachers.conversion import expected_shapes
from megatron_hydra.teachers.model_folder import WeightFiles, weight_files

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
(_EMBEDDING,), (_OUTPUT_LAYER,) = EMBEDDING.hugging_face, OUTPUT_LAYER.hugging_face


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Read every tensor of the model, in transformers' names and the file's own dtype, on the CPU.

    Names, shapes and dtypes of all files are checked before any tensor is read. Tied models may
    carry a copy of the embedding as ``lm_head.weight``; it is left out. One with other values is
    refused: of transformers' releases, 4 drops it and 5 uses it and does not tie, so that neither
    reading is surely the one that the model was trained with.

    Raises:
        UserError: For a file that is missing, truncated or not safetensors, a tensor that is
            missing, unknown or of another shape, a dtype other than float32, bfloat16, float16,
            and a value that is NaN or infinite.
    """
    expected = expected_shapes(SimpleNamespace(**shape_fields(read_config(folder))))
    found = _find_tensors(weight_files(folder), expected)
    missing = [name for name in expected if name not in found]
    if missing:
        raise UserError(f"{folder} lacks tensor {missing[0]} ({len(missing)} missing in all)")
    tensors: dict[str, Tensor] = {}
    for path in dict.fromkeys(found.values()):
        with safe_open(path, framework="pt") as file:
            for name in (name for name in found if found[name] == path):
                tensors[name] = file.get_tensor(name)
                _check_finite(name, tensors[name], path)
    if _OUTPUT_LAYER not in expected and _OUTPUT_LAYER in tensors:
        _check_copy(tensors.pop(_OUTPUT_LAYER), tensors[_EMBEDDING], found[_OUTPUT_LAYER])
    return tensors


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


def _check_header(path: Path, expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Check the names, shapes and dtypes of a file's tensors; return the names."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            headers = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error})") from error
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


def _check_finite(name: str, tensor: Tensor, path: Path) -> None:
    low, high = tensor.aminmax()  # NaN if one value is; unlike isfinite, without a copy
    if low.isfinite() and high.isfinite():
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
