"""`preprocess` writes the documents that were given, each with its end, however it is run."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra_tools import cli
from kit.tiny_qwen3 import write_byte_tokenizer

from megatron_hydra.teachers import encoding

END = 256
CHAT = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain tokenizer, `bytes`, and one for chats, `chat`, whose `eos_token` ends a turn."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    write_byte_tokenizer(folder / "bytes")
    chat = AutoTokenizer.from_pretrained(folder / "bytes")
    chat.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chat.eos_token = "<|im_end|>"
    chat.save_pretrained(folder / "chat")
    return folder


def preprocess(tokenizer: Path, out: Path, *options: str) -> list[list[int]]:
    """The documents that the verb writes."""
    command = ["preprocess", "--tokenizer", str(tokenizer), "--out", str(out), *options]
    assert cli.main(command) == 0
    tokens = np.fromfile(f"{out}.bin", np.uint16).tolist()
    num_documents = notes(out)["num_documents"]
    header = 34  # magic, version, type, two counts
    lengths = np.fromfile(f"{out}.idx", np.int32, num_documents, offset=header)
    ends = np.cumsum(lengths).tolist()
    return [tokens[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def notes(out: Path) -> dict[str, Any]:
    return json.loads(Path(f"{out}.json").read_text())


def ids(folder: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


def test_documents_end_with_the_end_of_text_and_not_of_a_turn(folder: Path, tmp_path: Path) -> None:
    chat = folder / "chat"
    text = tmp_path / "text.txt"
    text.write_text("first<|endoftext|>second<|endoftext|>third")
    found = preprocess(chat, tmp_path / "d", "--input", str(text))
    assert found == [[*ids(chat, word), END] for word in ("first", "second", "third")]
    expected = {"token": "<|endoftext|>", "id": END, "num_documents": 3}
    assert notes(tmp_path / "d")["end_of_document"] == expected
    text = tmp_path / "chat.jsonl"
    texts = [CHAT, "", "done<|endoftext|>"]
    text.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    found = preprocess(chat, tmp_path / "c", "--input", str(text))
    assert found == [[*ids(chat, CHAT), END], ids(chat, "done<|endoftext|>")], "one end each"
    turn = ids(chat, "<|im_end|>")
    assert len(turn) == 1 and found[0].count(turn[0]) == 2


def test_the_end_of_a_document_can_be_named(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("first<|im_end|>second<|endoftext|>third")
    end = ["--end-of-document", "<|im_end|>"]
    found = preprocess(folder / "chat", tmp_path / "d", "--input", str(text), *end)
    (turn,) = ids(folder / "chat", "<|im_end|>")
    assert [document[-1] for document in found] == [turn, turn]
    assert notes(tmp_path / "d")["end_of_document"]["token"] == "<|im_end|>"


def test_special_tokens_can_stay_text(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(CHAT + "<|endoftext|>more")
    options = ["--input", str(text), "--special-tokens-as-text"]
    (found,) = preprocess(folder / "chat", tmp_path / "d", *options)
    letters = {letter: ids(folder / "chat", letter) for letter in CHAT + "<|endoftext|>more"}
    assert found == [*(letters[letter][0] for letter in text.read_text()), END]


def test_it_ends_with_the_tokens_by_length_of_document(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": "a" * n}) for n in (999, 3999, 19_999)))
    assert list(map(len, preprocess(folder / "bytes", tmp_path / "d", "--input", str(text)))) == [
        1000, 4000, 20_000,
    ]  # fmt: skip
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "tokens by length of document: 20% below 4,096, 80% from 16,384"


@pytest.mark.parametrize("processes", ["1", "2"])
def test_it_ends_with_the_broken_lines_that_it_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], processes: str
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one"}\n{"text": \n{"text": "two"}\n{"text": 2}\n')
    options = ["--input", str(text), "--processes", processes, "--max-broken-lines"]
    found = preprocess(folder / "bytes", tmp_path / "d", *options, "2")
    assert found == [[*ids(folder / "bytes", word), END] for word in ("one", "two")]
    said = capsys.readouterr().out.splitlines()
    assert said[-2] == f"2 broken lines left out: {text} (2, first line 2)"
    assert notes(tmp_path / "d")["broken_lines"] == {str(text): [2, 2]}
    command = ["preprocess", "--tokenizer", str(folder / "bytes"), "--out", str(tmp_path / "e")]
    assert cli.main([*command, *options, "1"]) == 2
    assert f"line 4 of {text} has 2 as" in capsys.readouterr().err
    assert not list(tmp_path.glob("e.*"))


def test_any_number_of_processes_writes_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 5000)
    rng = random.Random(0)
    for name in ("a.txt", "b.jsonl"):
        texts = ["word " * rng.randint(1, 400) + f"\n{number}" for number in range(100)]
        if name.endswith("l"):
            content = "\n".join(json.dumps({"text": text}) for text in texts)
        else:
            content = "<|endoftext|>".join([*texts, "one two\n" * 40_000])
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_text(content)
    for number in (1, 2, 3):
        options = ["--input", str(tmp_path / "texts"), "--processes", str(number)]
        documents = preprocess(folder / "bytes", tmp_path / f"d{number}", *options)
        assert len(documents) == 201
    for ending in ("bin", "idx"):
        first, *others = ((tmp_path / f"d{n}.{ending}").read_bytes() for n in (1, 2, 3))
        assert others == [first, first]


def test_a_long_document_is_tokenised_in_pieces(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory does not grow with a file: no call of the tokenizer sees much of it."""
    encode, seen = encoding.encode, []

    def watched(tokenizer: Any, texts: list[str], *args: Any) -> list[list[int]]:
        seen.append(sum(map(len, texts)))
        return encode(tokenizer, texts, *args)

    monkeypatch.setattr(encoding, "encode", watched)
    text = tmp_path / "text.txt"
    text.write_text("some words in a line\n" * 40_000)
    (found,) = preprocess(folder / "bytes", tmp_path / "d", "--input", str(text))
    assert found == [*ids(folder / "bytes", text.read_text()), END]
    assert max(seen) < 2**19 and sum(seen) == text.stat().st_size


def test_documents_with_retrieval_end_too(folder: Path, tmp_path: Path) -> None:
    """Training samples and documents coincide, and the answer is still whole before the end."""
    text = tmp_path / "text.jsonl"
    texts = [f"Line {number} tells of something.\n" * 20 for number in range(100)]
    text.write_text("\n".join(json.dumps({"content": text}) for text in texts))
    options = ["--input", str(text), "--text-key", "content", "--retrieval-fraction", "0.5"]
    options += ["--seq-length", "400", "--num-documents", "20"]
    found = preprocess(folder / "bytes", tmp_path / "d", *options)
    assert [len(document) for document in found] == [400] * 20
    assert all(document.count(END) == 1 and document[-1] == END for document in found)
    assert notes(tmp_path / "d")["end_of_document"]["num_documents"] == 20
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "bytes")
    decoded = [tokenizer.decode(document[:-1]) for document in found]
    asked = [re.search(r"What is the number for (\w+)\? The number for \1 is (\d{4})$", text)
             for text in decoded]  # fmt: skip
    assert 4 < sum(match is not None for match in asked) < 16
    for text_, match in zip(decoded, asked, strict=True):
        if match:
            assert f"The number for {match[1]} is {match[2]}." in text_
    assert not any('"content"' in text for text in decoded), "JSON taken for prose"


@pytest.mark.parametrize(
    "option",
    ["--input IN/none.txt", "--tokenizer IN/none", "--input IN/lines.txt", "--out IN/lines"],
)
def test_mistakes_are_said_before_the_slow_imports(tmp_path: Path, option: str) -> None:
    (tmp_path / "lines.txt").write_text('{"text": "a"}')
    (tmp_path / "lines.idx").write_text("an earlier result")
    words = f"preprocess --tokenizer IN --out IN/d {option}".replace("IN", str(tmp_path)).split()
    program = (
        "import sys\nfrom hydra_tools import cli\n"
        f"code = cli.main({words})\n"
        "print(code, {'torch', 'megatron', 'nemo', 'transformers', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "2 set()", done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-broken-lines", "-1"], "--max-broken-lines is -1; it must be 0 or more"),
        (["--processes", "0"], "the number of processes is 0; it must be 1 or more"),
        (["--end-of-document", "<end>"], "no token '<end>' to end documents with"),
        (["--text-key", "txt", "--input", "IN"], 'line 1 of .* has no "txt", but text'),
        (["--retrieval-fraction", "0", "--seq-length", "9" * 9, "--num-documents", "9" * 9],
         r"d needs [\d,.]+ GiB, and .* has .* free"),
    ],
)  # fmt: skip
def test_bad_options(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "a"}')
    options = [option.replace("IN", str(tmp_path / "text.jsonl")) for option in options]
    command = ["preprocess", "--tokenizer", str(folder / "bytes"), "--out", str(tmp_path / "d")]
    assert cli.main([*command, *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


# Texts without end, encoded by processes that say who they are.
ENDLESS = """
import os
from itertools import repeat
from megatron_hydra.teachers.encoding import encode_pieces

class Tokenizer:
    def __call__(self, texts, **options):
        return {"input_ids": [[os.getpid()] for _ in texts]}

for tokens, _ in encode_pieces(Tokenizer(), repeat(("x" * 2**18, True)), num_processes=2):
    print(*tokens, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for it")
def test_processes_do_not_outlive_a_killed_command() -> None:
    command = subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, text=True)
    found: set[int] = set()
    while len(found) < 2:
        found.add(int(command.stdout.readline()))
    command.kill()
    command.wait()
    end = time.monotonic() + 20
    while alive := [pid for pid in found if _is_alive(pid)]:
        if time.monotonic() > end:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            pytest.fail("orphans")
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
