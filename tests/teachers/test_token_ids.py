"""A text in pieces has the ids of the whole; documents end with the token that ends documents."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.tiny_qwen3 import write_byte_tokenizer

from megatron_hydra.errors import UserError
from megatron_hydra.tasks.text import local_text
from megatron_hydra.teachers.token_ids import (
    cut_pieces,
    encode,
    end_of_document,
    num_token_ids,
)

SHIPPED = Path(__file__).parents[2] / "examples/quickstart/teacher"
# Qwen3's own rule for what may merge, by which its vocabulary was made.
QWEN3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ALPHABET = [
    *("a", "B", "é", "e\u0301", "\u0301", "漢", "。", "7", "'s", ".", "-"),
    *(" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2028", "<|endoftext|>", "<|im_end|>"),
]


def load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def trained(kind: str) -> Any:
    """A tokenizer with merges across all that the alphabet holds."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    if kind == "qwen3":
        split = pre_tokenizers.Split(Regex(QWEN3_PATTERN), "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "metaspace":  # marks the start of a text, as Llama 2's does
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    rng = random.Random(0)
    texts = ["".join(rng.choices(ALPHABET, k=200)) for _ in range(100)]
    special = ["<|endoftext|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "qwen3" else []
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    found = {kind: trained(kind) for kind in ("qwen3", "metaspace", "no_parting")}
    return {"shipped": load(SHIPPED), **found}


def in_pieces(tokenizer: Any, text: str, size: int, as_text: bool = False) -> list[list[int]]:
    parts = [text[start : start + 7 * size] for start in range(0, len(text), 7 * size)]
    cut = cut_pieces(tokenizer, [*((part, False) for part in parts), ("", True)], as_text, size)
    return encode(tokenizer, [piece for piece, _ in cut], as_text)


@pytest.mark.parametrize("name", ["shipped", "qwen3", "metaspace", "no_parting"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 40), as_text=st.booleans())
def test_pieces_have_the_ids_of_the_whole(
    tokenizers: dict[str, Any], name: str, seed: int, size: int, as_text: bool
) -> None:
    text = "".join(random.Random(seed).choices(ALPHABET, k=900))
    whole = tokenizers[name](text, add_special_tokens=False, split_special_tokens=as_text)
    pieces = in_pieces(tokenizers[name], text, size, as_text)
    assert [token for piece in pieces for token in piece] == whole["input_ids"]


@pytest.mark.parametrize("name", ["shipped", "qwen3"])
def test_long_texts_are_cut_into_short_pieces(tokenizers: dict[str, Any], name: str) -> None:
    text = local_text()[:300_000]
    pieces = in_pieces(tokenizers[name], text, 1000)
    whole = tokenizers[name](text, add_special_tokens=False)["input_ids"]
    assert [token for piece in pieces for token in piece] == whole
    assert len(pieces) > 100


def test_documents_stay_apart(tokenizers: dict[str, Any]) -> None:
    documents = ["one two three\n" * 500, "", "short", "four five\n" * 300]

    def parts() -> Iterator[tuple[str, bool]]:
        for document in documents:
            yield document[:50], False
            yield document[50:], True

    found = [""]
    for text, is_end in cut_pieces(tokenizers["shipped"], parts(), num_characters=300):
        found[-1] += text
        found.extend([""] * is_end)
    assert found == [*documents, ""]


def test_special_tokens_are_text_where_that_is_asked(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["qwen3"]
    special = {tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>")}
    text = "a<|im_end|>\na<|endoftext|>"
    (as_tokens,), (as_text,) = (encode(tokenizer, [text], flag) for flag in (False, True))
    assert special <= set(as_tokens)
    assert not special & set(as_text) and tokenizer.decode(as_text) == text
    assert encode(tokenizer, [text]) == [as_tokens], "the choice must not stick"


def test_the_end_of_a_document_is_no_chat_turns_end(
    tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    chat = tokenizers["qwen3"]
    assert chat.eos_token == "<|im_end|>"
    ids = {name: chat.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>")}
    assert end_of_document(chat) == ("<|endoftext|>", ids["<|endoftext|>"])
    assert end_of_document(chat, "<|im_end|>") == ("<|im_end|>", ids["<|im_end|>"])
    with pytest.raises(UserError, match="no token '<end>' to end documents with"):
        end_of_document(chat, "<end>")
    write_byte_tokenizer(tmp_path)
    other = load(tmp_path)
    assert end_of_document(other) == ("<|endoftext|>", 256)


def make(vocabulary: dict[str, int], **special: str) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def test_without_an_end_of_text_the_eos_token_ends_documents() -> None:
    assert end_of_document(make({"a": 0, "</s>": 1}, eos_token="</s>")) == ("</s>", 1)
    turns = {"a": 0, "<|eot_id|>": 1, "<|end_of_text|>": 2}
    assert end_of_document(make(turns, eos_token="<|eot_id|>")) == ("<|end_of_text|>", 2)
    with pytest.raises(UserError, match="of <.endoftext.>, <.end_of_text.> and no eos_token: name"):
        end_of_document(make({"a": 0}))


def test_the_largest_id_counts_and_not_the_number_of_tokens() -> None:
    assert num_token_ids(make({"a": 0, "b": 70_000})) == 70_001
    assert num_token_ids(make({"a": 0, "b": 1}, eos_token="</s>")) == 3
