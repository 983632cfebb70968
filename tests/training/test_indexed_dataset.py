"""Indexed datasets: tokens are stored as they are, and what cut a writer off is in nobody's way."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from megatron.core.datasets.indexed_dataset import (  # noqa: E402
    IndexedDataset,
    IndexedDatasetBuilder,
)

from megatron_hydra.errors import UserError  # noqa: E402
from megatron_hydra.training.indexed_dataset import (  # noqa: E402
    check_dataset_output,
    dataset_files,
    read_notes,
    write_indexed_dataset,
    write_pieces,
)

DOCUMENTS = [[1, 2, 3], [4], [5, 6]]


def test_megatron_reads_what_is_written(tmp_path: Path) -> None:
    assert write_indexed_dataset(tmp_path / "d", DOCUMENTS, 300, {"seed": 7}) == (3, 6)
    assert [list(map(int, tokens)) for tokens in IndexedDataset(str(tmp_path / "d"))] == DOCUMENTS
    counts = {"vocab_size": 300, "num_documents": 3, "num_tokens": 6, "largest_token": 6}
    assert read_notes(tmp_path / "d") == {**counts, "seed": 7, "end_of_document": None}


def test_documents_come_in_pieces(tmp_path: Path) -> None:
    pieces = [([1], False), ([], False), ([2, 3], True), ([], True), ([4], True), ([5], False)]
    pieces += [([6], False), ([], True)]
    assert write_pieces(tmp_path / "d", pieces, 300, {}, end_of_document=("<end>", 4)) == (3, 6)
    assert [list(map(int, tokens)) for tokens in IndexedDataset(str(tmp_path / "d"))] == DOCUMENTS
    notes = read_notes(tmp_path / "d")
    assert notes is not None
    assert notes["end_of_document"] == ("<end>", 4, 1), "one document ends with token 4"


@pytest.mark.parametrize("token", [70_000, 65_536, 65_499])
def test_large_ids_are_stored_as_they_are(tmp_path: Path, token: int) -> None:
    """Catches: an integer type by the number of tokens, where the ids have gaps."""
    write_indexed_dataset(tmp_path / "d", [[1, token]], token + 1, {})
    assert [list(map(int, tokens)) for tokens in IndexedDataset(str(tmp_path / "d"))] == [
        [1, token]
    ]


@pytest.mark.parametrize("token", [300, 70_000, -1])
def test_an_id_outside_the_vocabulary_is_never_cut_to_fit(tmp_path: Path, token: int) -> None:
    documents = [[1, 2], [3, token, 4]]
    with pytest.raises(UserError, match=rf"document 1 holds token {token}; allowed are 0 to 299"):
        write_indexed_dataset(tmp_path / "d", documents, 300, {})
    assert list(tmp_path.iterdir()) == []


def test_notes_of_an_earlier_release_are_read(tmp_path: Path) -> None:
    notes = {"vocab_size": 300, "num_documents": 3, "num_tokens": 6, "command": "x"}
    (tmp_path / "d.json").write_text(json.dumps(notes))
    expected = {**notes, "largest_token": None, "end_of_document": None}
    assert read_notes(tmp_path / "d") == expected


@pytest.mark.parametrize(
    "damage",
    [
        {"largest_token": "5"},
        {"end_of_document": "<end>"},
        {"end_of_document": {"token": "<end>", "id": 4}},
        {"end_of_document": {"token": "<end>", "id": "4", "num_documents": 1}},
        {"end_of_document": {"token": "<end>", "id": 4, "num_documents": -1}},
    ],
)
def test_damaged_notes_are_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
    write_indexed_dataset(tmp_path / "d", DOCUMENTS, 300, {}, end_of_document=("<end>", 4))
    path = tmp_path / "d.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(UserError, match=rf"d\.json has {next(iter(damage))}"):
        read_notes(tmp_path / "d")


class FullDisk(io.RawIOBase):
    """A file on a disk with room for a few bytes, which fails where a real one does."""

    def __init__(self) -> None:
        self.room = 8

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.room < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        return len(data)


@pytest.mark.parametrize("num_tokens", [3, 100_000], ids=["when closing", "when writing"])
def test_a_full_disk_is_said_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_tokens: int
) -> None:
    start = IndexedDatasetBuilder.__init__

    def on_full_disk(builder: Any, *args: Any, **kwargs: Any) -> None:
        start(builder, *args, **kwargs)
        builder.data_file.close()
        builder.data_file = io.BufferedWriter(FullDisk(), 4096)

    write_indexed_dataset(tmp_path / "d", DOCUMENTS, 300, {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(IndexedDatasetBuilder, "__init__", on_full_disk)
    documents = [[1] * num_tokens, [2] * num_tokens]
    with pytest.raises(UserError, match=r"cannot write .*d\.(bin|idx|json): the disk is full"):
        write_indexed_dataset(tmp_path / "d", documents, 300, {}, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


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
