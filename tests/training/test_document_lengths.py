"""Long documents are seen as often as the YAML says, and what is said of lengths is so.

Catches: a factor that counts samples and not documents, one that other documents or datasets get
too, a sample index of another factor that is found again, and shares that are not those of the
tokens that a run reads.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from megatron_hydra.errors import UserError  # noqa: E402
from megatron_hydra.nemo.data import make_data_module  # noqa: E402
from megatron_hydra.parallel import initialize_model_parallel  # noqa: E402
from megatron_hydra.training.config import DataSection  # noqa: E402
from megatron_hydra.training.dataset_checks import _check_up_sampling  # noqa: E402
from megatron_hydra.training.document_lengths import describe_lengths, up_sampling  # noqa: E402
from megatron_hydra.training.indexed_dataset import write_indexed_dataset  # noqa: E402
from megatron_hydra.training.samples import documents  # noqa: E402

LENGTH, LEAST, FACTOR = 8, 40, 3
LENGTHS = {"a": [40, 6, 39, 5, 120, 7] * 4, "b": [11, 300, 39] * 3}
FIRST = {"a": 0, "b": 100}
"""The token that a dataset's first document consists of; each next document has the next."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, lengths in LENGTHS.items():
        texts = [[FIRST[name] + number] * length for number, length in enumerate(lengths)]
        write_indexed_dataset(folder / name, texts, 256, {})
    return folder


def section(folder: Path, names: str, **values: Any) -> DataSection:
    paths = [str(folder / name) for name in names]
    chosen = {"long_document_tokens": LEAST, "long_document_factor": FACTOR, **values}
    return DataSection(paths, LENGTH, 1, 1, **chosen)


def read(data: DataSection, index: Path, num_samples: int) -> tuple[list[list[int]], Any]:
    """What a run of so many samples reads, in its order, and the dataset."""
    module = make_data_module(data, -1, index)
    module.build(num_samples, 1, 0, 0)
    return [module._train_ds[n]["tokens"].tolist() for n in range(num_samples)], module._train_ds


@pytest.fixture
def one_rank() -> None:
    """Megatron's blends ask for their rank."""
    initialize_model_parallel()


def epoch(names: str) -> Counter[int]:
    """Tokens of each document in an epoch, counted by hand."""
    return Counter(
        {
            FIRST[name] + number: length * (FACTOR if length >= LEAST else 1)
            for name in names
            for number, length in enumerate(LENGTHS[name])
        }
    )


def test_an_epoch_has_each_long_document_so_many_times(folder: Path, tmp_path: Path) -> None:
    expected = epoch("a")
    num_samples = (expected.total() - 1) // LENGTH
    found, dataset = read(section(folder, "a"), tmp_path, num_samples)
    counts = Counter(token for sample in found for token in sample)
    cut_off = expected.total() - num_samples * LENGTH  # of the last document: no whole sample
    assert sum((expected - counts).values()) == cut_off and not counts - expected
    assert set(documents(dataset, 0)[1]) == set(found[0]), "findings name the right documents"
    again, _ = read(section(folder, "a"), tmp_path / "elsewhere", num_samples)
    assert again == found, "by the seed alone"
    assert read(section(folder, "a"), tmp_path, num_samples)[0] == found, "kept index"


def test_epochs_repeat_it_and_the_report_counts_right(folder: Path, tmp_path: Path) -> None:
    data, num_samples = section(folder, "a"), 20 * epoch("a").total() // LENGTH
    found, _ = read(data, tmp_path, num_samples)
    counts = Counter(token for sample in found for token in sample)
    long = [number for number, length in enumerate(LENGTHS["a"]) if length >= LEAST]
    said = up_sampling(data, num_samples * LENGTH)
    assert (said.num_long, said.num_documents) == (8, 24)
    plain = sum(LENGTHS["a"][number] for number in long) / sum(LENGTHS["a"])
    assert said.share == pytest.approx(plain)
    seen = sum(counts[number] for number in long)
    assert said.share_seen == pytest.approx(seen / counts.total(), rel=0.01)
    times = seen / sum(LENGTHS["a"][number] for number in long)
    assert said.times_seen == pytest.approx(times, rel=0.01) and times > 59
    assert said.share_seen > said.share + 0.1


@pytest.mark.usefixtures("one_rank")
def test_several_datasets_are_read_for_as_many_epochs_as_a_run_needs(
    folder: Path, tmp_path: Path
) -> None:
    """Catches: a blend by size that ends after one, beyond which a run could not go on."""
    data = section(folder, "ab", long_document_tokens=None, long_document_factor=1)
    total = sum(map(sum, LENGTHS.values()))
    num_samples = 5 * total // LENGTH
    found, dataset = read(data, tmp_path, num_samples)
    assert len(dataset) >= num_samples
    counts = Counter(token for sample in found for token in sample)
    for name, lengths in LENGTHS.items():
        for number, length in enumerate(lengths):
            # Two samples' share of a document may be cut off at an epoch's and at the run's end.
            assert abs(counts[FIRST[name] + number] - 5 * length) <= length + 2 * LENGTH


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("weights", [[], [3.0, 1.0]], ids=["by size", "weights"])
def test_blends_keep_their_shares(folder: Path, tmp_path: Path, weights: list[float]) -> None:
    """By size, the up-sampled one counts; by weights, only what a dataset holds is changed."""
    data = section(folder, "ab", weights=weights)
    total = [epoch(name).total() for name in "ab"]
    num_samples = (sum(total) // LENGTH) - 4
    found, _ = read(data, tmp_path, num_samples)
    counts = Counter(token for sample in found for token in sample)
    of_a = sum(number for token, number in counts.items() if token < FIRST["b"]) / counts.total()
    assert of_a == pytest.approx(0.75 if weights else total[0] / sum(total), abs=0.01)
    long = [FIRST[name] + number for name in "ab"
            for number, length in enumerate(LENGTHS[name]) if length >= LEAST]  # fmt: skip
    said = up_sampling(data, num_samples * LENGTH)
    seen = sum(counts[token] for token in long)
    assert said.share_seen == pytest.approx(seen / counts.total(), abs=0.02)
    lengths = {FIRST[name] + number: length for name in "ab"
               for number, length in enumerate(LENGTHS[name])}  # fmt: skip
    often = max(
        sum(counts[t] for t in long if (t < 100) == is_a) /
        sum(lengths[t] for t in long if (t < 100) == is_a) for is_a in (True, False)
    )  # fmt: skip
    assert said.times_seen == pytest.approx(often, rel=0.03)


def test_another_length_or_factor_has_samples_of_its_own(folder: Path, tmp_path: Path) -> None:
    """Catches: Megatron's kept index, which knows neither, found again."""
    first, _ = read(section(folder, "a"), tmp_path, 30)
    for values in ({"long_document_factor": 5}, {"long_document_tokens": 100},
                   {"long_document_tokens": None, "long_document_factor": 1}):  # fmt: skip
        other, _ = read(section(folder, "a", **values), tmp_path, 30)
        fresh, _ = read(section(folder, "a", **values), tmp_path / "fresh", 30)
        assert other == fresh != first


def test_held_out_text_is_seen_as_it_is(folder: Path) -> None:
    held_out = section(folder, "a", validation_paths=[str(folder / "b")]).validation
    assert up_sampling(held_out, 100) is None and held_out.long_document_factor == 1


@pytest.mark.parametrize(
    ("names", "values", "sentence"),
    [
        ("ab", {"long_document_tokens": 301},
         "is 301, but the longest document of data.paths has 300 tokens"),
        ("a", {"long_document_tokens": 5}, "all documents of data.paths are that long or longer"),
        ("ab", {"long_document_tokens": 200, "weights": [1.0, 1.0]}, ""),
        ("ab", {"long_document_tokens": 5, "weights": [1.0, 1.0]}, "all documents of data.paths"),
    ],
)  # fmt: skip
def test_what_the_data_cannot_give_is_refused(
    folder: Path, names: str, values: dict[str, Any], sentence: str
) -> None:
    data = section(folder, names, **values)
    if not sentence:
        _check_up_sampling(data)
        return
    with pytest.raises(UserError, match=sentence):
        _check_up_sampling(data)


def test_weights_that_leave_nothing_to_up_sample_are_refused(tmp_path: Path) -> None:
    for name, length in (("short", 5), ("long", 50)):
        write_indexed_dataset(tmp_path / name, [[1] * length] * 3, 256, {})
    names = [str(tmp_path / name) for name in ("short", "long")]
    data = DataSection(names, LENGTH, 1, 1, long_document_tokens=50, long_document_factor=2)
    _check_up_sampling(data)  # by size, the long one counts twice
    data.weights = [1.0, 1.0]
    with pytest.raises(UserError, match="change data.weights instead"):
        _check_up_sampling(data)


def test_shares_by_length_are_those_of_the_tokens(tmp_path: Path) -> None:
    lengths = [4095, 4096, 16383, 16384, 131072, 262144]
    for name, own in (("a", lengths[:3]), ("b", lengths[3:])):
        write_indexed_dataset(tmp_path / name, [[1] * length for length in own], 256, {})
    of_class = {"below 4,096": [4095], "from 4,096": [4096, 16383], "from 16,384": [16384],
                "from 131,072": [131072, 262144]}  # fmt: skip
    parts = [f"{100 * sum(own) / sum(lengths):.3g}% {name}" for name, own in of_class.items()]
    said = describe_lengths([str(tmp_path / name) for name in "ab"])
    assert said == "tokens by length of document: " + ", ".join(parts)
    assert np.isclose(sum(float(part.split("%")[0]) for part in parts), 100, atol=0.3)
