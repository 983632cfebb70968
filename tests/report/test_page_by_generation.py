"""The page of results by generation: its figures, and results that it cannot be made of.

Catches: figures of another model, task or length; an earlier release's hybrid taken for a teacher.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest
from hydra_tools import report as verb
from test_report import CONTROL, LENGTHS, NAMES, PLAN, Page, arguments, runs

from megatron_hydra.errors import UserError
from megatron_hydra.evaluation.generation import Answered, GeneratedResult, Generation
from megatron_hydra.evaluation.positions import PositionLoss
from megatron_hydra.evaluation.results import FAHeads

__all__ = ["arguments", "runs"]  # fixtures

TASKS = ("niah_single_2", "vt")


def _model(name: str, num_right: int, fa_heads: list[list[int]] | None) -> GeneratedResult:
    """Right in so many of 50 samples at the first length, and one fewer at each further."""
    cells = [(task, length) for task in TASKS for length in LENGTHS]
    rights = [num_right - place for place in range(len(cells))]
    tasks = tuple(
        Answered.count(cell, [1] * right + [0] * (50 - right), [1] * 50)
        for cell, right in zip(cells, rights, strict=True)
    )
    plan: FAHeads | None = None if fa_heads is None else tuple(map(tuple, fa_heads))
    return GeneratedResult(
        name, f"runs/{name}", 8 if plan is None else 2, 8,
        1024 if plan is None else 512, 0 if plan is None else 5000,
        tasks, (PositionLoss(1, 64, 320, 1.0), PositionLoss(65, 128, 320, 2.0)), plan,
    )  # fmt: skip


def _generation() -> Generation:
    plans = (None, PLAN, PLAN, CONTROL)
    rows = [_model(*row) for row in zip(NAMES, (49, 4, 47, 21), plans, strict=True)]
    unknown = dataclasses.replace(
        rows[0], name="a GPT-2", fa_heads=None, total_heads=None, cache_bytes_per_token=None,
        state_bytes=None,
    )  # fmt: skip
    command = {"command": "megatron-hydra convert --plan control.json"}
    provenance = {"seed": 78, "models": {NAMES[3]: {"path": "x", "weights": command}}}
    return Generation((*rows, unknown), "not RULER's own", "fp32", "0", provenance)


@pytest.fixture
def asked(arguments: argparse.Namespace, tmp_path: Path) -> argparse.Namespace:
    """The verb's arguments with a file of generation in the evaluation's place."""
    arguments.evaluation, arguments.generation = None, tmp_path / "generation.json"
    return arguments


def test_the_page_is_of_what_was_generated(asked: argparse.Namespace) -> None:
    _generation().save(asked.generation)
    assert verb.run(asked) == 0
    text = Page(asked.out).text
    # Of the better hybrid of the plan: 47, 46, 45, 44 of 50.
    assert "“hybrid, trained” stores 50% of the teacher's cache per token" in text
    assert "answers 90.0% of the samples in its median cell (variable tracking VT at 64" in text
    assert "and 88.0% in its worst (variable tracking VT at 128 tokens)" in text
    assert "the teacher answers 94.0%" in text, "46 of 50 in the worst, 47 in the lower middle"
    assert "median and worst of 4 cells" in text
    assert "512 50% 5,000 10" in text and "Cache, bytes per token (fp32)" in text
    assert text.count("training length") == 0, "which no file says"
    for figure in ("94.0 83.8–97.9 94.0", "2.72", "7.39", "a GPT-2", "not RULER's own"):
        assert figure in text
    for record in ("seed = 78", "random heads, trained: weights", "convert --plan control.json"):
        assert record in text
    assert "Evaluation by generation" in text and "in training lengths" not in text


def test_the_page_speaks_of_it_where_an_evaluation_stands_beside_it(
    asked: argparse.Namespace, tmp_path: Path
) -> None:
    """Log-likelihoods may stay high where what has to be generated is lost."""
    _generation().save(asked.generation)
    asked.evaluation = tmp_path / "evaluation.json"
    assert verb.run(asked) == 0
    text = Page(asked.out).text
    assert "answers 90.0% of the samples in its median cell (variable tracking VT at 64" in text
    assert "Accuracy of generated text: median and worst of 4 cells" in text
    assert "Cache, bytes per token (fp32)" in text, "the evaluation's are bf16"
    assert "seed = 77" in text and "seed = 78" in text and "10.64" in text, "its own section stays"


def test_results_that_no_page_can_be_made_of_are_refused(
    asked: argparse.Namespace, tmp_path: Path
) -> None:
    whole = _generation()
    earlier = dataclasses.replace(whole.models[2], plan=None)
    for models, message in (
        (whole.models[1:], "the results by generation have no teacher"),
        ((*whole.models[:2], earlier), "do not say which heads of 'hybrid, trained' are FA heads"),
        ((whole.models[0], whole.models[3]), "no hybrid with exactly the plan's 2 FA heads"),
    ):
        dataclasses.replace(whole, models=models).save(asked.generation, overwrite=True)
        for asked.evaluation in (None, tmp_path / "evaluation.json"):
            with pytest.raises(UserError, match=message):
                verb.run(asked)
    asked.evaluation = None
    asked.generation = None
    with pytest.raises(UserError, match="--evaluation or --generation is needed"):
        verb.run(asked)
    assert not asked.out.exists()
