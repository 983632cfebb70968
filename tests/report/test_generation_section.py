"""The report's section on answers by generation: figures of the file, escaped, or no section."""

from __future__ import annotations

from megatron_hydra.evaluation.generation import Answered, GeneratedResult, Generation
from megatron_hydra.report.rendering import render
from megatron_hydra.report.sections import generation_section


def test_answers_by_generation_are_shown_where_there_are_any() -> None:
    assert render("generation.html", generation_section(None)).strip() == ""
    better = tuple(Answered.count(("vt", n), [5, 3, 0, 5], [5] * 4) for n in (64, 128))
    worse = tuple(Answered.count(("vt", n), [4, 3, 0, 5], [5] * 4) for n in (64, 128))
    rows = (
        GeneratedResult("teacher", "t", 8, 8, 64, 0, worse),
        GeneratedResult("<exported>", "e", None, None, None, None, better),
    )
    section = render(
        "generation.html",
        generation_section(Generation(rows, "not RULER's <own>", "bf16", "0", {"seed": 1})),
    )
    assert "not RULER&#39;s &lt;own&gt;" in section and "&lt;exported&gt;" in section
    assert section.count('class="best">50.0') == 2 and section.count("<td>25.0") == 2
    assert "65.0" in section and "8 of 8 heads FA" in section and "None" not in section
    assert section.count('colspan="2" scope="colgroup">Variable tracking VT') == 1


def test_the_needle_grid_has_a_cell_for_each_fifth() -> None:
    cell = Answered.count(("niah_single_2", 4096), [1, 0, 1, 1], [1] * 4, [0.1, 0.15, 0.5, 0.99])
    row = GeneratedResult("hybrid", "h", 2, 8, 64, 0, (cell,))
    generation = Generation((row,), "head", "bf16", "0", {"seed": 1})
    section = render("generation.html", generation_section(generation))
    grid = section[section.index("Needle grid") :]
    assert [f">{text}</td>" in grid for text in ("50", "100", "–")] == [True] * 3
    assert grid.count('class="shade') == 3 and grid.count("<td>–</td>") == 2
    assert 'title="1 of 2"' in grid and "4,096" in grid
