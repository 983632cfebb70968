"""Checkpoint folders: model.json, plan.json, tokenizer/ and Megatron's distributed weights/."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_hydra.errors import UserError
from megatron_hydra.files import read_json, write_beside
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.build import build_model
from megatron_hydra.model.config import HydraConfig
from megatron_hydra.model.options import stored_fields
from megatron_hydra.schema import MAY_LACK, from_json
from megatron_hydra.teachers.config_json import LATER_FIELDS, SHAPE_FIELDS, teacher_hash
from megatron_hydra.teachers.distributed_weights import (
    load_weights,
    save_weights,
    sharded_weights,
)
from megatron_hydra.teachers.license import License
from megatron_hydra.teachers.loading import check_overrides, load_teacher, megatron_fields
from megatron_hydra.teachers.model_folder import is_checkpoint_folder, weights_hash
from megatron_hydra.teachers.tokenizer import find_tokenizer, tokenizer_files

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

SCHEMA_VERSION = 1
_TEACHER_FIELDS = (*SHAPE_FIELDS, "seq_length", "params_dtype")
_STORED_FIELDS = {
    "teacher": _TEACHER_FIELDS,
    "hybrid": tuple(dict.fromkeys((*_TEACHER_FIELDS, *stored_fields()))),
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class _File:
    """The keys of model.json beside its kind and version."""

    config: Mapping[str, Any]
    teacher_config_hash: str
    provenance: Mapping[str, Any]
    teacher_weights_hash: str = field(default="", metadata=MAY_LACK)
    teacher_license: License | None = field(default=None, metadata=MAY_LACK)


@functools.cache
def _config_type(kind: str) -> type:
    """A dataclass of the fields that a checkpoint of this kind stores, all of them known."""
    hints = get_type_hints(HydraConfig, include_extras=True)
    hints["params_dtype"] = Literal[tuple(_DTYPES)]
    stored = {name: hints[name] for name in _STORED_FIELDS[kind]}
    # Where Megatron would derive a size, `int | None`, a checkpoint has it.
    known = {
        name: int if type(None) in get_args(found) else found for name, found in stored.items()
    }
    later = {item.name: item.default for item in fields(HydraConfig) if item.metadata == MAY_LACK}
    later |= LATER_FIELDS
    members: list[Any] = [
        (name, found, field(default=later[name], metadata=MAY_LACK) if name in later else field())
        for name, found in known.items()
    ]
    return make_dataclass(f"{kind}_config", members, kw_only=True)


@dataclass(frozen=True)
class StoredCheckpoint:
    """What a checkpoint folder says of its model."""

    config: HydraConfig
    plan: HeadPlan | None
    """None for a teacher."""
    meta: Mapping[str, Any]
    """model.json, see :func:`read_metadata`."""
    tokenizer_folder: Path


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint(StoredCheckpoint):
    """The same with the model."""

    model: GPTModel
    """Of a teacher, on Megatron's own attention in every layer."""


def save_checkpoint(
    folder: str | Path,
    model: GPTModel | Callable[[Path], None],
    config: HydraConfig,
    plan: HeadPlan | None,
    tokenizer_folder: str | Path,
    provenance: Mapping[str, Any],
    overwrite: bool = False,
    *,
    teacher_weights_hash: str = "",
    teacher_license: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder that any tensor and pipeline layout can load.

    Collective: every rank of the default process group calls it with its part of the model.
    The folder is written beside its place and moved there when it is complete.

    Args:
        folder: On a file system that all ranks see.
        model: Bare GPTModel, without DDP or precision wrappers; or what writes the weights into an
            empty folder, called last.
        config: Of the model.
        plan: None for a teacher.
        tokenizer_folder: Its tokenizer files are copied.
        provenance: Plain JSON: how the weights came to be.
        overwrite: Replace an existing folder.
        teacher_weights_hash: :func:`weights_hash` of the Hugging Face folder that the model was
            converted from, however it was trained since; empty if unknown.
        teacher_license: A :class:`~megatron_hydra.teachers.license.License` of that folder as plain
            JSON; None if unknown.

    Raises:
        UserError: On every rank, before anything is written: no tokenizer, existing output,
            unwritable place.
    """
    kind = "teacher" if plan is None else "hybrid"
    meta = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "config": _plain_config(config, _STORED_FIELDS[kind]),
        "teacher_config_hash": teacher_hash(config),
        "teacher_weights_hash": teacher_weights_hash,
        "teacher_license": teacher_license,
        "provenance": dict(provenance),
    }
    tokenizer = tokenizer_files(find_tokenizer(tokenizer_folder))
    with _output_of_all_ranks(Path(folder), overwrite) as temporary:
        if dist.get_rank() == 0:
            (temporary / "model.json").write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
            if plan is not None:
                plan.save(temporary / "plan.json")
            for file in tokenizer:
                shutil.copy(file, temporary / "tokenizer" / file.name)
        if isinstance(model, torch.nn.Module):
            save_weights(sharded_weights(model), temporary / "weights")
        else:
            model(temporary / "weights")


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """Read and check model.json.

    Returns:
        ``schema_version``, ``kind`` (`teacher` or `hybrid`), ``config`` (HydraConfig's fields as
        plain JSON), ``teacher_config_hash``, ``teacher_weights_hash`` (empty in a folder that an
        earlier release wrote: unknown), ``teacher_license`` (plain
        JSON of a :class:`~megatron_hydra.teachers.license.License`; None alike), ``provenance``.

    Raises:
        UserError: If the folder is no checkpoint folder, or of another schema version.
    """
    path = Path(folder) / "model.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a checkpoint folder: it has no model.json")
    data = read_json(path, tuple(_STORED_FIELDS), SCHEMA_VERSION)
    file = from_json(_File, data, str(path), ("schema_version", "kind"))
    config = from_json(_config_type(data["kind"]), file.config, f"the config in {path}")
    if teacher_hash(config) != file.teacher_config_hash:
        raise UserError(f"{path}: the config does not match its teacher_config_hash")
    return {
        **data,
        "teacher_weights_hash": file.teacher_weights_hash,
        "teacher_license": data.get("teacher_license"),
    }


def check_stored(kind: str, overrides: Mapping[str, Any]) -> None:
    """Check overrides for a new checkpoint: a known field, of the right type, that is stored.

    Args:
        kind: `teacher` or `hybrid`.
        overrides: HydraConfig's fields and values.

    Raises:
        UserError: Naming the field.
    """
    check_overrides(overrides)
    for name in overrides:
        if name not in _STORED_FIELDS[kind]:
            raise UserError(
                f"a {kind} checkpoint does not store {name}: give it where the model is loaded"
            )


def model_fields(
    meta: Mapping[str, Any], params_dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """The keyword arguments of HydraConfig that build the model on one rank.

    Args:
        meta: As :func:`read_metadata` returns it.
        params_dtype: Instead of the stored one.
    """
    stored = dict(meta["config"])
    dtype = _DTYPES[stored.pop("params_dtype")]
    return {**megatron_fields(params_dtype or dtype), **LATER_FIELDS, **stored}


def read_checkpoint(folder: str | Path, **config_overrides: Any) -> StoredCheckpoint:
    """Read all of a checkpoint folder but its weights, for the current parallel layout.

    Args:
        folder: As :func:`save_checkpoint` wrote it, at any layout.
        **config_overrides: HydraConfig's fields, such as ``backend`` or ``seq_length``.

    Raises:
        UserError: If a file is missing or damaged, or they do not belong together.
    """
    folder = Path(folder)
    meta = read_metadata(folder)
    check_overrides(config_overrides)
    values = model_fields(meta, config_overrides.get("params_dtype"))
    config = HydraConfig(**{**values, **_parallel_fields(), **config_overrides})
    plan = None
    if meta["kind"] == "hybrid":
        plan = HeadPlan.load(folder / "plan.json")
        plan.check_teacher(
            config.num_layers,
            config.num_attention_heads,
            config.num_query_groups,
            meta["teacher_config_hash"],
        )
    return StoredCheckpoint(config, plan, meta, folder / "tokenizer")


def load_checkpoint(folder: str | Path, **config_overrides: Any) -> LoadedCheckpoint:
    """Build the model of a checkpoint folder at the current parallel layout and load its weights.

    Collective: every rank calls it and gets its part.

    Args:
        folder: As :func:`read_checkpoint`.
        **config_overrides: See there.

    Raises:
        UserError: If the folder is incomplete, its parts do not belong together, or a part cannot
            be read.
    """
    stored = read_checkpoint(folder, **config_overrides)
    model = build_model(
        stored.config,
        stored.plan,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    load_weights(folder, model)
    return LoadedCheckpoint(model=model, **vars(stored))


def load_any_model(path: str | Path, **config_overrides: Any) -> LoadedCheckpoint:
    """Load a checkpoint folder, or a Hugging Face folder as a teacher on one rank.

    Raises:
        UserError: As :func:`load_checkpoint` or ``load_teacher``, for a folder that is
            neither, and for a Hugging Face folder where the model is to be split over ranks.
    """
    folder = Path(path)
    if is_checkpoint_folder(folder):
        return load_checkpoint(folder, **config_overrides)
    if _parallel_fields() != {name: 1 for name in _parallel_fields()}:
        raise UserError(
            f"{folder} is a Hugging Face folder, which loads on one rank only: "
            "convert it first (megatron-hydra convert)"
        )
    model = load_teacher(folder, **config_overrides)
    meta = {
        "kind": "teacher",
        "teacher_config_hash": teacher_hash(model.config),
        "teacher_weights_hash": weights_hash(folder),
    }
    return LoadedCheckpoint(model.config, None, meta, folder, model=model)


@contextmanager
def _output_of_all_ranks(folder: Path, overwrite: bool) -> Iterator[Path]:
    """:func:`write_beside` on rank 0; every rank gets the temporary folder, or rank 0's error."""
    with ExitStack() as stack:
        answer: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                temporary = stack.enter_context(
                    write_beside(folder, overwrite, kind="folder", marker="model.json")
                )
                for name in ("tokenizer", "weights"):
                    (temporary / name).mkdir(parents=True)
                answer = [str(temporary)]
            except UserError as error:
                answer = [error]
            except OSError as error:
                answer = [UserError(f"cannot write {folder}: {error.strerror}")]
        dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], UserError):
            raise answer[0]
        yield Path(answer[0])
        dist.barrier()
    dist.barrier()


def _plain_config(config: HydraConfig, names: tuple[str, ...]) -> dict[str, Any]:
    plain = {name: getattr(config, name) for name in names}
    plain["params_dtype"] = str(config.params_dtype).removeprefix("torch.")
    return plain


def _parallel_fields() -> dict[str, int]:
    return {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
    }
