"""Tests of writing outputs: nothing half-written, nothing lost, nothing replaced unasked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from megatron_hydra.errors import UserError
from megatron_hydra.files import (
    check_output,
    check_outputs,
    content_hash,
    expand,
    lock,
    parse_json,
    read_json,
    versions,
    write_beside,
    write_json,
)


def names(folder: Path) -> list[str]:
    """Everything in the folder, hidden names too."""
    return sorted(os.listdir(folder))


def test_a_file_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out.txt"
    with write_beside(target) as temporary:
        temporary.write_text("half")
        assert temporary.parent == target.parent
        assert not target.exists()
    assert target.read_text() == "half"
    assert names(target.parent) == ["out.txt"]


def test_a_failed_block_leaves_the_earlier_output_and_no_rest(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), write_beside(target, overwrite=True) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert names(tmp_path) == ["out.txt"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for name in ("first", "second"):
        with write_beside(target, overwrite=True) as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert names(target) == ["second"]
    assert names(tmp_path) == ["out"]


def test_a_failed_folder_leaves_the_earlier_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(RuntimeError), write_beside(target, overwrite=True) as temporary:
        temporary.mkdir()
        (temporary / "half").touch()
        raise RuntimeError
    assert names(target) == ["old"]
    assert names(tmp_path) == ["out"]


def test_existing_output_needs_overwrite(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    write_json(target, {"a": 1})
    with pytest.raises(UserError, match=r"out\.json exists: name another, or pass --overwrite"):
        write_json(target, {"a": 2})
    assert json.loads(target.read_text()) == {"a": 1}
    write_json(target, {"a": 3}, overwrite=True)
    assert json.loads(target.read_text()) == {"a": 3}


def test_a_file_never_replaces_a_folder_nor_a_folder_a_file(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "precious").touch()
    file.write_text("precious")
    with pytest.raises(UserError, match="is a folder, and a file is to be written"):
        write_json(folder, {}, overwrite=True)
    with (
        pytest.raises(UserError, match="is a file, and a folder is to be written"),
        write_beside(file, overwrite=True) as temporary,
    ):
        temporary.mkdir()
    assert names(folder) == ["precious"]
    assert file.read_text() == "precious"
    assert names(tmp_path) == ["file", "folder"]


def test_the_kind_of_an_output_is_known_before_it_is_made(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.touch()
    for overwrite in (False, True):
        with pytest.raises(UserError, match="folder is a folder, and a file is to be written"):
            check_output(folder, overwrite, "file")
        with pytest.raises(UserError, match="file is a file, and a folder is to be written"):
            check_output(file, overwrite, "folder")
    check_output(folder, True, "folder")
    check_output(file, True, "file")
    check_output(tmp_path / "new", False, "folder")


def test_only_a_folder_with_its_marker_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    check_output(target, True, "folder", marker="model.json")  # empty: nothing to lose
    (target / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"out holds something else: it has no model\.json"):
        check_output(target, True, "folder", marker="model.json")
    with (
        pytest.raises(UserError, match="holds something else"),
        write_beside(target, True, "folder", marker="model.json") as temporary,
    ):
        temporary.mkdir()
    assert names(target) == ["thesis.tex"]
    (target / "model.json").touch()
    check_output(target, True, "folder", marker="model.json")
    with pytest.raises(UserError, match="exists"):
        check_output(target, False, "folder", marker="model.json")


@pytest.mark.parametrize("kind", ["file", None])
def test_a_pipe_or_device_is_never_replaced(tmp_path: Path, kind: Literal["file"] | None) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for output in (pipe, Path("/dev/null")):
        with pytest.raises(UserError, match=f"output {output} is a device or a pipe, not a file"):
            check_output(output, True, kind)
    with pytest.raises(UserError, match="pipe"):
        write_json(pipe, {}, overwrite=True)
    assert pipe.is_fifo()
    assert names(tmp_path) == ["pipe"]


def test_an_output_behind_a_link_is_written_where_it_points_to(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    for name in ("file", "folder", "new"):
        (tmp_path / name).symlink_to(f"disk/{name}")
    (disk / "folder" / "old").mkdir(parents=True)
    (disk / "file").write_text("old")
    for name in ("file", "new"):
        write_json(tmp_path / name, {"is": name}, overwrite=True)
        assert json.loads((disk / name).read_text()) == {"is": name}
    with write_beside(tmp_path / "folder", overwrite=True) as temporary:
        temporary.mkdir()
        (temporary / "second").touch()
    assert names(disk / "folder") == ["second"]
    assert names(disk) == names(tmp_path)[1:] == ["file", "folder", "new"]
    assert all((tmp_path / name).is_symlink() for name in names(disk))


def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    longest = "ü" * 125 + ".json"
    for _ in range(2):
        write_json(tmp_path / longest, {}, overwrite=True)
    assert names(tmp_path) == [longest]
    with pytest.raises(UserError, match="cannot write .*: File name too long"):
        check_output(tmp_path / f"x{longest}")


def test_a_byte_order_mark_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "edited.json"
    path.write_text('{"kind": "k", "schema_version": 1}', encoding="utf-8-sig")
    assert read_json(path, "k", 1) == {"kind": "k", "schema_version": 1}


def test_an_output_is_no_input_holds_none_and_lies_in_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "models" / "teacher"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    for output in ("models/teacher", "models", "models/../models/teacher", "link"):
        with pytest.raises(UserError, match=f"output {output} would replace the input"):
            check_outputs([Path(output)], [None, source])
    for output in ("models/teacher/config.json", "link/tokenizer.json", "models/teacher/a/b"):
        with pytest.raises(UserError, match=f"output {output} lies in the input"):
            check_outputs([Path(output)], [None, source])
    check_outputs([Path("models/teacher2"), None, Path("mod")], [None, source])
    with pytest.raises(UserError, match=r"two outputs would be written to mod"):
        check_outputs([Path("mod"), "./mod"], [])


def test_one_process_at_a_time_holds_a_lock_and_a_killed_one_leaves_none(tmp_path: Path) -> None:
    path = tmp_path / "run" / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    with (
        pytest.raises(UserError, match=rf"the run is in use by process {holder.pid} on "),
        lock(path, "the run"),
    ):
        raise AssertionError
    holder.kill()
    holder.wait()
    with lock(path, "the run"):
        pass


_HOLDER = """
import sys, time
from megatron_hydra.files import lock
with lock(sys.argv[1], "the run"):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999", '{"a": 1, "a": 2}'])
def test_json_is_read_by_its_standard(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="no number of JSON|too large|stands twice"):
        parse_json(text)
    path = tmp_path / "file.json"
    path.write_text(f'{{"kind": "k", "schema_version": 1, "x": {text}}}')
    with pytest.raises(UserError, match=r"file\.json is not valid JSON"):
        read_json(path, "k", 1)
    assert parse_json('{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}


def test_no_json_with_nan_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "file.json", {"x": float("nan")})
    assert names(tmp_path) == []


def test_a_hash_sees_names_sizes_and_contents(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"one")
    second.write_bytes(b"two")
    found = content_hash([first, second])
    assert content_hash([second, first]) == found
    assert content_hash([first]) != found
    copy = tmp_path / "copy" / "b"
    copy.parent.mkdir()
    copy.write_bytes(b"two")
    assert content_hash([first, copy]) == found, "a copy elsewhere is the same"
    second.write_bytes(b"twa")
    assert content_hash([first, second]) != found
    with pytest.raises(UserError, match="cannot read .*c: No such file"):
        content_hash([tmp_path / "c"])


def test_a_hash_of_a_large_file_reads_blocks_of_all_of_it(tmp_path: Path) -> None:
    path, size = tmp_path / "large", 2**27 + 5
    with path.open("wb") as stream:
        stream.truncate(size)
    found = {content_hash([path])}
    for place in (0, size // 3 // 2**17 * 2**17, size - 1):
        with path.open("r+b") as stream:
            stream.seek(place)
            stream.write(b"x" * min(2**17, size - place))
        found.add(content_hash([path]))
    assert len(found) == 4


def test_home_and_variables_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUNS", "/runs")
    assert expand("~/a") == Path("/home/me/a")
    assert expand("$RUNS/${RUNS}/b") == Path("/runs//runs/b")
    assert expand("plain/$") == Path("plain/$")
    with pytest.raises(UserError, match=r"log\.folder is \$NOWHERE/a, but \$NOWHERE is not set"):
        expand("$NOWHERE/a", "log.folder")


def test_the_current_folder_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    for target in (".", "..", str(inner), str(tmp_path), "/"):
        with pytest.raises(UserError, match="holds the current folder"):
            check_output(target, overwrite=True)


def test_checking_changes_nothing(tmp_path: Path) -> None:
    assert check_output(tmp_path / "a" / "b" / "out") == tmp_path / "a" / "b" / "out"
    assert names(tmp_path) == []


def test_unwritable_places_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path / "file" / "out.json", Path("/proc/out.json")):
        with pytest.raises(UserError, match=f"cannot write {target}: "):
            write_json(target, {})


def test_json_keeps_values_and_puts_numbers_on_one_line(tmp_path: Path) -> None:
    data = {
        "scores": [[0.5, -1e-9, 3.0], [1.0, 2.0, 3.0]],
        "text": 'a "[1,\n  2]" b',
        "empty": [],
        "mixed": ["x", {"y": [True, None, 1]}],
    }
    write_json(tmp_path / "a.json", data)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == data
    assert "[0.5, -1e-09, 3.0]" in text
    assert "[true, null, 1]" in text


def test_read_json_says_what_a_file_is(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match=r"cannot read .*a\.json: No such file"):
        read_json(path, "plan", 1)
    for content, sentence in [
        ("{", "is not valid JSON"),
        ("[]", "holds 'list', but a file of kind 'plan'"),
        ("{}", "holds None, but a file of kind 'plan'"),
        ('{"kind": "scores", "schema_version": 1}', "holds 'scores'"),
        ('{"kind": "plan", "schema_version": 2}', "has schema version 2; .* reads version 1"),
        ('{"kind": "plan"}', "has schema version None"),
    ]:
        path.write_text(content)
        with pytest.raises(UserError, match=sentence):
            read_json(path, "plan", 1)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not valid JSON"):
        read_json(path, "plan", 1)
    path.write_text('{"kind": "plan", "schema_version": 1, "x": 5}')
    assert read_json(path, "plan", 1)["x"] == 5


def test_versions_name_python_and_only_what_is_installed() -> None:
    found = versions()
    assert found["python"].count(".") == 2
    assert "torch" in found
    assert all(value for value in found.values())
