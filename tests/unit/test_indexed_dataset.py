"""Indexed datasets: texts are read whole, and a killed writer leaves nothing in the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from megatron.core.datasets.indexed_dataset import IndexedDataset  # noqa: E402

from megatron_hydra.errors import UserError  # noqa: E402
from megatron_hydra.nemo.indexed_dataset import (  # noqa: E402
    check_dataset_output,
    dataset_files,
    read_notes,
    read_texts,
    write_indexed_dataset,
)

DOCUMENTS = [[1, 2, 3], [4], [5, 6]]


def test_megatron_reads_what_is_written(tmp_path: Path) -> None:
    assert write_indexed_dataset(tmp_path / "d", DOCUMENTS, 300, {"seed": 7}) == (3, 6)
    assert [list(map(int, tokens)) for tokens in IndexedDataset(str(tmp_path / "d"))] == DOCUMENTS
    counts = {"vocab_size": 300, "num_documents": 3, "num_tokens": 6}
    assert read_notes(tmp_path / "d") == {**counts, "seed": 7}


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085", "\n"])
def test_only_a_line_feed_ends_a_json_line(tmp_path: Path, character: str) -> None:
    texts = [f"before{character}after", "second"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    lines[1] = lines[1].replace(" ", "\r")  # white space to JSON
    path = tmp_path / "lines.jsonl"
    path.write_bytes(("\r\n".join(lines) + "\n\n").encode())
    assert list(read_texts(path, None)) == texts


def test_text_files_are_split_at_the_end_of_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one<end>two\u2028lines")
    assert list(read_texts(path, "<end>")) == ["one", "two\u2028lines"]
    assert list(read_texts(path, None)) == ["one<end>two\u2028lines"]


class Killed(BaseException):
    """Stands for the process's end, which no handler sees."""


@pytest.mark.parametrize("num_moved", [0, 1, 2])
@pytest.mark.parametrize("is_replacing", [False, True])
def test_the_same_command_goes_on_after_a_kill_between_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_moved: int, is_replacing: bool
) -> None:
    prefix = tmp_path / "d"
    if is_replacing:
        write_indexed_dataset(prefix, DOCUMENTS, 300, {})
    moves = []

    def move(temporary: Path, target: Path) -> None:
        if len(moves) == num_moved:
            raise Killed
        moves.append(target)
        temporary.replace(target)

    with monkeypatch.context() as patch:
        patch.setattr("megatron_hydra.files._replace", move)
        with pytest.raises(Killed):
            write_indexed_dataset(prefix, DOCUMENTS[1:], 300, {}, overwrite=is_replacing)
    # Neither the old index with new tokens nor an error: a dataset that is not there.
    assert not dataset_files(prefix)[0].exists()
    check_dataset_output(prefix, overwrite=False)
    assert write_indexed_dataset(prefix, DOCUMENTS[1:], 300, {}) == (2, 3)
    assert len(IndexedDataset(str(prefix))) == 2


@pytest.mark.parametrize("ending", ["idx", "bin", "json"])
@pytest.mark.parametrize("content", ["{", '{"vocab_size": 5}', '{"text": "mine"}\n{"text": "m"}'])
def test_a_users_own_file_is_no_left_over(tmp_path: Path, ending: str, content: str) -> None:
    own = tmp_path / f"d.{ending}"
    own.write_text(content)
    with pytest.raises(UserError, match=rf"d\.{ending} exists"):
        check_dataset_output(tmp_path / "d", overwrite=False)
    with pytest.raises(UserError, match=rf"d\.{ending} exists"):
        write_indexed_dataset(tmp_path / "d", DOCUMENTS, 300, {})
    assert [path.name for path in tmp_path.iterdir()] == [own.name]
    assert own.read_text() == content


def test_nothing_is_left_when_there_are_no_tokens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the input has no tokens"):
        write_indexed_dataset(tmp_path / "d", [], 300, {})
    assert list(tmp_path.iterdir()) == []
    assert read_notes(tmp_path / "d") is None
