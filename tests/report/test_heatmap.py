"""Tests of the head map: each cell's shade and each outline stand for the right head."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from kit.plans import all_fa
from kit.scores import make_scores
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.report.heatmap import draw_cells, draw_head_map, save_head_map

ROWS = [[0.1, 0.9, 0.0, 0.2], [0.3, 0.0, 0.4, 0.8]]
PLAN = HeadPlan.from_fa_heads({0: [1], 1: [2, 3]}, 2, 4, 2)


def draw(rows: list[list[float]] = ROWS) -> Axes:
    ax = Figure().add_subplot()
    draw_head_map(make_scores(rows, 2), PLAN, ax)
    return ax


def find_cells(ax: Axes) -> PatchCollection:
    (cells,) = (item for item in ax.collections if isinstance(item, PatchCollection))
    return cells


def lightness(cells: PatchCollection) -> list[float]:
    cells.update_scalarmappable()
    return [sum(colour[:3]) for colour in cells.get_facecolor()]


def test_higher_scores_are_darker() -> None:
    shades = lightness(find_cells(draw()))
    scores = [score for row in ROWS for score in row]
    order = sorted(range(8), key=lambda head: scores[head])
    assert [shades[head] for head in order] == sorted(shades, reverse=True)
    assert shades[5] == shades[2] > shades[0]


def test_cells_stand_where_their_heads_are() -> None:
    ax = draw()
    cells = find_cells(ax)
    boxes = [path.get_extents() for path in cells.get_paths()]
    centres = [((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) for box in boxes]
    expected = [(x, layer) for layer in range(2) for x in ax.get_xticks()]
    assert centres == [pytest.approx(centre) for centre in expected]
    numbers = {text.get_position(): text.get_text() for text in ax.texts}
    assert numbers[ax.get_xticks()[1], 0] == "0.90"
    assert list(cells.get_array()) == [score for row in ROWS for score in row]


def test_outlines_stand_on_the_fa_heads() -> None:
    ax = draw()
    outlined = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    centres = sorted(
        (box.get_y() + box.get_height() / 2, box.get_x() + box.get_width() / 2) for box in outlined
    )
    ticks = ax.get_xticks()
    assert centres == [(0, ticks[1]), (1, ticks[2]), (1, ticks[3])]
    assert "3 of 8 heads" in ax.get_legend().get_texts()[0].get_text()


def test_query_groups_stand_apart_and_layers_run_down() -> None:
    ax = draw()
    ticks = list(ax.get_xticks())
    assert ticks[2] - ticks[1] > ticks[1] - ticks[0] == ticks[3] - ticks[2]
    assert ax.yaxis_inverted()


def test_scores_without_evidence_can_be_drawn() -> None:
    assert len(set(lightness(find_cells(draw([[0.0] * 4] * 2))))) == 1


def test_one_scale_for_several_maps_shades_by_its_top() -> None:
    low, high = np.full((1, 2), 0.25), np.full((1, 2), 0.5)
    axes = Figure().subplots(1, 3)
    shades = [
        lightness(draw_cells(values, 1, ax, highest))[0]
        for ax, values, highest in zip(axes, (low, high, high), (0.5, 0.5, 1.0))
    ]
    assert shades[0] == pytest.approx(shades[2]) and shades[1] < shades[0]


def test_a_large_map_shows_every_cell_without_numbers_at_a_size_a_page_can_show(
    tmp_path: Path,
) -> None:
    scores = make_scores(np.random.default_rng(0).random((28, 16)), 8)
    ax = Figure().add_subplot()
    plan = all_fa(28, 16, 8)
    draw_head_map(scores, plan, ax)
    assert len(find_cells(ax).get_paths()) == 448
    assert not ax.texts
    save_head_map(tmp_path / "map.png", scores, plan, "title")
    height, width, _ = matplotlib.image.imread(tmp_path / "map.png").shape
    assert width < 1600 and height < 1600
    with pytest.raises(UserError, match="exists"):
        save_head_map(tmp_path / "map.png", scores, plan, "title")
