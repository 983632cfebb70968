"""All families of teachers, and which one a model is of; needs the standard library alone."""

from __future__ import annotations

from typing import Any

from megatron_hydra.errors import UserError
from megatron_hydra.teachers.base import TeacherFamily
from megatron_hydra.teachers.llama import LLAMA
from megatron_hydra.teachers.qwen2 import QWEN2
from megatron_hydra.teachers.qwen3 import QWEN3

FAMILIES: dict[str, TeacherFamily] = {family.model_type: family for family in (QWEN3, QWEN2, LLAMA)}


def family_of(config: Any) -> TeacherFamily:
    """The family of a model, by what all its members have in common.

    Args:
        config: Has the attributes of HydraConfig that a family fixes.

    Raises:
        UserError: If no family has these values.
    """
    for family in FAMILIES.values():
        if all(getattr(config, name) == value for name, value in family.fields.items()):
            return family
    names = next(iter(FAMILIES.values())).fields
    found = ", ".join(f"{name} {getattr(config, name)!r}" for name in names)
    raise UserError(f"no family of teachers has {found}; known: {', '.join(FAMILIES)}")
