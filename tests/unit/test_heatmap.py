"""Tests of the head map: each cell's shade and each outline stand for the right head."""

from __future__ import annotations

import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.heatmap import draw_head_map
from megatron_hydra.selection.scores import HeadScores

ROWS = [[0.1, 0.9, 0.0, 0.2], [0.3, -0.5, 0.4, 0.8]]


def draw(plan: HeadPlan | None, rows: list[list[float]] = ROWS) -> Axes:
    ax = Figure().add_subplot()
    draw_head_map(HeadScores(2, 4, 2, "abc", "hand", rows, {}, rows, {}), plan, ax)
    return ax


def lightness(cells: PatchCollection) -> list[float]:
    return [sum(colour[:3]) for colour in cells.get_facecolor()]


def test_higher_scores_are_darker_and_negative_ones_lightest() -> None:
    ax = draw(None)
    (cells,) = (item for item in ax.collections if isinstance(item, PatchCollection))
    cells.update_scalarmappable()
    shades = lightness(cells)
    scores = [score for row in ROWS for score in row]
    order = sorted(range(8), key=lambda head: max(0.0, scores[head]))
    assert [shades[head] for head in order] == sorted(shades, reverse=True)
    assert shades[5] == shades[2] > shades[0]


def test_cells_stand_where_their_heads_are() -> None:
    ax = draw(None)
    (cells,) = (item for item in ax.collections if isinstance(item, PatchCollection))
    boxes = [path.get_extents() for path in cells.get_paths()]
    centres = [((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) for box in boxes]
    expected = [(x, layer) for layer in range(2) for x in ax.get_xticks()]
    assert centres == [pytest.approx(centre) for centre in expected]
    numbers = {text.get_position(): text.get_text() for text in ax.texts}
    assert numbers[ax.get_xticks()[1], 0] == "0.90"
    assert list(cells.get_array()) == [score for row in ROWS for score in row]


def test_outlines_stand_on_the_fa_heads() -> None:
    ax = draw(HeadPlan.from_fa_heads({0: [1], 1: [2, 3]}, 2, 4, 2))
    outlined = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    centres = sorted(
        (box.get_y() + box.get_height() / 2, box.get_x() + box.get_width() / 2) for box in outlined
    )
    ticks = ax.get_xticks()
    assert centres == [(0, ticks[1]), (1, ticks[2]), (1, ticks[3])]
    assert "3 of 8 heads" in ax.get_legend().get_texts()[0].get_text()


def test_query_groups_stand_apart_and_layers_run_down() -> None:
    ax = draw(None)
    ticks = list(ax.get_xticks())
    assert ticks[2] - ticks[1] > ticks[1] - ticks[0] == ticks[3] - ticks[2]
    assert ax.yaxis_inverted()


def test_scores_without_evidence_can_be_drawn() -> None:
    ax = draw(None, [[0.0, -0.1, 0.0, 0.0], [-1.0] * 4])
    (cells,) = (item for item in ax.collections if isinstance(item, PatchCollection))
    cells.update_scalarmappable()
    assert len(set(lightness(cells))) == 1


def test_a_plan_for_another_teacher_is_refused() -> None:
    with pytest.raises(UserError, match="the teacher has 2 layers of 4 heads"):
        draw(HeadPlan.all_fa(2, 4, 1))
    with pytest.raises(UserError, match="made for another teacher"):
        draw(HeadPlan.all_fa(2, 4, 2, "other"))
