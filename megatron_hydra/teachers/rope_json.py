"""What a config.json says of RoPE, in the spellings of all transformers releases.

Needs the standard library alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_hydra.errors import UserError
from megatron_hydra.teachers.base import TeacherFamily

PLAIN_ROPE: dict[str, Any] = {
    "rope_scaling_factor": 1.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_length": 8192,
}
"""HydraConfig's fields of RoPE scaling, and what they are without any."""
_ORIGINAL_LENGTH = "original_max_position_embeddings"
_LLAMA3 = {
    "factor": "rope_scaling_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    _ORIGINAL_LENGTH: "rope_original_length",
}
_TYPES = ("rope_type", "type")
# Of all kinds of RoPE that are not plain; a file may have them as null.
_SCALING_KEYS = {
    *_LLAMA3, "attention_factor", "beta_fast", "beta_slow", "short_factor", "long_factor",
    "mscale", "mscale_all_dim", "truncate",
}  # fmt: skip


def read_rope(
    path: Path, raw: Mapping[str, Any], family: TeacherFamily
) -> tuple[Any, dict[str, Any]]:
    """The base of RoPE, and its scaling as HydraConfig's fields.

    Releases before 5 read ``rope_theta`` at the top level and the type of RoPE in
    ``rope_scaling``. Release 5 reads both from ``rope_scaling`` or else from ``rope_parameters``,
    and the base at the top level where these have none; ``rope_parameters`` may hold an object for
    each type of layer. One of them may be looked at and the other not, so all of them must say the
    same: one base, one scaling.

    Args:
        path: Of config.json, for messages.
        raw: What it holds.
        family: Says which types of RoPE are read.

    Raises:
        UserError: For a type that is not read, a key that its type has not, or two that differ.
    """
    given = dict(_objects(path, raw))
    scalings = {
        place: _scaling(path, place, rope, raw, family.rope_types) for place, rope in given.items()
    }
    scaling = _the_same(path, "a RoPE scaling of", scalings) if scalings else PLAIN_ROPE
    at_top = raw.get("rope_theta", family.defaults["rope_theta"])
    bases = {place: rope.get("rope_theta", at_top) for place, rope in given.items()}
    if not given or raw.get("rope_theta") is not None:
        bases["the top level"] = at_top
    return _the_same(path, "rope_theta", bases), dict(scaling)


def _the_same(path: Path, what: str, found: Mapping[str, Any]) -> Any:
    """What all places say."""
    (first, value), *others = found.items()
    for other, different in others:
        if different != value:
            raise UserError(
                f"{path} has {what} {value!r} in {first} and {different!r} in {other}: "
                "keep the one that the model was trained with"
            )
    return value


def _objects(path: Path, raw: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every object that describes RoPE, and how a message calls it."""
    for name in ("rope_scaling", "rope_parameters"):
        rope = raw.get(name) or {}
        nested = {key: value for key, value in rope.items() if isinstance(value, dict)}
        if nested and len(nested) < len(rope):
            odd = next(key for key in rope if key not in nested)
            raise UserError(f"{path} has {odd} beside {', '.join(nested)} in {name}: keep one form")
        if nested:
            yield from ((f"{name}.{key}", value) for key, value in nested.items())
        elif rope:
            yield name, rope


def _scaling(
    path: Path,
    place: str,
    rope: Mapping[str, Any],
    raw: Mapping[str, Any],
    types: tuple[str, ...],
) -> dict[str, Any]:
    """One object's scaling; it describes that and nothing else."""
    for key, value in rope.items():
        if key in _TYPES and value not in types:
            allowed = "only plain RoPE, 'default', is supported"
            if len(types) > 1:
                allowed = f"supported: {', '.join(types)}"
            raise UserError(f"{path} has {key} {value!r} in {place}; {allowed}")
    found = {rope[key] for key in _TYPES if key in rope} or {"default"}
    if len(found) > 1:
        raise UserError(f"{path} has a rope_type and another type in {place}: keep one of them")
    (kind,) = found
    own = _LLAMA3 if kind == "llama3" else {}
    for key, value in rope.items():
        is_known = (
            key in (*_TYPES, "rope_theta", *own)
            or (key in _SCALING_KEYS and value is None)
            or (key == "partial_rotary_factor" and value in (1, None))
        )
        if not is_known:
            words = f"{kind} RoPE" if own else "plain RoPE"
            raise UserError(
                f"{path} has {key} {value!r} in {place}, which {words} has not; "
                f"allowed: {', '.join(('rope_type', 'rope_theta', *own))}"
            )
    return _llama3(path, place, rope, raw.get(_ORIGINAL_LENGTH)) if own else PLAIN_ROPE


def _llama3(path: Path, place: str, rope: Mapping[str, Any], length_at_top: Any) -> dict[str, Any]:
    """Llama 3.1's scaling; release 5 looks for its original length at the top level first."""
    if length_at_top is not None:
        lengths = {"the top level": length_at_top, place: rope.get(_ORIGINAL_LENGTH, length_at_top)}
        rope = {**rope, _ORIGINAL_LENGTH: _the_same(path, _ORIGINAL_LENGTH, lengths)}
    for key in _LLAMA3:
        value = rope.get(key)
        is_count = key != _ORIGINAL_LENGTH or type(value) is int
        if type(value) not in (int, float) or not 0 < value < math.inf or not is_count:
            word = "a whole number" if key == _ORIGINAL_LENGTH else "a finite number"
            raise UserError(f"{path} has {key} {value!r} in {place}; it must be {word} > 0")
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    if factor < 1:
        raise UserError(f"{path} has factor {factor!r} in {place}; it must be 1 or more")
    if low >= high:
        raise UserError(
            f"{path} has low_freq_factor {low!r} in {place}; it must be below the "
            f"high_freq_factor, {high!r}"
        )
    return {field: rope[key] for key, field in _LLAMA3.items()} if factor > 1 else PLAIN_ROPE
