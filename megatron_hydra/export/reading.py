"""An exported folder read back: its configuration and plan, and its weights a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_hydra.errors import UserError
from megatron_hydra.export.config import exported_config
from megatron_hydra.export.folder import CHECKPOINT, PLAN
from megatron_hydra.export.weights import load_hybrid_tensors
from megatron_hydra.files import parse_json, read_json
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.config import HydraConfig
from megatron_hydra.teachers.checkpoint import SCHEMA_VERSION, model_fields
from megatron_hydra.teachers.license import license_of
from megatron_hydra.teachers.model_folder import weight_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from megatron.core.models.gpt import GPTModel

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


def load_exported_weights(
    model: GPTModel,
    folder: Path,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> None:
    """Fill a hybrid with a folder's weights, a tensor at a time.

    Args:
        model: As :func:`~megatron_hydra.export.weights.hybrid_tensors` takes it.
        folder: The exported folder.
        progress: Wraps the iteration over layers.

    Raises:
        UserError: If a tensor is missing, unknown, of another shape, NaN or infinite, or a file
            cannot be read.
    """
    with _open(folder) as files:

        def read(name: str) -> Tensor:
            if name not in files:
                raise UserError(f"{folder} lacks tensor {name}")
            tensor: Tensor = files[name].get_tensor(name)
            if not tensor.isfinite().all():
                raise UserError(f"tensor {name} in {folder} has values that are NaN or infinite")
            return tensor

        unknown = sorted({*files} - {*load_hybrid_tensors(model, read, progress)})
    if unknown:
        raise UserError(f"{folder} has tensor {unknown[0]}, which the model of config.json has not")


@contextmanager
def _open(folder: Path) -> Iterator[dict[str, Any]]:
    """Tensor -> its open file."""
    with ExitStack() as stack:
        found: dict[str, Any] = {}
        for path in weight_files(folder).paths:
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path} is truncated or not a safetensors file ({error})"
                ) from error
            found |= dict.fromkeys(file.keys(), file)
        yield found
