"""Text files of every kind give the documents put in, or one sentence of what is wrong."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
import logging
import lzma
import os
import random
import tarfile
import threading
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from megatron_hydra.errors import UserError
from megatron_hydra.tasks import text_files
from megatron_hydra.tasks.broken_lines import BrokenLines
from megatron_hydra.tasks.text import read_text
from megatron_hydra.tasks.text_files import TextOptions, find_texts, read_pieces

DOCUMENTS = ["first document,\nof two lines", "second: é漢字 \u2028 and a \\ and a {", "third"]
AUTO = TextOptions()


def lines(documents: Iterable[str], key: str = "text") -> bytes:
    rows = (json.dumps({"id": 7, key: text}, ensure_ascii=False) for text in documents)
    return "\n".join(rows).encode()


def zstd(content: bytes) -> bytes:
    import pyarrow

    half = len(content) // 2  # two frames in one file, as parallel compressors write
    frames = (content[:half], content[half:])
    return b"".join(pyarrow.compress(part, codec="zstd", asbytes=True) for part in frames)


def parquet(path: Path, documents: list[str], key: str = "text") -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(len(documents))), key: documents})
    pyarrow.parquet.write_table(table, path, row_group_size=2)


def read(
    *names: Path | str, options: TextOptions = AUTO, separator: str | None = None
) -> list[str]:
    documents = [""]
    for piece in read_pieces(find_texts(names, options), options, separator):
        documents[-1] += piece.text
        documents.extend([""] * piece.is_end)
    assert documents.pop() == "", "the last document has no end"
    return documents


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "mark"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd], ids=["", "gz", "zst"])
@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.ndjson", "d.JSONL", "d"])
def test_json_lines_by_any_name(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes], mark: bytes
) -> None:
    ending = {gzip.compress: ".gz", zstd: ".ZST"}.get(pack, "")
    path = tmp_path / f"{name}{ending}"
    path.write_bytes(pack(mark + lines(DOCUMENTS, "content") + b"\r\n\n"))
    format_ = "jsonl" if name == "d" else "auto"
    assert read(path, options=TextOptions("content", format_)) == DOCUMENTS


@pytest.mark.parametrize("name", ["d.parquet", "d.pq", "d"])
def test_parquet(tmp_path: Path, name: str) -> None:
    parquet(tmp_path / name, DOCUMENTS, "content")
    assert read(tmp_path / name, options=TextOptions("content")) == DOCUMENTS


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_plain_text_is_divided_at_a_separator_wherever_a_part_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(text_files, "_PIECE_CHARACTERS", size)
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "<end>".join(DOCUMENTS).encode() + b"<end><en>")
    assert read(path, separator="<end>") == [*DOCUMENTS, "<en>"]
    assert read(path) == ["<end>".join(DOCUMENTS) + "<end><en>"]


def test_folders_and_patterns_are_read_in_the_order_of_their_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (
        "b/2.txt",
        "b/10.txt",
        "a/c/x.text",
        "a.jsonl",
        ".hidden.txt",
        ".git/y.txt",
        "README.md",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lines([name]) if name.endswith("jsonl") else name.encode())
    parquet(tmp_path / "z.parquet", ["z"])
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path) == ["a/c/x.text", "a.jsonl", "b/10.txt", "b/2.txt", "z"]
    assert "1 files of other types are not read, README.md the first" in caplog.text
    assert read(tmp_path / "b/*.txt", tmp_path / "a.jsonl", tmp_path / "b") == [
        "b/10.txt", "b/2.txt", "a.jsonl",
    ]  # fmt: skip
    assert read(tmp_path / "**/*.tex?") == ["a/c/x.text"]
    for name, message in (("*.gz", "no file matches"), ("none", "cannot read the text file")):
        with pytest.raises(UserError, match=message):
            find_texts([tmp_path / name], AUTO)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no text: files ending in .txt"):
        find_texts([tmp_path / "empty"], AUTO)


def test_links_to_folders_are_followed_once_and_never_in_a_circle(tmp_path: Path) -> None:
    for name in ("elsewhere/news", "corpus/books"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.txt").write_text(name)
    (tmp_path / "corpus" / "news").symlink_to("../elsewhere/news")
    (tmp_path / "corpus" / "again").symlink_to("../elsewhere/news")
    (tmp_path / "elsewhere" / "news" / "up").symlink_to("../../corpus")
    assert sorted(read(tmp_path / "corpus")) == ["corpus/books", "elsewhere/news"]


def tar(content: bytes) -> bytes:
    with io.BytesIO() as stream:
        with tarfile.open(fileobj=stream, mode="w") as archive:
            entry = tarfile.TarInfo("text.txt")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": null}', 'line 2 of .*d.jsonl has None as "text"; a text is needed'),
        (b'{"text": 5}', 'line 2 of .*d.jsonl has 5 as "text"'),
        (b'{"txt": "a", "id": 1}', 'line 2 of .*d.jsonl has no "text", but txt, id: .*--text-key'),
        (b'["text"]', "line 2 of .*d.jsonl is no JSON object, but a list"),
        (b'{"text": "\\ud800"}', "line 2 of .*d.jsonl has half a character"),
        (b'{"text": "a', "line 2 of .*d.jsonl is no JSON object: Unterminated"),
        (b'{"a":' * 100_000, "line 2 of .*d.jsonl is no JSON object"),
        (b'{"text": "\xff"}', "line 2 of .*d.jsonl is not UTF-8"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(lines(["good"]) + b"\n" + content + b"\n")
    with pytest.raises(UserError, match=message):
        read(path)


BROKEN = [b'{"text": null}', b'{"text": "\xff"}', b'{"text": "a', b"[1]", b'{"other": "a"}']


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.jsonl.zst"])
def test_broken_lines_are_left_out_and_counted(tmp_path: Path, name: str) -> None:
    """And blank lines are none, though they count."""
    content = lines(["one"]) + b"\n\n" + b"\n".join([*BROKEN, lines(["two"]), BROKEN[0]]) + b"\n"
    pack: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd}
    path, other = tmp_path / name, tmp_path / "other.jsonl"
    path.write_bytes(pack.get(path.suffix, bytes)(content))
    other.write_bytes(b"\xef\xbb\xbf" + lines(["three"]) + b"\n" + BROKEN[0])
    broken = BrokenLines(limit=7)
    pieces = list(read_pieces([path, other], AUTO, broken=broken))
    assert pieces == [(text, True) for text in ("one", "two", "three")]
    assert broken.found == {str(path): (6, 3), str(other): (1, 2)}
    assert broken.in_words() == (
        f"7 broken lines left out: {path} (6, first line 3), {other} (1, first line 2)"
    )
    reading = read_pieces([path, other], AUTO, broken=BrokenLines(limit=6))
    message = rf'line 2 of {other} has None as "text".*\(after 6 broken lines, as many as are'
    with pytest.raises(UserError, match=message):
        list(reading)


def test_broken_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    parquet(path, ["a", None, "b", "c", None])  # type: ignore[list-item]
    broken = BrokenLines(limit=2)
    assert [text for text, _ in read_pieces([path], AUTO, broken=broken)] == ["a", "b", "c"]
    assert broken.found == {str(path): (2, 2)}
    with pytest.raises(UserError, match=r"row 5 of .* \(after 1 broken lines"):
        list(read_pieces([path], AUTO, broken=BrokenLines(limit=1)))


def test_very_many_files_with_broken_lines_are_cut_short() -> None:
    found = {f"{number}.jsonl": (1, number + 1) for number in range(13)}
    said = BrokenLines(99, found).in_words()
    assert said.startswith("13 broken lines left out: 0.jsonl (1, first line 1), 1.jsonl (1,")
    assert said.endswith(" 9.jsonl (1, first line 10), and 3 more files")


def test_what_is_broken_as_a_whole_is_refused_all_the_same(tmp_path: Path) -> None:
    """A limit of lines is no licence for half a file, or for the wrong column."""
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines(["a"] * 99))[:-9])
    parquet(tmp_path / "d.parquet", ["a"], "content")
    for name, message in (("d.jsonl.gz", "cut off or damaged"), ("d.parquet", 'has no "text"')):
        with pytest.raises(UserError, match=message):
            list(read_pieces([tmp_path / name], AUTO, broken=BrokenLines(limit=999)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.txt", lines(["a"]), r"starts with a JSON object: pass --text-format jsonl"),
        ("d.txt", b'\xef\xbb\xbf\n [{\n "text"  : "a"}]', "starts with a JSON object"),
        ("d.txt.gz", gzip.compress(lines(["a"])), "starts with a JSON object"),
        ("d.json", b'\n[{"text": "a"}]', r"is one JSON array, not JSON lines: .* jq -c '\.\[\]'"),
        ("d.parquet", b"PA", "is no parquet file"),
        ("d.parquet", b"PAR1 and no more", "cannot read the parquet file"),
        ("d.tar", tar(b"words "), "d.tar is a tar archive, not text: unpack it"),
        ("d.tar.gz", gzip.compress(tar(b"words ")), "d.tar.gz is a tar archive"),
        ("d.txt.bz2", bz2.compress(b"words "), "d.txt.bz2 is compressed by bzip2"),
        ("d.jsonl.xz", lzma.compress(lines(["a"])), "d.jsonl.xz is compressed by xz"),
        ("d.txt", b"%PDF-1.4 words", "d.txt is a PDF document"),
        ("d.txt", b"\xe9\xe9", "d.txt is not UTF-8"),
        ("d.txt", b" \n", "d.txt is empty"),
        ("d.jsonl", b"\n\n", "d.jsonl is empty"),
        ("d.txt.gz", gzip.compress(b"words " * 99)[:-9], "d.txt.gz is cut off or damaged"),
        ("d.txt.gz", gzip.compress(b"words " * 99)[:20] + b"?" * 40, "d.txt.gz"),
        ("d.txt.zst", zstd(b"words " * 99)[:-3], "cannot read the text file .*d.txt.zst"),
    ],
    ids=itertools.count(),  # the contents hold the time at which gzip made them
)  # fmt: skip
def test_what_is_no_text_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_the_beginnings_are_looked_at_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "b.txt").write_bytes(lines(["a"]))
    with pytest.raises(UserError, match=r"b\.txt starts with a JSON object"):
        find_texts([tmp_path], AUTO)
    as_text = TextOptions(format="text")
    assert read(tmp_path / "b.txt", options=as_text) == [lines(["a"]).decode()]
    (tmp_path / "c.txt").write_text("{ braces } open this text")
    assert read(tmp_path / "c.txt") == ["{ braces } open this text"]


def test_parquet_without_the_column_or_the_text(tmp_path: Path) -> None:
    parquet(tmp_path / "d.parquet", DOCUMENTS, "content")
    with pytest.raises(UserError, match='d.parquet has no "text", but id, content'):
        read(tmp_path / "d.parquet")
    parquet(tmp_path / "d.parquet", ["a", None])  # type: ignore[list-item]
    with pytest.raises(UserError, match='row 2 of .*d.parquet has None as "text"'):
        read(tmp_path / "d.parquet")


def test_one_empty_file_of_several_is_no_error(tmp_path: Path) -> None:
    for name, content in (("a.txt", ""), ("b.txt", "words")):
        (tmp_path / name).write_text(content)
    assert read(tmp_path) == ["", "words"]
    (tmp_path / "b.txt").write_text(" ")
    with pytest.raises(UserError, match="all 2 text files are empty"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["text.txt", "lines.jsonl", "rows.parquet", "text.txt.gz"])
def test_reading_takes_little_memory_and_tells_how_far_it_is(tmp_path: Path, name: str) -> None:
    rng = random.Random(0)
    documents = [f"document {rng.getrandbits(4000):x}" for _ in range(8000)]
    path = tmp_path / name
    if name.endswith("parquet"):
        parquet(path, documents)
    elif name.endswith("jsonl"):
        path.write_bytes(lines(documents))
    else:
        text = "\n".join(documents).encode()
        path.write_bytes(gzip.compress(text, 1) if name.endswith("gz") else text)
    num_read: list[int] = []
    tracemalloc.start()
    num_characters = sum(
        len(piece.text) for piece in read_pieces([path], AUTO, "<end>", num_read.append)
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_characters >= sum(map(len, documents))
    assert peak < 4 * 2**20, "of 8 MiB of text"
    assert len(num_read) > 2
    assert sum(num_read) == pytest.approx(path.stat().st_size, rel=0.1)


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    """As a shell's `<(...)` is one."""
    os.mkfifo(tmp_path / "pipe")
    content = lines(DOCUMENTS)
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
    writer.start()
    assert read(tmp_path / "pipe", options=TextOptions(format="jsonl")) == DOCUMENTS
    writer.join()


def test_other_verbs_read_the_same_files(tmp_path: Path) -> None:
    documents = [f"{text} {'words ' * 2000}" for text in DOCUMENTS]
    (tmp_path / "d.JSON.gz").write_bytes(gzip.compress(lines(documents, "content")))
    options = TextOptions("content")
    assert read_text(tmp_path / "d.JSON.gz", options) == "\n\n".join(documents)
    assert read_text([tmp_path], options, 100).startswith(documents[0])
    with pytest.raises(UserError, match='has no "text"'):
        read_text(tmp_path / "d.JSON.gz")
