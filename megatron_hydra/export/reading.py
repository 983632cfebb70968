"""An exported folder read back: its configuration and plan, and its weights a tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_hydra.errors import UserError
from megatron_hydra.export.config import exported_config, exported_shapes
from megatron_hydra.export.folder import CHECKPOINT, PLAN
from megatron_hydra.export.weights import load_layer_tensors
from megatron_hydra.files import parse_json, read_json
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.build import build_layer
from megatron_hydra.model.config import HydraConfig
from megatron_hydra.teachers.checkpoint import SCHEMA_VERSION, model_fields
from megatron_hydra.teachers.distributed_weights import sharded_ends, sharded_weights
from megatron_hydra.teachers.license import license_of
from megatron_hydra.teachers.model_folder import weight_files
from megatron_hydra.teachers.unfinished_checkpoint import Part
from megatron_hydra.teachers.weights import is_finite, read_header

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def read_exported(folder: Path) -> tuple[HydraConfig, HeadPlan, Mapping[str, Any]]:
    """What an exported folder says of its model, whole on one rank.

    Returns:
        Its configuration, its plan, and the model.json of the checkpoint that it comes from.

    Raises:
        UserError: If a file is missing or damaged, or config.json and the plan disagree.
    """
    path = folder / "config.json"
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict) or found.get("model_type") != "hydra_head":
        raise UserError(f"{folder} is no hybrid that `export` wrote: see model_type in {path}")
    plan, meta = (
        HeadPlan.load(folder / PLAN),
        read_json(folder / CHECKPOINT, "hybrid", SCHEMA_VERSION),
    )
    dtype = found.get("dtype", found.get("torch_dtype"))
    if dtype not in _DTYPES:
        raise UserError(f"{path} has dtype {dtype!r}; allowed: {', '.join(_DTYPES)}")
    config = HydraConfig(**model_fields(meta, _DTYPES[dtype]))
    expected = exported_config(config, plan).to_dict()
    for name in ("head_kinds", *sorted(expected)):
        # transformers leaves out what has its default.
        if name in found and name not in _OF_THE_FILE and found[name] != expected[name]:
            raise UserError(
                f"{path} has {name} {found[name]!r}, but {PLAN} and {CHECKPOINT} beside it "
                f"make it {expected[name]!r}"
            )
    license_of(meta, f"{CHECKPOINT} in {folder}")  # says what is wrong with it
    return config, plan, {**meta, "teacher_license": meta.get("teacher_license")}


# What transformers writes of the file rather than of the model.
_OF_THE_FILE = {"architectures", "auto_map", "dtype", "torch_dtype", "transformers_version",
                "tokenizer_class", "use_cache", "initializer_range", "_name_or_path"}  # fmt: skip


class ExportedWeights:
    """The tensors of an exported folder, put into a hybrid's parts.

    Args:
        folder: The exported folder. Names and shapes of all its tensors are checked before any is
            read.
        config: Of the hybrid.
        plan: Its plan.

    Raises:
        UserError: If a tensor is missing, unknown or of another shape, or a file cannot be read.
    """

    def __init__(self, folder: Path, config: HydraConfig, plan: HeadPlan) -> None:
        self._folder, self._config, self._plan = folder, config, plan
        self._files, expected = {}, exported_shapes(config, plan)
        for path in weight_files(folder).paths:
            for name, (_, shape) in read_header(path).items():
                if name not in expected:
                    raise UserError(
                        f"{folder} has tensor {name}, which the model of config.json has not"
                    )
                if shape != expected[name]:
                    raise UserError(
                        f"tensor {name} has shape {shape}; config.json asks for {expected[name]}"
                    )
                self._files[name] = path
        if missing := [name for name in expected if name not in self._files]:
            raise UserError(f"{folder} lacks tensor {missing[0]}")

    def part(self, part: Part) -> tuple[dict[str, Any], dict[str, Any]]:
        """A part's weights, as they are saved, and nothing to keep with them.

        Raises:
            UserError: If a value is NaN or infinite.
        """
        if part.layer is not None:
            model = build_layer(self._config, self._plan, part.layer)
            load_layer_tensors(model.decoder.layers[0], part.layer, self._read)
            return sharded_weights(model), {}
        tensors = {}
        for row in part.ends:
            (name,) = row.hugging_face
            tensors[row.megatron] = self._read(name).to(self._config.params_dtype)
        return sharded_ends(tensors), {}

    def _read(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        if not is_finite(tensor):
            raise UserError(f"tensor {name} in {self._folder} has values that are NaN or infinite")
        return tensor
