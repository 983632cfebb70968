"""The benchmark of layouts: on eight GPUs all can be laid out, and it runs on CPU ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import layouts
import pytest
from qwen3_1p7b import SHAPE
from uneven_plan import uneven_plan

from megatron_hydra.training.config import load_config
from megatron_hydra.training.config_checks import check_ranks
from megatron_hydra.training.memory import memory_of_run


def test_layouts_of_eight_gpus_fit_the_ranks_and_most_the_memory(tmp_path: Path) -> None:
    found = list(layouts.layouts(8, layouts.REAL.lengths))
    asked = {(x.tp, x.cp, x.pp, x.tokens) for x in found if x.stage == "distill" and x.gpus == 8}
    short, long, longest = layouts.REAL.lengths
    assert asked == {
        (1, 1, 1, short), (2, 1, 1, short), (4, 1, 1, short), (8, 1, 1, short),
        (1, 1, 2, short), (1, 1, 4, short),
        *((1, size, 1, tokens) for size in (2, 4, 8) for tokens in (long, longest)),
    }  # fmt: skip
    assert len({x.name for x in found}) == len(found) == 2 * 15
    assert {x.gpus for x in found if x.replicas == x.gpus} == {1, 2, 4, 8}
    too_large = set()
    for layout in found:
        words = layouts.train_words(layout.stage, layouts.REAL, tmp_path, tmp_path / "run", 9)
        config = load_config(words[0], [*words[1:], *layout.overrides()])
        check_ranks(config, layout.gpus)
        memory, why = memory_of_run(config, SHAPE, uneven_plan(112), layout.gpus)
        assert memory is not None, why
        if memory.peak > 139 * 2**30:
            too_large.add((layout.cp, layout.tokens))
    assert too_large <= {(2, longest)}


@pytest.mark.dist
@pytest.mark.exhaustive
def test_it_runs_on_cpu_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two goes, of which the second asks for nothing that the first has measured."""
    words = ["layouts", "--gpus", "2", "--out", str(tmp_path), "--trial", "--steps", "3"]
    seconds, first = 20, dict[Path, int]()
    while not first:  # it takes as long as the machine, which others use, to have a row
        monkeypatch.setattr(sys, "argv", [*words, "--seconds", str(seconds)])
        assert layouts.main() == 0
        first = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*_tp*.json")}
        seconds *= 2
    assert len(first) < 12 and not (tmp_path / "chain.json").exists()
    monkeypatch.setattr(sys, "argv", words)
    assert layouts.main() == 0
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    result = json.loads((tmp_path / "layouts.json").read_text())
    assert len(result["rows"]) == 12
    for row in result["rows"]:
        assert not row["failed"] and row["steps"] >= 1 and row["tokens/s per GPU"] > 0
    assert result["chain"]["went on from"] == [10] and result["chain"]["killed after"] >= 13
    assert (tmp_path / "layouts.png").stat().st_size > 5000
