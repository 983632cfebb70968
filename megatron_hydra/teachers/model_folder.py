"""What a model folder is, and which of its files hold weights; needs the standard library alone.

Tools ask this before they import PyTorch and Megatron, so that a wrong folder is said at once.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_hydra.errors import UserError
from megatron_hydra.files import content_hash
from megatron_hydra.model.parallel_sizes import ParallelSizes
from megatron_hydra.teachers.config_json import read_config
from megatron_hydra.teachers.tokenizer import find_tokenizer, tokenizer_files

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class WeightFiles:
    """The files that a Hugging Face folder's weights are read from."""

    paths: tuple[Path, ...]
    index: Path | None = None
    """What names several files; None for the one file of an unsharded model."""
    tensors: frozenset[str] = frozenset()
    """The tensors that the index names; transformers passes over any other in these files."""


def is_checkpoint_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether a model folder is a checkpoint folder; else it is a Hugging Face folder.

    Raises:
        UserError: If it is neither, or does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist")
    if (folder / "model.json").is_file():
        return True
    if (folder / "config.json").is_file():
        return False
    raise UserError(
        f"{folder} is neither a checkpoint folder (model.json) "
        "nor a Hugging Face folder (config.json)"
    )


def check_model_folder(folder: str | os.PathLike[str]) -> bool:
    """Read what is small of a model folder, so that a bad one is said before anything takes long.

    Returns:
        As :func:`is_checkpoint_folder`.

    Raises:
        UserError: If the folder does not exist, is of another model, or lacks weights or tokenizer.
    """
    is_checkpoint = is_checkpoint_folder(folder)
    if not is_checkpoint:
        read_config(folder)
        weight_files(folder)
    tokenizer_files(find_tokenizer(folder))
    return is_checkpoint


def peek_metadata(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint folder's model.json as it stands, for what is asked before PyTorch is imported.

    Empty where there is none or it is no JSON object: `checkpoint.read_metadata` says so.
    """
    try:
        meta = json.loads((Path(folder) / "model.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def stored_sizes(folder: str | os.PathLike[str]) -> ParallelSizes | None:
    """What a checkpoint folder's model allows; None as :func:`peek_metadata` is empty."""
    try:
        sizes = ParallelSizes.of(peek_metadata(folder)["config"])
    except (KeyError, TypeError):
        return None
    whole = all(type(size) is int and size > 0 for size in vars(sizes).values())
    return sizes if whole else None


def weights_hash(folder: str | os.PathLike[str]) -> str:
    """Hash (hex) of the contents of a model folder's weights, by which two trainings differ.

    Of a Hugging Face folder it covers the files that are read, of a checkpoint folder those of the
    tensors: what stands beside them has a new name at each save. The same weights saved in another
    form have another hash.

    Raises:
        UserError: If the folder is no model folder, or a file is missing or cannot be read.
    """
    folder = Path(folder)
    if not is_checkpoint_folder(folder):
        return content_hash(weight_files(folder).paths)
    paths = list((folder / "weights").glob("*.distcp"))
    if not paths:
        raise UserError(f"{folder} has no complete weights: {folder}/weights has no files")
    return content_hash(paths)


def weight_files(folder: str | os.PathLike[str]) -> WeightFiles:
    """Choose the weight files of a Hugging Face folder in transformers' order.

    ``model.safetensors`` comes first; an index beside it, stale or not, is not looked at.

    Raises:
        UserError: If there are none, one is missing, the index is damaged or names a file outside
            the folder, or an adapter lies beside, which transformers may load on top of them.
    """
    folder = Path(folder)
    if (folder / _ADAPTER).is_file():
        raise UserError(
            f"{folder} holds an adapter ({_ADAPTER}), which is not read: merge it into its model "
            "(peft's merge_and_unload) and save that, or take the adapter's files out"
        )
    if (folder / _SINGLE).is_file():
        return WeightFiles((folder / _SINGLE,))
    index = folder / _INDEX
    if not index.is_file():
        raise _no_weights(folder)
    weight_map = _read_index(index)
    paths = tuple(folder / name for name in dict.fromkeys(weight_map.values()))
    for path in paths:
        if not path.is_file():
            raise UserError(f"weight file {path} does not exist, which {index} names")
    return WeightFiles(paths, index, frozenset(weight_map))


def _read_index(index: Path) -> dict[str, str]:
    """Tensor -> the name of its file."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the weight map of {index}: {error}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"the weight map of {index} must be an object that names tensors' files")
    for name in weight_map.values():
        # By its words alone: in a download cache the folder's files are links to elsewhere.
        path = PurePosixPath(name) if isinstance(name, str) else None
        if path is None or path.is_absolute() or ".." in path.parts:
            raise UserError(f"{index} names {name!r}, which is no file inside {index.parent}")
    return weight_map


def _no_weights(folder: Path) -> UserError:
    """What to say of a folder without safetensors."""
    others = sorted(folder.glob("pytorch_model*.bin"))
    if not others:
        return UserError(f"weight file {folder / _SINGLE} does not exist")
    return UserError(
        f"{folder} has its weights as {others[0].name} alone, and only safetensors are read: load "
        "it with transformers and save it by save_pretrained(folder, safe_serialization=True)"
    )
