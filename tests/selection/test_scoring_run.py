"""Scoring runs: any number of ranks and any interruption give the same effects."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hydra import cpu
from megatron_hydra.errors import UserError

cpu.install_if_needed()

from hydra_tools.cli import main, run_verb  # noqa: E402
from kit.distributed import run_distributed  # noqa: E402
from kit.tiny_qwen3 import write_tiny_qwen3  # noqa: E402

from megatron_hydra.selection import scoring_run  # noqa: E402
from megatron_hydra.selection.combination import Combination  # noqa: E402
from megatron_hydra.selection.scorers.activation_patching import ActivationPatching  # noqa: E402
from megatron_hydra.selection.scores import HeadScores  # noqa: E402
from megatron_hydra.teachers.model_folder import weights_hash  # noqa: E402

LENGTH, NUM_PAIRS = 256, 8
OPTIONS = [
    "probes.names=[niah_single_2,kv_retrieval,text]",
    f"probes.pairs={NUM_PAIRS}", f"probes.length={LENGTH}",
    "probes.min_gap_logits=1e-4", "probes.min_gap_nats=1e-5", "run.batch_tokens=512",
    "scorers.path_patching.min_effect=0.05",
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_rank_of_module")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 folder, the same as a checkpoint folder, a text file, and its scores."""
    path = tmp_path_factory.mktemp("scoring")
    write_tiny_qwen3(path / "qwen3", max_position_embeddings=LENGTH)
    sentences = (f"Sentence {i} says that {i * i} is a square. " for i in range(2000))
    (path / "text.txt").write_text("".join(sentences))
    assert main(["convert", "--teacher", str(path / "qwen3"), "--out", str(path / "teacher")]) == 0
    assert main(arguments(path, "whole.json")) == 0
    return path


def arguments(folder: Path, out: str, *more: str) -> list[str]:
    return [
        "score", "--teacher", str(folder / "teacher"), "--out", str(folder / out),
        *OPTIONS, f"probes.text={folder / 'text.txt'}", *more,
    ]  # fmt: skip


def assert_equal_effects(found: HeadScores, expected: HeadScores, atol: float) -> None:
    assert [p.kept for p in found.probes] == [p.kept for p in expected.probes]
    assert set(found.effects) == set(expected.effects) == {"activation_patching", "path_patching"}
    for scorer, by_probe in expected.effects.items():
        for name, values in by_probe.items():
            np.testing.assert_allclose(found.effects[scorer][name], values, atol=atol, rtol=0)


def on_a_rank(words: list[str]) -> None:
    """What torchrun starts on each rank."""
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    assert run_verb("score", words[1:], "score") == 0


@pytest.mark.dist
def test_tensor_and_data_parallel_ranks_find_what_one_rank_finds(folder: Path) -> None:
    """Catches a head patched on the wrong rank, a unit done twice or lost, a missing reduction."""
    words = arguments(folder, "four.json", "model.tensor_model_parallel_size=2")
    run_distributed(on_a_rank, 4, words)
    expected = HeadScores.load(folder / "whole.json")
    assert max(np.abs(v).max() for v in expected.effects["path_patching"].values()) > 0.01
    # The readout of this random model is a difference of logits of a few tenths: float32
    # rounding (1e-6) over the smallest gap.
    least = min(p.gaps[i] for p in expected.probes for i in p.kept)
    assert_equal_effects(HeadScores.load(folder / "four.json"), expected, atol=2e-5 / least)
    assert not (folder / "four.json.partial").exists()
    command = json.loads((folder / "four.json").read_text())["provenance"]["command"]
    assert command.startswith("torchrun --nproc-per-node 4 -m hydra_tools.score ")


class _Killed(Exception):
    pass


def test_a_run_that_was_cut_off_goes_on_to_the_same_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches finished units that are lost, measured again, or filed under another's name."""
    measured: list[Any] = []
    measure = ActivationPatching.measure

    def counted(self: ActivationPatching, model: Any, batch: Any) -> Any:
        if len(measured) in die_at:
            die_at.discard(len(measured))
            raise _Killed
        measured.append((batch.probe, tuple(batch.gaps.tolist())))
        return measure(self, model, batch)

    monkeypatch.setattr(ActivationPatching, "measure", counted)
    die_at = {0, 1, 5}
    words = arguments(folder, "cut.json")
    for _ in range(3):
        with pytest.raises(_Killed):
            main(words)
        assert not (folder / "cut.json").exists()
    assert main(words) == 0
    num_batches = sum(-(-len(probe.kept) // 2) for probe in whole(folder).probes)
    assert len(measured) == len(set(measured)) == num_batches > 5
    assert_equal_effects(HeadScores.load(folder / "cut.json"), whole(folder), atol=0)
    assert not (folder / "cut.json.partial").exists()


def whole(folder: Path) -> HeadScores:
    return HeadScores.load(folder / "whole.json")


def test_an_unfinished_run_of_another_configuration_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def die(*args: Any) -> None:
        raise _Killed

    with monkeypatch.context() as patched, pytest.raises(_Killed):
        patched.setattr(ActivationPatching, "measure", die)
        main(arguments(folder, "other.json"))
    assert main(arguments(folder, "other.json", "probes.seed=1")) == 2
    assert "another probes" in capsys.readouterr().err
    assert main(arguments(folder, "other.json", "scorers.path_patching.max_rounds=1")) == 2
    assert "another scorers.path_patching.max_rounds: run" in capsys.readouterr().err
    assert main(arguments(folder, "other.json", "probes.seed=1", "--overwrite")) == 0


def test_scores_of_both_kinds_of_folder_name_the_same_weights(folder: Path) -> None:
    words = arguments(folder, "qwen3.json", "probes.names=[kv_retrieval]")
    words[words.index(str(folder / "teacher"))] = str(folder / "qwen3")
    assert main(words) == 0
    found = HeadScores.load(folder / "qwen3.json").teacher_weights_hash
    assert found == whole(folder).teacher_weights_hash == weights_hash(folder / "qwen3")


@pytest.mark.parametrize("kind", ["qwen3", "teacher"])
def test_an_unfinished_run_is_not_gone_on_with_other_weights(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    """Catches scores that mix two trainings of one shape, both of which a path named in turn."""
    teacher, text = tmp_path / "teacher", folder / "text.txt"
    shutil.copytree(folder / kind, teacher)
    words = [*arguments(tmp_path, "out.json", "probes.names=[kv_retrieval]"), f"probes.text={text}"]

    def die(*args: Any) -> None:
        raise _Killed

    with monkeypatch.context() as patched, pytest.raises(_Killed):
        patched.setattr(ActivationPatching, "measure", die)
        main(words)
    partial = contents(tmp_path / "out.json.partial")
    write_tiny_qwen3(tmp_path / "other", max_position_embeddings=LENGTH, seed=1)
    if kind == "teacher":
        convert = ["convert", "--overwrite", "--out", str(teacher)]
        assert main([*convert, "--teacher", str(tmp_path / "other")]) == 0
    else:
        shutil.copy(tmp_path / "other/model.safetensors", teacher)
    assert main(words) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert "unfinished run with another content of the teacher's weight files: run" in sentence
    assert contents(tmp_path / "out.json.partial") == partial


def contents(folder: Path) -> dict[str, bytes]:
    """What a run has measured, and of what."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


def test_what_no_run_wrote_is_left_where_it_is(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a folder of the user's own that goes because it has the name."""
    notes = folder / "own.json.partial" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("precious")
    for more in ((), ("--overwrite",)):
        assert main(arguments(folder, "own.json", *more)) == 2
        assert "holds notes.txt, which no scoring run wrote" in capsys.readouterr().err
    assert notes.read_text() == "precious"


_HOLDER = """
import sys, time
from pathlib import Path
from megatron_hydra.cpu import install_if_needed
install_if_needed()
from megatron_hydra.selection.scoring_run import PartialFolder
folder = PartialFolder(Path(sys.argv[1]), {})
folder.open()
print("open", flush=True)
time.sleep(120)
"""


def test_one_run_at_a_time_writes_a_scores_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(folder / "twice.json")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"open\n"
    assert main(arguments(folder, "twice.json", "--overwrite")) == 2
    assert f"is in use by process {holder.pid} on " in capsys.readouterr().err
    holder.kill()
    holder.wait()
    # The same record but for its configuration: a killed run leaves no lock behind.
    assert main(arguments(folder, "twice.json")) == 2
    assert "holds an unfinished run with another" in capsys.readouterr().err


def test_probes_are_as_long_as_the_teacher_allows_and_paths_may_be_spelt_otherwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def die(*args: Any) -> None:
        raise _Killed

    words = [w for w in arguments(folder, "long.json") if not w.startswith("probes.length")]
    with monkeypatch.context() as patched, pytest.raises(_Killed):
        patched.setattr(ActivationPatching, "measure", die)
        main(words)
    assert "probes of 256 tokens (probes.length)" in capsys.readouterr().out
    words[words.index("--teacher") + 1] = str(folder / "cut" / ".." / "teacher")
    (folder / "cut").mkdir()
    assert main(words) == 0, "the same teacher by another path goes on"
    found = HeadScores.load(folder / "long.json")
    assert {probe.length_tokens for probe in found.probes} == {256}


def test_pairs_with_a_small_gap_are_dropped_counted_and_seen_by_no_scorer(folder: Path) -> None:
    gaps = sorted(whole(folder).probes[0].gaps)
    least = gaps[-2]  # the two pairs with the largest gap stay
    words = arguments(folder, "gap.json", f"probes.min_gap_logits={least}")
    words[words.index(OPTIONS[0])] = "probes.names=[niah_single_2]"
    assert main(words) == 0
    (record,) = HeadScores.load(folder / "gap.json").probes
    assert (record.num_pairs, record.num_dropped) == (NUM_PAIRS, NUM_PAIRS - 2)
    assert all((record.gaps[i] >= least) == (i in record.kept) for i in range(NUM_PAIRS))
    before, by_pair = whole(folder).probes[0], effects_of(whole(folder))
    rows = [before.kept.index(i) for i in record.kept]
    np.testing.assert_allclose(
        effects_of(HeadScores.load(folder / "gap.json")), by_pair[rows], atol=1e-4
    )


def effects_of(scores: HeadScores) -> np.ndarray:
    return scores.effects["activation_patching"]["niah_single_2"]


def test_bad_runs_end_in_a_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*more: str) -> str:
        assert main(arguments(folder, "bad.json", *more)) == 2
        assert not (folder / "bad.json").exists()
        return capsys.readouterr().err.splitlines()[-1]

    assert "tells no pair apart of sub-probe 'niah_single_2' (largest" in refused(
        "probes.min_gap_logits=1e6"
    )
    (folder / "bad.json.partial").rename(folder / "aside")  # kept for a run that goes on
    assert "built for 256 tokens at most" in refused("probes.length=300")
    assert "unknown probe 'niah_singel_2'; known: niah_single_1, " in refused(
        "probes.names=[niah_singel_2]"
    )
    assert "did you mean scorers.names" in refused("scorers.name=[random]")
    assert "scorers.names[0] is 'rondom'; allowed: act" in refused("scorers.names=[rondom]")
    assert "pairs_of.x is 0; it must be 1 or more" in refused("probes.pairs_of={x: 0}")
    assert "name both" in refused("scorers.names=[path_patching]")
    assert "does not run" in refused("combine.scorers=[zero_ablation]")
    assert "no probe of probes.names can be read by scorer attention_score" in refused(
        "probes.names=[text]", "scorers.names=[activation_patching,attention_score]"
    )
    assert not (folder / "bad.json.partial").exists()  # said before anything is measured
    assert "the number of ranks, 1, is not divisible by" in refused(
        "model.tensor_model_parallel_size=2"
    )

    def not_finite(model: Any, tokens: Any, num: int) -> Any:
        return torch.full((len(tokens), num, 264), torch.nan)

    monkeypatch.setattr(scoring_run, "answer_logits", not_finite)
    assert "logits on probe 'niah_single_2' are not finite" in refused()


def test_controls_need_no_probe_of_their_own(folder: Path) -> None:
    names = "scorers.names=[activation_patching,random,every_nth]"
    assert main(arguments(folder, "controls.json", names)) == 2  # every fourth of two layers
    assert main(arguments(folder, "controls.json", names, "scorers.every=2")) == 0
    scores = HeadScores.load(folder / "controls.json")
    assert scores.combination.scorers == ("activation_patching",)
    assert scores.effects["random"]["control"].shape == (1, 2, 4)
    assert scores.with_combination(Combination(("random",))).scores.max() == 1.0
    with pytest.raises(UserError, match="names scorer"):
        scores.with_combination(Combination(("path_patching",)))
