"""The model code of an exported folder: its files, their hash, and whether a folder's may run.

Needs the standard library alone.
"""

from __future__ import annotations

from pathlib import Path

from megatron_hydra.errors import UserError
from megatron_hydra.files import content_hash, parse_json

CODE = tuple(sorted(Path(__file__).parent.glob("*_hydra.py")))
AUTO_MAP = {
    "AutoConfig": "configuration_hydra.HydraHeadConfig",
    "AutoModel": "modeling_hydra.HydraModel",
    "AutoModelForCausalLM": "modeling_hydra.HydraForCausalLM",
}


def code_hash() -> str:
    """Hash (hex) of the model code's files."""
    return content_hash(CODE)


def brings_code(folder: Path, is_trusted: bool = False) -> bool:
    """Whether a Hugging Face folder comes with code that transformers would run.

    Args:
        folder: Of the model.
        is_trusted: Whether the user trusts its code, whatever it is.

    Raises:
        UserError: If it does, `is_trusted` is False, and the code is not what this release exports.
    """
    maps = [
        found["auto_map"]
        for name in ("config.json", "tokenizer_config.json")
        if (found := _read(folder / name)).get("auto_map")
    ]
    if not maps:
        return False
    files = sorted(folder.rglob("*.py"))
    if not is_trusted and (maps != [AUTO_MAP] or content_hash(files) != code_hash()):
        raise UserError(
            f"{folder} brings model code that is not what this release exports: read its "
            f"{len(files)} .py files, and pass --trust-remote-code to run them"
        )
    return True


def _read(path: Path) -> dict[str, object]:
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return found if isinstance(found, dict) else {}
