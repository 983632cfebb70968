"""The models that answer by generating text: Hugging Face folders and checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hydra.errors import UserError
from megatron_hydra.export.code import brings_code
from megatron_hydra.head_plan import HeadPlan, LayerHeadPlan
from megatron_hydra.selection.shape import ModelShape
from megatron_hydra.teachers.config_json import FIELDS, read_config, read_keys, shape_fields
from megatron_hydra.teachers.families import FAMILIES
from megatron_hydra.teachers.model_folder import (
    check_model_folder,
    is_checkpoint_folder,
    peek_metadata,
    stored_sizes,
    weight_files,
)

if TYPE_CHECKING:
    from megatron_hydra.evaluation.checkpoint_generator import CheckpointGenerator
    from megatron_hydra.export.generating import Generator

_HYBRID = "hydra_head"


@dataclass(frozen=True)
class AskedModel:
    """A model by its folder, of which small files alone are read until it is asked.

    Attributes:
        path: The folder.
        is_checkpoint: A checkpoint answers under Megatron, a Hugging Face folder by transformers.
        has_code: Whether transformers is to run the folder's own model code.
    """

    path: Path
    is_checkpoint: bool
    has_code: bool = False

    @classmethod
    def of(cls, path: Path, is_trusted: bool = False) -> AskedModel:
        """Check a folder.

        Args:
            path: The folder.
            is_trusted: Run a Hugging Face folder's code even if it is not what this release
                exports.

        Raises:
            UserError: If it cannot be asked.
        """
        if not is_checkpoint_folder(path):
            read_keys(path / "config.json")
            weight_files(path)
            return cls(path, False, brings_code(path, is_trusted))
        check_model_folder(path)
        _plan_of(path)
        return cls(path, True)

    @property
    def built_for(self) -> int | None:
        """Tokens that the model is built for; None where its folder does not say."""
        name, config = "max_position_embeddings", {}
        if not self.is_checkpoint:
            config = _config(self.path)
        elif isinstance(stored := peek_metadata(self.path).get("config"), dict):
            name, config = "seq_length", stored
        found = config.get(name)
        return found if isinstance(found, int) else None

    def origin(self) -> dict[str, Any]:
        """Where it lies, and what a checkpoint says of how it and its plan came to be; as JSON."""
        if not self.is_checkpoint:
            return {"path": str(self.path)}
        found = {"path": str(self.path), "weights": peek_metadata(self.path)["provenance"]}
        plan = _plan_of(self.path)
        if plan is not None:  # but for the reasons of each head
            own = plan.provenance.items()
            found["plan"] = {key: value for key, value in own if key != "explanation"}
        return found

    def shape_and_plan(self) -> tuple[ModelShape | None, HeadPlan | None]:
        """What costs are counted from, and a hybrid's plan; None where it is of no kind known here.

        A teacher's costs are those of its shape; what a hybrid of it would be has no part in it.
        """
        if self.is_checkpoint:
            shape = ModelShape.from_fields(peek_metadata(self.path)["config"])
            return shape, _plan_of(self.path)
        config = _config(self.path)
        if config.get("model_type") == _HYBRID:
            return _exported_shape(config), _exported_plan(config)
        if config.get("model_type") not in FAMILIES:
            return None, None
        return ModelShape.from_fields(shape_fields(read_config(self.path))), None

    def generator(self, forward_tokens: int | None = None) -> Generator | CheckpointGenerator:
        """Its tokenizer, and the model once it is asked; imports what runs it.

        Args:
            forward_tokens: As a Hugging Face folder's `Generator` has it.
        """
        if self.is_checkpoint:
            from megatron_hydra.evaluation.checkpoint_generator import CheckpointGenerator

            return CheckpointGenerator(self.path)
        from megatron_hydra.export.generating import Generator

        return Generator(self.path, self.has_code, forward_tokens)


def _config(folder: Path) -> Mapping[str, Any]:
    """What stands in config.json; of a hybrid also what it leaves out, as it has its default."""
    found = read_keys(folder / "config.json")
    if found.get("model_type") != _HYBRID:
        return found
    from megatron_hydra.export.configuration_hydra import HydraHeadConfig

    return vars(HydraHeadConfig.from_pretrained(folder)) | {"model_type": _HYBRID}


def _exported_shape(config: Mapping[str, Any]) -> ModelShape:
    """An exported hybrid calls its sizes as teachers do, and what its heads are as we do."""
    sizes = {ours: config[theirs] for theirs, ours in FIELDS.items()}
    return ModelShape.from_fields({**config, **sizes})


def _exported_plan(config: Mapping[str, Any]) -> HeadPlan:
    layers = tuple(LayerHeadPlan(tuple(kinds)) for kinds in config["head_kinds"])
    return HeadPlan(layers, config["num_key_value_heads"])


def _plan_of(checkpoint: Path) -> HeadPlan | None:
    """A hybrid's; None for a teacher."""
    if peek_metadata(checkpoint).get("kind") == "teacher":
        return None
    return HeadPlan.load(checkpoint / "plan.json")


def check_layout(models: Iterable[AskedModel], tensor_parallel: int | None) -> int:
    """See that the ranks can hold the models.

    Args:
        models: All that are asked.
        tensor_parallel: Ranks that hold a model together; None for all that there are.

    Returns:
        The tensor-parallel size.

    Raises:
        UserError: Naming the model that does not fit, or the number of ranks.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    tensor = num_ranks if tensor_parallel is None else tensor_parallel
    if tensor < 1 or num_ranks % tensor:
        raise UserError(
            f"the number of ranks, {num_ranks}, is not divisible by the tensor-parallel size "
            f"{tensor}: start torchrun with a multiple of it"
        )
    for model in models:
        if num_ranks > 1 and not model.is_checkpoint:
            raise UserError(
                f"{model.path} is a Hugging Face folder, which answers on one rank: evaluate it "
                "without torchrun"
            )
        sizes = stored_sizes(model.path) if model.is_checkpoint else None
        if sizes is not None:
            sizes.check(str(model.path), tensor)
    return tensor
