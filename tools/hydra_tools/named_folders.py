"""`NAME=FOLDER` arguments, which several verbs take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_hydra.errors import UserError


def named_folders(
    option: str, arguments: Sequence[str], what: str, example: str | None = None
) -> dict[str, Path]:
    """Read ``NAME=FOLDER`` arguments.

    Args:
        option: As the user wrote it, for messages.
        arguments: Its words.
        what: That has a name, in the singular.
        example: Of an argument, for messages; None: a folder alone is named by its own name.

    Raises:
        UserError: For an argument of another form, or a repeated name.
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        name, _, folder = argument.partition("=")
        # A folder's own name may have the sign.
        if example is None and not (name and folder and not Path(argument).is_dir()):
            name, folder = Path(argument).resolve().name, argument
        if not (name and folder):
            raise UserError(f"{option} {argument!r} must be NAME=FOLDER, as in {example}")
        if name in found:
            raise UserError(f"{option} names {name!r} twice: each {what} needs its own name")
        found[name] = Path(folder)
    return found
