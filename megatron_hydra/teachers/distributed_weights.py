"""Megatron's distributed weights: written by the calling process, read with damage named."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException, maybe_load_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.utils import (
    make_sharded_tensor_for_checkpoint,
    make_tp_sharded_tensor_for_checkpoint,
)
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from torch.distributed.checkpoint.storage import WriteResult

from megatron_hydra.errors import UserError
from megatron_hydra.model.mixers.base import Mixer

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


_DCP = "torch.distributed.checkpoint"
# What `.metadata` is made of, beside PyTorch's types of numbers.
_OF_METADATA = {
    *((f"{_DCP}.metadata", name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
    (f"{_DCP}.filesystem", "_StorageInfo"), ("pathlib", "PosixPath"),
    ("torch", "Size"), ("torch.serialization", "_get_layout"),
}  # fmt: skip
_FORMATS = frozenset(_MEM_FORMAT_ENCODING.__members__)  # a pickle may change the enumeration itself


_OTHER_MODEL = "they are those of another model or head plan"


class InProcessSave(torch_strategy.TorchDistSaveShardedStrategy):
    """Megatron's torch_dist format, written by the calling process.

    Megatron's own writer starts a manager process and forks: a script without a main guard would
    run twice, and a fork beside gloo's threads can hang.
    """

    _background_group: ProcessGroup | None = None

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        self._write(self._local_state(sharded_state_dict), checkpoint_dir)

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> AsyncRequest:
        """Copy what this rank is to write; the request, on a thread of its own, writes it.

        The ranks agree on who writes what by a process group that nothing else uses, so that the
        training's collectives on the main thread and these cannot be taken for one another.
        """
        if self._background_group is None:
            self._background_group = torch.distributed.new_group(backend="gloo")
        state = self._local_state(sharded_state_dict, copied=True)
        return AsyncRequest(self._write, (state, checkpoint_dir, self._background_group), [])

    def _local_state(self, sharded_state_dict: Any, copied: bool = False) -> dict[str, Any]:
        state, _, _ = torch_strategy._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        if copied:
            for shard in (shard for shards in state.values() for shard in shards):
                if isinstance(shard, ShardedTensor):
                    shard.data = shard.data.detach().to("cpu", copy=True)
        return torch_strategy.mcore_to_pyt_state_dict(state, False)

    @staticmethod
    def _write(state: dict[str, Any], folder: Any, group: ProcessGroup | None = None) -> None:
        torch_checkpoint.save(
            state,
            storage_writer=torch_checkpoint.FileSystemWriter(folder, thread_count=1),
            planner=torch_strategy.MCoreSavePlanner(
                dedup_replicated_tensors=False, flatten_state_dict=False
            ),
            process_group=group,
        )


def save_weights(state: dict[str, Any], folder: str | Path) -> None:
    """Write a model, or part of one, as Megatron's checkpoints describe it; collective.

    Args:
        state: As :func:`sharded_weights` or :func:`sharded_ends` gives it; an optimizer's may be
            beside it.
        folder: Exists and is empty.
    """
    dist_checkpointing.save(state, str(folder), InProcessSave("torch_dist", 1))


def join_weights(parts: Sequence[Path], folder: Path) -> None:
    """Move what :func:`save_weights` wrote of a model's parts, each on one rank, into one folder.

    Args:
        parts: Folders; each loses its file of tensors.
        folder: Exists and is empty; what it holds then loads as if it had been written at once.
    """
    described: dict[str, Any] = {}
    results: list[list[WriteResult]] = []
    for index, part in enumerate(parts):
        metadata = FileSystemReader(part).read_metadata()
        described |= metadata.state_dict_metadata
        (old,) = {info.relative_path for info in metadata.storage_data.values()}
        new = f"__{index}_0.distcp"
        results.append([
            WriteResult(place, info.length, dataclasses.replace(info, relative_path=new))
            for place, info in metadata.storage_data.items()
        ])  # fmt: skip
        os.replace(part / old, folder / new)
    metadata = dataclasses.replace(metadata, state_dict_metadata=described)
    torch_checkpoint.FileSystemWriter(folder).finish(metadata, results)
    # What no tensor is in is the same of all parts.
    for path in (path for path in parts[-1].iterdir() if not (folder / path.name).exists()):
        shutil.copy(path, folder)


def sharded_weights(model: GPTModel) -> dict[str, Any]:
    """A model's part of the weights, as Megatron's checkpoints describe them."""
    # Extra state holds Transformer Engine's FP8 scales, which are unused and absent elsewhere.
    state = model.sharded_state_dict()
    return {name: value for name, value in state.items() if "_extra_state" not in name}


def sharded_ends(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A model's tensors beside its layers', whole on one rank, as its :func:`sharded_weights`.

    Args:
        tensors: By Megatron's names; a matrix has a row for each token of the vocabulary.
    """
    return {
        name: make_tp_sharded_tensor_for_checkpoint(tensor, name, allow_shape_mismatch=True)
        if tensor.dim() > 1
        else make_sharded_tensor_for_checkpoint(tensor, name)
        for name, tensor in tensors.items()
    }


def load_layer(folder: str | Path, index: int, model: GPTModel) -> None:
    """Load one layer's weights from a checkpoint folder that :func:`check_parts` has passed.

    Args:
        folder: The checkpoint folder.
        index: Of the layer, from 0.
        model: As :func:`~megatron_hydra.model.build.build_layer` made it.

    Raises:
        UserError: If the weights cannot be read or are those of another model, or if a head's decay
            would give NaN.
    """
    weights, own = Path(folder) / "weights", f"decoder.layers.{index}."
    state = _load_some(weights, sharded_weights(model), own)
    first = "decoder.layers.0."
    set_weights(model, {first + name.removeprefix(own): value for name, value in state.items()})
    _check_values(weights, model)


@torch.no_grad()
def load_ends(folder: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Load, into tensors as :func:`sharded_ends` takes them, what lies beside the layers."""
    for name, found in _load_some(Path(folder) / "weights", sharded_ends(tensors)).items():
        if found.data_ptr() != tensors[name].data_ptr():
            tensors[name].copy_(found)


def check_parts(folder: str | Path, num_layers: int, ends: Iterable[str]) -> None:
    """Check that a checkpoint folder's weights are complete, and of a model's parts alone.

    Args:
        folder: The checkpoint folder.
        num_layers: Of the model.
        ends: Names of the tensors beside its layers'.

    Raises:
        UserError: If a file is missing or damaged, or the weights are those of another model.
    """
    weights = Path(folder) / "weights"
    check_weights(weights)
    known = (*(f"decoder.layers.{index}." for index in range(num_layers)), *ends)
    with (weights / ".metadata").open("rb") as stream:
        names = _Metadata(stream).load().state_dict_metadata
    if not all(name.startswith(known) for name in names):
        raise _other_model(weights)


def _load_some(weights: Path, state: dict[str, Any], own: str = "") -> dict[str, Any]:
    """Load part of the weights: all that is asked for, and, if given, all whose names start so."""
    with damage_named(weights):
        found, unasked, lacking = dist_checkpointing.load(
            state, str(weights), strict=dist_checkpointing.validation.StrictHandling.RETURN_ALL
        )
    if lacking or (own and any(name.startswith(own) for name in unasked)):
        raise _other_model(weights)
    return found


def load_weights(folder: str | Path, model: GPTModel) -> None:
    """Load a checkpoint folder's weights into a model of the same shape, at any layout.

    Collective. Every parameter is read and every stored tensor used.

    Raises:
        UserError: On every rank, if the weights cannot be read or are those of another model, or
            if a head's decay would give NaN.
    """
    weights = Path(folder) / "weights"
    check_weights(weights)
    strict = dist_checkpointing.validation.StrictHandling.RAISE_ALL
    with damage_named(weights):
        state = dist_checkpointing.load(sharded_weights(model), str(weights), strict=strict)
    set_weights(model, state)
    _check_values(weights, model)


def _check_values(weights: Path, model: GPTModel) -> None:
    """Ask all heads on all ranks; every rank hears of the first value that cannot be."""
    own = [
        fault
        for layer in model.decoder.layers
        for mixer in layer.modules()
        if isinstance(mixer, Mixer)
        for fault in mixer.faults_of_weights()
    ]
    of_ranks: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(of_ranks, own)
    found = [sentence for sentences in of_ranks for sentence in sentences]
    if found:
        raise UserError(f"cannot use the weights {weights}: {found[0]}")


def set_weights(model: GPTModel, state: dict[str, Any]) -> None:
    """Give a model what was loaded for its :func:`sharded_weights`, all of it and nothing else."""
    result = model.load_state_dict(state, strict=False)
    missing = [key for key in result.missing_keys if "_extra_state" not in key]
    assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)


def check_weights(weights: Path) -> None:
    """Read all files but those of the tensors, of which only the sizes are looked at.

    Nothing that they bring along is run: see :class:`_Metadata`. Sees a file that is missing, cut
    off or too long, whatever a killed process or a full disk may leave. Does not see a changed byte
    inside a tensor's file: reading all of them would take as long as loading does, and
    :func:`damage_named` names what loading finds.

    Raises:
        UserError: If a file is missing or damaged.
    """
    if not (weights / "metadata.json").is_file():  # written last
        raise UserError(
            f"{weights.parent} has no complete weights: {weights}/metadata.json is missing"
        )
    readers = {
        "metadata.json": lambda: maybe_load_config(str(weights)),
        "common.pt": lambda: dist_checkpointing.load_common_state_dict(str(weights)),
        ".metadata": lambda: _file_sizes(weights),
    }
    found = {}
    for name, read in readers.items():
        try:
            found[name] = read()
        except UserError:
            raise
        except Exception as error:  # a damaged pickle may raise anything
            raise UserError(
                f"cannot load the weights {weights}: {name} is missing or damaged "
                f"({type(error).__name__})"
            ) from error
    for name, size in found[".metadata"].items():
        found_size = (weights / name).stat().st_size if (weights / name).is_file() else 0
        if found_size != size:
            raise UserError(
                f"cannot load the weights {weights}: {name} is missing or damaged "
                f"({found_size:,} bytes of {size:,})"
            )


def _file_sizes(weights: Path) -> dict[str, int]:
    """Bytes of each file of tensors, as .metadata has them; the entries of a file fill it."""
    sizes: dict[str, int] = {}
    with (weights / ".metadata").open("rb") as stream:
        metadata = _Metadata(stream).load()
    for entry in metadata.storage_data.values():
        end = entry.offset + entry.length
        sizes[entry.relative_path] = max(end, sizes.get(entry.relative_path, 0))
    return sizes


class _Metadata(pickle.Unpickler):
    """Reads `.metadata` as PyTorch does, but runs nothing that it may say beside."""

    def find_class(self, module: str, name: str) -> Any:
        is_number = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if is_number or (module, name) in _OF_METADATA:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member_of_format
        raise _foreign(f"{module}.{name}")


def _member_of_format(of: Any, name: Any) -> Any:
    """What `getattr` finds, by which early releases of Python 3.11 write a format of memory."""
    if of is _MEM_FORMAT_ENCODING and type(name) is str and name in _FORMATS:
        return getattr(of, name)
    raise _foreign("builtins.getattr")


def _foreign(what: str) -> UserError:
    return UserError(
        f"cannot load weights whose .metadata names {what}: it describes no tensor, and would be "
        "run; no checkpoint of this program has it"
    )


@contextmanager
def damage_named(weights: Path) -> Iterator[None]:
    """Around Megatron's loading of distributed weights.

    Raises:
        UserError: If a tensor is missing or damaged, or the weights are those of another model.
    """
    try:
        yield
    except (CheckpointingException, torch_checkpoint.CheckpointException, OSError) as error:
        raise UserError(f"cannot load the weights {weights}: {_reason(error)}") from error


def _other_model(weights: Path) -> UserError:
    return UserError(f"cannot load the weights {weights}: {_OTHER_MODEL}")


def _reason(error: Exception) -> str:
    if isinstance(error, CheckpointingException):
        return _OTHER_MODEL
    if isinstance(error, torch_checkpoint.CheckpointException):
        error = next(iter(error.failures.values()))[0]  # that of the first rank that failed
    first_sentence = str(error).partition(". ")[0] or type(error).__name__
    return f"a file is missing or damaged ({first_sentence})"
