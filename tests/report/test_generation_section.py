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
    assert section.count("Variable tracking VT") == 2
