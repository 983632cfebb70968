"""A tokenizer of one token per character, so that a test reads tokens as text on its own."""

from __future__ import annotations

from collections.abc import Sequence


class CharacterTokenizer:
    """Encodes each character as its code point."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """One token per character."""
        assert not add_special_tokens
        return [ord(character) for character in text]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text again."""
        return "".join(map(chr, tokens))
