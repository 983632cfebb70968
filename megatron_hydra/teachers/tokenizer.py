"""Tokenizers of model folders: the files they are in, and loading them from those files alone."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from megatron_hydra.errors import UserError
from megatron_hydra.files import parse_json
from megatron_hydra.teachers.config_json import LATER_FIELDS
from megatron_hydra.teachers.families import FAMILIES, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")
_SETTINGS = "tokenizer_config.json"
_FILES = (
    *_VOCABULARIES, _SETTINGS, "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip
# A tokenizer that is all in tokenizer.json: its name in transformers 4 and in 5.
_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer, which a checkpoint folder keeps a copy of.

    Raises:
        UserError: If the folder has no tokenizer.
    """
    files = [folder / name for name in _FILES if (folder / name).is_file()]
    if not any(file.name in _VOCABULARIES for file in files):
        raise UserError(f"{folder} has no tokenizer: tokenizer.json is missing")
    return files


def find_tokenizer(folder: str | os.PathLike[str]) -> Path:
    """Where a tokenizer, model or checkpoint folder has its tokenizer.

    Raises:
        UserError: If the folder does not exist; its name is never taken for one on a hub.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"cannot load a tokenizer from {folder}: there is no such folder")
    nested = folder / "tokenizer"
    has_own = any((folder / name).is_file() for name in _VOCABULARIES)
    return nested if nested.is_dir() and not has_own else folder


def load_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face folder or of a checkpoint's ``tokenizer`` folder.

    Raises:
        UserError: If the folder does not exist or transformers cannot read it.
    """
    source = find_tokenizer(folder)
    return _load(source, source)


def load_model_tokenizer(
    folder: str | os.PathLike[str], vocab_size: int
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, as :func:`load_tokenizer`.

    Args:
        folder: Of the model, or of its tokenizer.
        vocab_size: Rows of the model's embedding.

    Raises:
        UserError: Also if a token has no row. With a row too many, as Qwen3 has, all is well.
    """
    tokenizer = load_tokenizer(folder)
    _check_rows(tokenizer, vocab_size, folder)
    return tokenizer


def check_tokenizer(folder: str | os.PathLike[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Load what a checkpoint folder would keep of a model folder's tokenizer; return it.

    Raises:
        UserError: If a later command could not load that, or as :func:`load_model_tokenizer`.
    """
    source = find_tokenizer(folder)
    with tempfile.TemporaryDirectory() as copy:
        for file in tokenizer_files(source):
            shutil.copy(file, copy)
        tokenizer = _load(Path(copy), source)
    _check_rows(tokenizer, vocab_size, source)
    return tokenizer


def _check_rows(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, folder: str | os.PathLike[str]
) -> None:
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer of {os.fspath(folder)} has a token {token!r} of id {largest}, but the "
            f"model's embedding has {vocab_size} rows: take such tokens out of the tokenizer, or "
            "give them rows (transformers' resize_token_embeddings, then save the model)"
        )


def _load(source: Path, named: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer whose folder a message calls ``named``."""
    try:
        settings = _settings(source)
        tokenizer_class = _tokenizer_class(source, named, settings.get("tokenizer_class"))
        with _quiet(tokenizer_class.__name__ in _GENERIC_CLASSES):
            tokenizer: PreTrainedTokenizerBase = tokenizer_class.from_pretrained(
                source, local_files_only=True, **_changed_settings(settings)
            )
        return tokenizer
    except Exception as error:  # transformers raises whatever its tokenizer class meets
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"cannot load a tokenizer from {named}: {first_line}") from error


def _settings(source: Path) -> dict[str, Any]:
    tokenizer_files(source)
    if not (source / _SETTINGS).is_file():
        return {}
    settings = parse_json((source / _SETTINGS).read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{_SETTINGS} holds no JSON object")
    name = settings.get("tokenizer_class")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"tokenizer_class in {_SETTINGS} is {name!r}; it must be a word or null")
    return settings


def _tokenizer_class(source: Path, named: Path, name: str | None) -> Any:
    """The class that transformers' AutoTokenizer takes, in a checkpoint's folder too."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    name = name or _class_of_family(named)
    if name in _GENERIC_CLASSES:
        return PreTrainedTokenizerFast
    for candidate in (f"{name.removesuffix('Fast')}Fast", name):
        found: Any = tokenizer_class_from_name(candidate)
        if isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase):
            return found
    if not (source / "tokenizer.json").is_file():
        raise ValueError(f"its class {name} is unknown, and it has no tokenizer.json")
    logger.warning("%s: tokenizer.json is read without the unknown class %s", named, name)
    return PreTrainedTokenizerFast


def _class_of_family(folder: Path) -> str:
    """For a tokenizer that names no class: by the model that lies with it, or in a folder above."""
    config = _model_file(folder / "config.json")
    if config:
        family = FAMILIES.get(str(config.get("model_type")))
        if family is None:
            raise ValueError(f"it names no class, and its model_type is none of {[*FAMILIES]}")
        return family.tokenizer_class
    stored = _model_file(folder.parent / "model.json").get("config")
    fields = {**LATER_FIELDS, **(stored if isinstance(stored, dict) else {})}
    return family_of(SimpleNamespace(**fields)).tokenizer_class


def _model_file(path: Path) -> dict[str, Any]:
    """Empty where there is none."""
    if not path.is_file():
        return {}
    found = parse_json(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _changed_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What to load a tokenizer with instead of its own settings."""
    # Whole texts are tokenised and cut afterwards: the tokenizer's own limit does not apply.
    changed: dict[str, Any] = {"model_max_length": sys.maxsize}
    # Else transformers 4.57 takes any large vocabulary for a Mistral's and warns of it.
    changed["fix_mistral_regex"] = False
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list):  # transformers 5; before, it was an object of attributes
        earlier = settings.get("additional_special_tokens") or []
        changed |= {"extra_special_tokens": {}, "additional_special_tokens": [*earlier, *extra]}
    return changed


@contextmanager
def _quiet(wanted: bool) -> Iterator[None]:
    """Keep back transformers' warning that a class has another name than the file gives it."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    if wanted:
        transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
