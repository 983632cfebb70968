"""Tensors as the safetensors files of a Hugging Face folder, written one file at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_hydra.export.modeling_hydra import FLOAT32


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    max_bytes: int,
    dtype: torch.dtype | None = None,
) -> int:
    """Write tensors in files of about a size, and an index that names them if there are several.

    Args:
        folder: Exists, and holds no weights.
        tensors: Names and tensors, each used once; no more than a file's are held.
        max_bytes: Of a file, unless a single tensor is larger.
        dtype: Of all tensors but those of `FLOAT32`; None leaves them as they are.

    Returns:
        Bytes of all tensors.
    """
    held: dict[str, Tensor] = {}
    held_bytes = total_bytes = 0
    written: list[tuple[Path, list[str]]] = []

    def flush() -> None:
        nonlocal held, held_bytes
        path = folder / f"part-{len(written)}.safetensors"
        save_file(held, path, metadata={"format": "pt"})
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors lets nobody else read it
        written.append((path, list(held)))
        held, held_bytes = {}, 0

    for name, tensor in tensors:
        is_small = name.rpartition(".")[2] in FLOAT32
        # A copy: safetensors refuses views of one memory.
        kept = tensor.detach().to("cpu", None if is_small else dtype, copy=True).contiguous()
        if held and held_bytes + kept.nbytes > max_bytes:
            flush()
        assert name not in held, name
        held[name] = kept
        held_bytes += kept.nbytes
        total_bytes += kept.nbytes
    flush()
    _name_files(folder, written, total_bytes)
    return total_bytes


def _name_files(folder: Path, written: list[tuple[Path, list[str]]], total_bytes: int) -> None:
    """By the names that transformers looks for, which tell how many there are."""
    count = len(written)
    if count == 1:
        written[0][0].rename(folder / "model.safetensors")
        return
    weight_map = {}
    for index, (path, names) in enumerate(written, start=1):
        file = path.rename(folder / f"model-{index:05}-of-{count:05}.safetensors")
        weight_map |= dict.fromkeys(names, file.name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", "utf-8")
