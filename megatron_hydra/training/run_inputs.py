"""What a run reads: where it lies, and whether it is still what the run began with; no NeMo."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_hydra.errors import UserError
from megatron_hydra.files import content_hash
from megatron_hydra.teachers.model_folder import peek_metadata, weights_hash
from megatron_hydra.training.config import HELD_BY_CONTENT, DataSection, RunConfig

_TOKEN_ENDINGS = (".idx", ".bin")
_DATASET_ENDINGS = (*_TOKEN_ENDINGS, ".json")
# What ft_launcher gives its ranks: the place where it listens.
_LISTENER = "FT_RANK_MONITOR_IPC_SOCKET"


def input_paths(config: RunConfig) -> list[tuple[str, Path]]:
    """Each folder and file that the run reads, with the key that names it."""
    found = [("transfer.init_from", Path(config.transfer.init_from))]
    if config.transfer.teacher is not None:
        found.append(("transfer.teacher", Path(config.transfer.teacher)))
    for key, prefixes in (
        ("data.paths", config.data.paths),
        ("data.validation_paths", config.data.validation_paths),
    ):
        for prefix in prefixes:
            found += [(key, Path(f"{prefix}{ending}")) for ending in _DATASET_ENDINGS]
    return found


def check_present(config: RunConfig) -> None:
    """Check that what the run needs is there, and the model built for such long samples.

    Of everything else the run's own checks tell, seconds later: they need the slow imports.

    Raises:
        UserError: On the first that is not.
    """
    for key, path in input_paths(config):
        if not key.startswith("data.") and not (path / "model.json").is_file():
            raise UserError(f"{path} is not a checkpoint folder: it has no model.json")
    check_datasets_present(config.data)
    _check_sequence_length(config)
    _check_wandb(config)


def check_datasets_present(section: DataSection) -> None:
    """Check that the datasets are there.

    Raises:
        UserError: On the first that is not.
    """
    for prefix in (*section.paths, *section.validation_paths):
        for ending in _TOKEN_ENDINGS:
            if not Path(f"{prefix}{ending}").is_file():
                raise UserError(
                    f"no indexed dataset {prefix}: {prefix}{ending} is missing "
                    "(see megatron-hydra preprocess)"
                )


def input_hashes(config: RunConfig) -> dict[str, str]:
    """Content hashes of what the run reads, by key; empty for what is not there (any more)."""
    transfer = config.transfer
    return {
        "transfer.init_from": _weights_hash(transfer.init_from),
        "transfer.teacher": "" if transfer.teacher is None else _weights_hash(transfer.teacher),
        "data.paths": datasets_hash(config.data),
    }


def datasets_hash(section: DataSection) -> str:
    """A cheap hash (hex) of what the datasets hold, in the order of their paths.

    Equal for equal tokens and documents, see :func:`~megatron_hydra.files.content_hash`; empty if a
    file is missing.

    Raises:
        UserError: If a file cannot be read.
    """
    datasets = [[Path(f"{path}{ending}") for ending in _TOKEN_ENDINGS] for path in section.paths]
    if not all(file.is_file() for files in datasets for file in files):
        return ""
    return hashlib.sha256("\n".join(map(content_hash, datasets)).encode()).hexdigest()


def _weights_hash(folder: str) -> str:
    return weights_hash(folder) if Path(folder).is_dir() else ""


def result_bytes(config: RunConfig) -> tuple[int, int]:
    """Bytes of the trained hybrid, and the least that one checkpoint of the run has.

    By the weights that the run starts from; 0 where these are damaged, which others tell.
    """
    folder = Path(config.transfer.init_from)
    stored = sum(file.stat().st_size for file in folder.glob("weights/*") if file.is_file())
    model = _model_fields(folder)
    num_parameters = stored // (4 if model.get("params_dtype") == "float32" else 2)
    return stored, checkpoint_bytes(config, num_parameters)


def checkpoint_bytes(config: RunConfig, num_parameters: int) -> int:
    """The least that one checkpoint of a run has, whose hybrid has so many parameters."""
    is_float32 = config.trainer.precision == "fp32"
    per_parameter = 4 if is_float32 else 2
    if config.transfer.stage != "align":  # which has optimizer state of the attentions alone
        per_parameter += 8 if is_float32 else 12  # Adam's moments, and float32 weights
    return num_parameters * per_parameter


def _model_fields(folder: Path) -> dict[str, Any]:
    """The model's fields in model.json; none where it is damaged, as its own reader will say."""
    model = peek_metadata(folder).get("config")
    return model if isinstance(model, dict) else {}


def _check_sequence_length(config: RunConfig) -> None:
    """Only the stage whose purpose it is takes a model beyond the length it is built for."""
    if config.transfer.stage == "long_context":
        return
    longest = _model_fields(Path(config.transfer.init_from)).get("seq_length")
    if isinstance(longest, int) and config.data.seq_length > longest:
        raise UserError(
            f"data.seq_length is {config.data.seq_length}, but transfer.init_from "
            f"{config.transfer.init_from} is built for {longest} tokens: choose {longest} or "
            "fewer, or extend the model with transfer.stage=long_context"
        )


def _check_wandb(config: RunConfig) -> None:
    """By its metadata: where W&B has run once, a folder `wandb` passes for the package."""
    if config.log.wandb_project is None:
        return
    try:
        importlib.metadata.version("wandb")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"log.wandb_project is {config.log.wandb_project}, but the package wandb is not "
            "installed here: pip install wandb, or set log.wandb_project to null"
        ) from None


def check_heartbeat(config: RunConfig) -> None:
    """Check that heartbeats have a listener, if the run is to send any.

    Raises:
        UserError: If another launcher has started this process.
    """
    seconds = config.strategy.heartbeat_seconds
    if seconds is None or _LISTENER in os.environ:
        return
    try:
        importlib.metadata.version("nvidia-resiliency-ext")
        found = "has not started this process"
    except importlib.metadata.PackageNotFoundError:
        found = "is not installed here: pip install nvidia-resiliency-ext"
    raise UserError(
        f"strategy.heartbeat_seconds is {seconds:g}, but ft_launcher of nvidia-resiliency-ext "
        f"{found}; start the ranks with it in torchrun's place, or set the key to null"
    )


def moved_inputs(old: RunConfig, new: RunConfig) -> set[str]:
    """The keys under which ``new`` names other places than ``old``, however they are spelt."""

    def places(config: RunConfig) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {key: [] for key in HELD_BY_CONTENT}
        for key, path in input_paths(config):
            if key in found:
                found[key].append(path.resolve())
        return found

    there, here = places(old), places(new)
    return {key for key in HELD_BY_CONTENT if there[key] != here[key]}


def check_same_inputs(
    saved: Mapping[str, str],
    found: Mapping[str, str],
    moved: Collection[str],
    config: RunConfig,
    where: Path,
) -> None:
    """Check that a run goes on with what it began with.

    Args:
        saved: Content hashes that the run began with, by key; a key may be missing, or its hash
            empty, in what an earlier release has written.
        found: The same of what the run would read now.
        moved: Keys of :func:`moved_inputs`: all there is to go by where a hash is not known.
        config: The run's configuration.
        where: What ``saved`` was read from.

    Raises:
        UserError: Naming the first that has changed.
    """
    for key in HELD_BY_CONTENT:
        is_known = bool(saved.get(key)) and bool(found.get(key))
        is_same = saved[key] == found[key] if is_known else key not in moved
        if not is_same:
            section, name = key.split(".")
            value = getattr(getattr(config, section), name)
            raise UserError(
                f"{where} was trained with another {key} than {value} holds now: put back what "
                "the run began with, or choose another log.folder"
            )
