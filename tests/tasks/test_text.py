"""Text is read, split and drawn as promised."""

from __future__ import annotations

import random

import pytest

from megatron_hydra.errors import UserError
from megatron_hydra.tasks import text


def test_held_out_text_is_a_tenth_and_disjoint():
    training, held_out = text.split_held_out(range(10_007))
    assert sorted(training + held_out) == list(range(10_007))
    assert 0.09 < len(held_out) / 10_007 < 0.11


def test_local_text_is_long_and_stable():
    found = text.local_text()
    assert len(found) > 500_000
    text.local_text.cache_clear()
    assert found == text.local_text()


def test_drawn_text_is_a_running_piece_from_anywhere():
    rng = random.Random(0)
    drawn = [text.draw_text(rng, range(10), 8) for _ in range(100)]
    assert {tuple(piece) for piece in drawn} == {tuple(range(i, i + 8)) for i in range(3)}
    with pytest.raises(UserError, match="text has 10 tokens, but 11 are needed"):
        text.draw_text(rng, range(10), 11)


def test_read_text_refuses_what_is_no_haystack(tmp_path):
    cases = {"missing.txt": None, "empty.txt": b" \n", "short.txt": b"word " * 10}
    messages = ["cannot read", "is empty", "has 49 characters; at least"]
    for (name, content), message in zip(cases.items(), messages, strict=True):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            text.read_text(tmp_path / name)
    (tmp_path / "latin.txt").write_bytes(b"\xe9" * 30_000)
    with pytest.raises(UserError, match="not UTF-8"):
        text.read_text(tmp_path / "latin.txt")
    (tmp_path / "good.txt").write_text("some words\n" * 3000)
    assert text.read_text(tmp_path / "good.txt") == "some words\n" * 3000
