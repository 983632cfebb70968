"""Tokenizers of model folders: what `convert` accepts, every later command loads alike."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra_tools import cli
from kit.tiny_qwen3 import write_tiny_qwen3
from tokenizers import Tokenizer

from megatron_hydra.errors import UserError
from megatron_hydra.teachers.tokenizer import load_tokenizer

TEXT = "fünf  5\n<|endoftext|>\tthe<|tool|> quick <|im_end|>"

# What transformers 5.24 writes beside tokenizer.json, for the class of its own and for Qwen's.
OF_TRANSFORMERS_5 = {
    "backend": "tokenizers",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|endoftext|>",
    "extra_special_tokens": ["<|tool|>"],
    "is_local": True,
    "local_files_only": True,
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": "<|endoftext|>",
    "tokenizer_class": "TokenizersBackend",
}
QWEN_OF_TRANSFORMERS_5 = {
    "add_prefix_space": None,
    "backend": "tokenizers",
    "bos_token": None,
    "eos_token": "<|endoftext|>",
    "model_max_length": 131072,
    "pad_token": "<|endoftext|>",
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": "<|endoftext|>",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A teacher whose tokenizer.json has a special token of its own."""
    folder = write_tiny_qwen3(tmp_path / "teacher")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|tool|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _settings(settings: dict[str, Any] | None) -> Callable[[Path], None]:
    """As another release or a user leaves the folder: no special_tokens_map.json any more."""

    def write(folder: Path) -> None:
        (folder / "special_tokens_map.json").unlink()
        (folder / "tokenizer_config.json").unlink()
        if settings is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    return write


def _without_class(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["tokenizer_class"]
    path.write_text(json.dumps(settings))


def _as_vocabulary(folder: Path) -> None:
    """As transformers keeps a Qwen2Tokenizer that is not of the fast kind."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer.json").unlink()
    tokens = {"256": {"content": "<|endoftext|>", "special": True},
              "257": {"content": "<|tool|>", "special": True}}  # fmt: skip
    settings = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


KINDS: dict[str, Callable[[Path], None]] = {
    "transformers-4": lambda folder: None,
    "without-class": _without_class,
    "transformers-5": _settings(OF_TRANSFORMERS_5),
    "transformers-5-qwen": _settings(QWEN_OF_TRANSFORMERS_5),
    "custom-class": _settings({"tokenizer_class": "OwnTokenizer", "eos_token": "<|endoftext|>"}),
    "without-settings": _settings(None),
    "vocabulary": _as_vocabulary,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_converted_encodes_alike_ever_after(
    folder: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Held to the `tokenizers` package's own reading of tokenizer.json."""
    expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    assert 256 in expected and 257 in expected
    KINDS[kind](folder)
    assert cli.main(["convert", "--teacher", str(folder), "--out", f"{tmp_path}/out"]) == 0
    shutil.rmtree(folder)
    with caplog.at_level(logging.WARNING):
        for place in (tmp_path / "out", tmp_path / "out/tokenizer"):
            tokenizer = load_tokenizer(place)
            assert tokenizer.encode(TEXT, add_special_tokens=False) == expected
            assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == tokenizer.eos_token_id == 256
            assert "<|endoftext|>" not in tokenizer.decode(expected, skip_special_tokens=True)
            assert tokenizer.model_max_length > 1e9
    warned = "tokenizer.json is read without the unknown class OwnTokenizer" in caplog.text
    assert warned == (kind == "custom-class")


@pytest.mark.parametrize("kind", ["transformers-4", "without-class", "transformers-5-qwen"])
def test_a_model_folder_is_read_as_transformers_reads_it(folder: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    KINDS[kind](folder)
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ours = load_tokenizer(folder)
    assert type(ours) is type(theirs)
    assert ours.encode(TEXT) == theirs.encode(TEXT)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.get_vocab() == theirs.get_vocab()


def _no_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_tokenizer, "has no tokenizer: tokenizer.json is missing"),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{"),
            "cannot load a tokenizer from",
        ),
        (
            _settings({"tokenizer_class": 5}),
            "tokenizer_class in tokenizer_config.json is 5; it must",
        ),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text('{"a": 1, "a": 2}'),
            "the key 'a' stands twice",
        ),
        (
            lambda folder: (_as_vocabulary(folder), _settings_class(folder, "OwnTokenizer")),
            "its class OwnTokenizer is unknown, and it has no tokenizer.json",
        ),
    ],
    ids=["none", "damaged", "class-number", "key-twice", "custom-class-alone"],
)
def test_convert_says_what_no_later_command_could_load(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], Any],
    message: str,
) -> None:
    """Before the weights are read, and naming the user's folder, not a copy."""
    spoil(folder)

    def read_weights(*args: Any) -> None:
        raise AssertionError("the weights were read first")

    monkeypatch.setattr("megatron_hydra.teachers.weights.read_weights", read_weights)
    assert cli.main(["convert", "--teacher", str(folder), "--out", f"{tmp_path}/out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and str(folder) in line
    assert not (tmp_path / "out").exists()


def _settings_class(folder: Path, name: str) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))


def test_a_name_of_a_hub_is_not_looked_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """transformers takes a folder that does not exist for a model on its hub."""

    def look_up(*args: Any, **options: Any) -> None:
        raise AssertionError("transformers was asked")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.from_pretrained", look_up)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", look_up)
    for name in ("Qwen/Qwen3-0.6B", "gpt2", tmp_path / "nothing"):
        with pytest.raises(UserError, match=f"cannot load a tokenizer from {name}: there is no su"):
            load_tokenizer(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no tokenizer: tokenizer.json is missing"):
        load_tokenizer(tmp_path / "empty")


def test_a_folder_with_a_tokenizer_of_its_own_keeps_to_it(folder: Path) -> None:
    """Catches a subfolder that is read by one command and passed over by the next."""
    (folder / "tokenizer").mkdir()
    tokenizer = load_tokenizer(folder)
    assert tokenizer.convert_tokens_to_ids("<|tool|>") == 257
