"""What a run is told of its datasets: their contents, ends of documents, ids without a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from megatron_hydra.errors import UserError  # noqa: E402
from megatron_hydra.nemo.data import find_end_of_document, make_data_module  # noqa: E402
from megatron_hydra.training.config import (  # noqa: E402
    DataSection,
    LogSection,
    OptimSection,
    RunConfig,
    TrainerSection,
    TransferSection,
)
from megatron_hydra.training.dataset_checks import (  # noqa: E402
    check_all_datasets,
    check_datasets,
    read_tokens,
)
from megatron_hydra.training.indexed_dataset import write_indexed_dataset  # noqa: E402
from megatron_hydra.training.run_inputs import datasets_hash  # noqa: E402
from megatron_hydra.training.samples import documents  # noqa: E402

END, TURN = 256, 258
NAMES = {"<|endoftext|>": END, "<|im_end|>": TURN}


class ChatTokenizer:
    """As Qwen3's chat tokenizers have it: `eos_token` ends a turn."""

    eos_token = "<|im_end|>"

    def get_vocab(self) -> dict[str, int]:
        return {**{chr(i): i for i in range(256)}, **NAMES}


def section(*paths: Path, **values: Any) -> DataSection:
    return DataSection([str(path) for path in paths], 8, 1, 1, **values)


def write(prefix: Path, documents: list[list[int]], end: str | None = None) -> Path:
    noted = (end, NAMES[end]) if end else None
    write_indexed_dataset(prefix, documents, 259, {}, overwrite=True, end_of_document=noted)
    return prefix


def samples(data: DataSection, folder: Path, num_steps: int) -> tuple[list[list[int]], set[int]]:
    """Each sample that a run reads, and the documents that they come from."""
    module = make_data_module(data, -1, folder)
    module.build(num_steps, 1, 0, 0)
    found = [module._train_ds[place]["tokens"].tolist() for place in range(num_steps)]
    numbers = {n for place in range(num_steps) for n in documents(module._train_ds, place)[1]}
    return found, numbers


@pytest.mark.parametrize("sizes", [(20, 200), (200, 20)], ids=["longer", "shorter"])
def test_data_written_anew_is_what_is_trained_on(tmp_path: Path, sizes: tuple[int, int]) -> None:
    """Catches: a sample index kept by the path, which tells of the documents of an earlier time."""
    first, second = ([[n] * 12 for n in range(size)] for size in sizes)
    data = section(write(tmp_path / "d", first))
    samples(data, tmp_path / "index", 310)
    write(tmp_path / "d", second)
    found, numbers = samples(data, tmp_path / "index", 310)
    assert numbers == set(range(sizes[1]))
    assert {token for sample in found for token in sample} == set(range(sizes[1]))


def test_the_hash_knows_contents_and_their_order(tmp_path: Path) -> None:
    one, two = [[1, 2], [3, 4]], [[1, 2], [3, 5]]
    first = section(write(tmp_path / "a", one), write(tmp_path / "b", two))
    before = datasets_hash(first)
    assert before == datasets_hash(section(tmp_path / "a", tmp_path / "." / "b", seed=5))
    (tmp_path / "c").mkdir()
    moved = section(write(tmp_path / "c/a", one), write(tmp_path / "c/b", two))
    assert datasets_hash(moved) == before
    assert datasets_hash(section(tmp_path / "b", tmp_path / "a")) != before
    write(tmp_path / "b", [[1, 2, 3, 5]])  # the same tokens, one document
    assert datasets_hash(first) != before
    write(tmp_path / "b", two)
    assert datasets_hash(first) == before
    assert datasets_hash(section(tmp_path / "none")) == ""


def test_documents_end_with_what_is_noted_or_named(tmp_path: Path) -> None:
    text = write(tmp_path / "text", [[1, 2, END], [3, END]], "<|endoftext|>")
    chat = write(tmp_path / "chat", [[1, 2, TURN], [3, TURN]], "<|im_end|>")
    other = write(tmp_path / "other", [[1, 2, END, 3]])
    tokenizer = ChatTokenizer()
    assert find_end_of_document(section(text, other), tokenizer) == ("<|endoftext|>", END)
    assert find_end_of_document(section(chat), tokenizer) == ("<|im_end|>", TURN)
    named = section(chat, end_of_document="<|im_end|>")
    assert find_end_of_document(named, tokenizer) == ("<|im_end|>", TURN)
    refusals = {
        "documents of .*chat end with <|im_end|>": section(text, chat),
        "data.end_of_document is <|endoftext|>, but the documents of .*chat end with": section(
            chat, end_of_document="<|endoftext|>"
        ),
        "other has not a single <|im_end|>, so its documents have no end": section(chat, other),
        "no token '<end>'": section(other, end_of_document="<end>"),
    }
    for message, data in refusals.items():
        with pytest.raises(UserError, match=message.replace("|", r"\|")):
            find_end_of_document(data, tokenizer)


def test_a_dataset_without_a_single_end_is_refused(tmp_path: Path) -> None:
    noted = write(tmp_path / "noted", [[1, 2], [3]], "<|endoftext|>")
    other = write(tmp_path / "other", [[1, 2], [3]])
    (tmp_path / "other.json").unlink()
    old = write(tmp_path / "old", [[1, TURN], [3]])
    for path in (noted, other, old):
        with pytest.raises(UserError, match=rf"{path.name} has not a single <\|endoftext\|>"):
            find_end_of_document(section(path), ChatTokenizer())
    named = section(old, end_of_document="<|im_end|>")
    assert find_end_of_document(named, ChatTokenizer()) == ("<|im_end|>", TURN)


def test_a_token_of_another_id_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d"
    ending = ("<|endoftext|>", 7)
    write_indexed_dataset(path, [[1, 7]], 259, {}, end_of_document=ending)
    with pytest.raises(
        UserError, match="token 7 in the dataset .*, but 256 in the run's tokenizer"
    ):
        find_end_of_document(section(path), ChatTokenizer())


def test_ids_are_held_to_the_models_rows(tmp_path: Path) -> None:
    data = section(write(tmp_path / "d", [[1, 258] * 9]))
    check_datasets(data, 259)
    with pytest.raises(UserError, match="tokenizer whose ids go up to 258, but the model has 258"):
        check_datasets(data, 258)


@pytest.mark.parametrize("has_notes", [True, False], ids=["earlier release", "another tool"])
def test_ids_that_are_not_noted_are_looked_for(tmp_path: Path, has_notes: bool) -> None:
    """Catches: the number of tokens that an earlier release noted, taken for the largest id."""
    data = section(write(tmp_path / "d", [[1, 258] * 9]))
    notes = {"vocab_size": 200, "num_documents": 1, "num_tokens": 18}
    (tmp_path / "d.json").unlink()
    if has_notes:
        (tmp_path / "d.json").write_text(json.dumps(notes))
    with pytest.raises(UserError, match="d holds token 258, but the model has 258 tokens"):
        check_datasets(data, 258)
    check_datasets(data, 259)


def test_a_file_in_place_of_its_prefix_is_refused_with_the_prefix(tmp_path: Path) -> None:
    write(tmp_path / "d", [[1, 2] * 9])
    for ending in ("bin", "idx"):
        with pytest.raises(UserError, match=rf"is missing; name its prefix, {tmp_path}/d$"):
            check_datasets(section(tmp_path / f"d.{ending}"), 259)


def test_notes_of_another_dataset_are_refused(tmp_path: Path) -> None:
    data = section(write(tmp_path / "d", [[1, 2] * 9]))
    notes = (tmp_path / "d.json").read_text()
    write(tmp_path / "d", [[1, 2] * 12])
    (tmp_path / "d.json").write_text(notes)
    with pytest.raises(UserError, match=r"d\.json tells of 18 tokens, but the dataset .* has 24"):
        check_datasets(data, 259)
    assert np.fromfile(tmp_path / "d.bin", np.uint16).size == 24


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_tokens_are_read_as_megatron_wrote_them(tmp_path: Path, dtype: type) -> None:
    """Whatever the integer type, of which we write two ourselves."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=dtype)
    builder.add_document(torch.tensor([3, 1, 100]), [2, 1])
    builder.finalize(str(tmp_path / "x.idx"))
    assert read_tokens(str(tmp_path / "x")).tolist() == [3, 1, 100]


@pytest.mark.parametrize(
    ("documents", "sentence"),
    [
        (
            [[1] * 16],
            "trainer.validation_steps 2 takes 2 samples, but data.validation_paths hold 1",
        ),
        ([[1] * 8], r"at least data.seq_length \+ 1 are needed"),
        (
            [[1] * 16 + [200]],
            "the dataset .*held_out holds token 200, but the model has 200 tokens",
        ),
    ],
)
def test_what_is_held_out_is_checked_too(
    tmp_path: Path, documents: list[list[int]], sentence: str
) -> None:
    data = section(write(tmp_path / "d", [[1] * 9]))
    config = RunConfig(
        data,
        TrainerSection(3, validate_every_n_steps=1, validation_steps=2),
        OptimSection(1e-3),
        TransferSection("long_context", "hybrid"),
        LogSection("run"),
    )
    for name in ("d", "held_out"):  # without notes
        write(tmp_path / name, [[1] * 17])
        (tmp_path / f"{name}.json").unlink()
    data.validation_paths = [str(tmp_path / "held_out")]
    check_all_datasets(config, 200)
    write(tmp_path / "held_out", documents)
    (tmp_path / "held_out.json").unlink()
    with pytest.raises(UserError, match=sentence):
        check_all_datasets(config, 200)
