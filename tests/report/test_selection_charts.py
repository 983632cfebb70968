"""Tests of the selection's pictures: what is drawn is what the scores and the plan say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from kit.scores import make_scores
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.report.capabilities import capability_figure
from megatron_hydra.report.chart_style import FA_COLOUR, LA_COLOUR
from megatron_hydra.report.pareto_chart import draw_pareto
from megatron_hydra.report.pictures import save_selection_pictures
from megatron_hydra.report.ranking import draw_ranking, rank_heads
from megatron_hydra.selection.budget import Budget, Constraints
from megatron_hydra.selection.combination import Combination
from megatron_hydra.selection.cost import Costs, costs_of
from megatron_hydra.selection.pareto import ParetoRow, ParetoTable, pareto_table
from megatron_hydra.selection.policy import plan_from_scores
from megatron_hydra.selection.scores import HeadScores
from megatron_hydra.selection.uncertainty import bootstrap_scores, score_intervals

LAYERS, HEADS, GROUPS, PAIRS = 3, 4, 2, 10
# Heads with an effect, by falling size; all others only have noise.
STRONG = [(1, 2), (0, 0), (2, 3)]
FA = {0: [0], 1: [2], 2: [0]}  # the third head is there for its layer: 2, 3 was passed over


def noisy_scores() -> HeadScores:
    """Two capabilities, three heads with an effect far above the noise."""
    generator = np.random.default_rng(0)
    effects = {}
    for name in ("needle", "text"):
        values = generator.normal(0.0, 0.002, (PAIRS, LAYERS, HEADS))
        for size, head in zip((0.8, 0.5, 0.3), STRONG):
            values[(slice(None), *head)] += size + generator.normal(0.0, 0.05, PAIRS)
        effects[name] = values
    return make_scores(
        {"patching": effects}, GROUPS, {"needle": "retrieval", "text": "next_token"},
    )  # fmt: skip


def make_plan(fa_heads: dict[int, list[int]] = FA) -> HeadPlan:
    return HeadPlan.from_fa_heads(fa_heads, LAYERS, HEADS, GROUPS)


def draw(scores: HeadScores, plan: HeadPlan) -> Axes:
    ax = Figure().add_subplot()
    draw_ranking(rank_heads(scores, plan), ax)
    return ax


def marks(ax: Axes) -> dict[str, Line2D]:
    """Drawn points by their label, without its count."""
    return {
        str(line.get_label()).rpartition(" (")[0]: line
        for line in ax.lines
        if line.get_linestyle() == "None"
    }


def ranks_of(line: Line2D) -> list[int]:
    return [int(x) for x in np.asarray(line.get_xdata())]


def test_heads_are_ranked_as_the_policy_ranks_them() -> None:
    ties = np.zeros((2, 2, 2))
    ties[:, 0, 1] = 0.004  # too small to be notable, so score 0; yet more than nothing
    ties[:, 1, 1] = 0.3
    scores = make_scores({"patching": {"needle": ties}}, 1)
    ranking = rank_heads(scores, HeadPlan.from_fa_heads({1: [0, 1]}, 2, 2, 1))
    assert ranking.heads.tolist() == [[1, 1], [0, 1], [0, 0], [1, 0]]
    assert ranking.is_fa.tolist() == [True, False, False, True]
    assert {k: v.tolist() for k, v in ranking.reasons.items()} == {"": [False] * 3 + [True]}
    assert ranking.threshold == 0.0 and ranking.num_fa_heads == 2


def test_each_head_is_one_point_at_its_score_in_its_kinds_colour() -> None:
    scores = noisy_scores()
    points = marks(draw(scores, make_plan()))
    above, below, passed_over, others, ring = (
        points[f"{kind}{rest}"]
        for kind, rest in (
            ("full attention", ", above noise floor"),
            ("full attention", ", below noise floor"),
            ("other heads", ", above noise floor"),
            ("other heads", ", below noise floor"),
            ("full attention", " for another reason than score"),
        )
    )
    assert len(points) == 5
    assert ranks_of(above) == [1, 2] and ranks_of(passed_over) == [3]
    assert ranks_of(ring) == ranks_of(below) and len(ranks_of(below)) == 1
    everyone = ranks_of(above) + ranks_of(below) + ranks_of(passed_over) + ranks_of(others)
    assert sorted(everyone) == list(range(1, LAYERS * HEADS + 1))
    expected = [scores.scores[head] for head in STRONG]
    assert [*above.get_ydata(), *passed_over.get_ydata()] == pytest.approx(expected)
    assert {above.get_color(), below.get_color()} == {FA_COLOUR}
    assert {passed_over.get_color(), others.get_color()} == {LA_COLOUR}
    assert below.get_markerfacecolor() == others.get_markerfacecolor() == "white"


def test_intervals_end_where_the_bootstrap_says() -> None:
    scores = noisy_scores()
    ax = draw(scores, make_plan())
    (lines,) = (item for item in ax.collections if isinstance(item, LineCollection))
    lower, upper = score_intervals(bootstrap_scores(scores))
    order = [*STRONG, *(tuple(head) for head in rank_heads(scores, make_plan()).heads[3:])]
    for rank, (segment, head) in enumerate(zip(lines.get_segments(), order, strict=True), 1):
        assert segment.tolist() == [[rank, lower[head]], [rank, upper[head]]]
    assert all(upper[head] - lower[head] > 0.01 for head in STRONG[1:])


def test_budget_and_threshold_stand_where_the_scores_alone_would_cut() -> None:
    scores = noisy_scores()
    ax = draw(scores, make_plan())
    upright, level = (line for line in ax.lines if line.get_linestyle() != "None")
    assert list(upright.get_xdata()) == [3.5, 3.5]
    third = scores.scores[STRONG[2]]
    assert list(level.get_ydata()) == [third, third]
    assert {text.get_text() for text in ax.texts} == {
        "budget: 3 heads",
        f"cut at score {third:.3g}",
    }
    assert level.get_label() in [text.get_text() for text in ax.get_legend().get_texts()]


def test_scores_of_one_pair_have_neither_intervals_nor_noise_floor() -> None:
    ax = draw(make_scores(np.arange(12.0).reshape(3, 4), 2), make_plan())
    assert not [item for item in ax.collections if isinstance(item, LineCollection)]
    assert set(marks(ax)) == {
        "full attention",
        "other heads",
        "full attention for another reason than score",
    }


@pytest.mark.parametrize(("fa_heads", "num_lines"), [({}, 0), ({0: [0, 1, 2, 3]}, 2)])
def test_odd_plans_can_be_drawn(fa_heads: dict[int, list[int]], num_lines: int) -> None:
    ax = draw(make_scores(np.zeros((3, 4)), 2), make_plan(fa_heads))
    assert sum(line.get_linestyle() != "None" for line in ax.lines) == num_lines
    ax.figure.canvas.draw()


def panels(figure: Figure) -> list[tuple[Axes, PatchCollection]]:
    """The maps of a figure and their cells; colour bars have none."""
    found = []
    for ax in figure.axes:
        found += [(ax, item) for item in ax.collections if isinstance(item, PatchCollection)]
    return found


def test_each_capability_has_a_map_on_one_scale() -> None:
    generator = np.random.default_rng(1)
    names = [f"probe_{index}" for index in range(5)]
    effects = {name: generator.normal(0.1, 0.1, (4, LAYERS, HEADS)) for name in names}
    combination = Combination(("patching",), consistency=False, normalise=False)
    capabilities = {name: f"capability_{name[-1]}" for name in names}
    scores = make_scores({"patching": effects}, GROUPS, capabilities, combination)
    found = panels(capability_figure(scores, make_plan()))
    assert [ax.get_title(loc="left") for ax, _ in found] == [f"capability {i}" for i in range(5)]
    expected = {name: np.abs(values.mean(axis=0)) for name, values in effects.items()}
    highest = max(values.max() for values in expected.values())
    for name, (ax, cells) in zip(names, found):
        np.testing.assert_allclose(cells.get_array(), expected[name].ravel())
        assert cells.get_clim() == pytest.approx((0.0, highest))
        assert sum(isinstance(patch, Rectangle) for patch in ax.patches) == 3


@pytest.mark.parametrize(
    "constraints", [Constraints(min_fa_per_layer=1), Constraints(whole_groups=True)]
)
def test_heads_the_scores_alone_would_not_choose_are_marked_by_their_reason(
    constraints: Constraints,
) -> None:
    values = [[0.9, 0.0, 0.8, 0.1], [0.7, 0.0, 0.6, 0.0], [0.0, 0.2, 0.0, 0.0]]
    scores = make_scores(values, GROUPS)
    plan = plan_from_scores(scores, Budget("fa_heads", 4), constraints).plan
    ring = marks(draw(scores, plan))["full attention by a constraint"]
    order = sorted(np.ndindex(3, 4), key=lambda head: -values[head[0]][head[1]])
    forced = [
        rank
        for rank, (layer, head) in enumerate(order, 1)
        if rank > 4 and head in plan.layers[layer].fa_heads
    ]
    assert forced and ranks_of(ring) == forced


def test_a_plan_of_other_scores_is_refused() -> None:
    scores = make_scores(np.arange(12.0).reshape(3, 4), GROUPS)
    plan = plan_from_scores(scores, Budget("fa_heads", 4)).plan
    others = make_scores(np.arange(12.0)[::-1].reshape(3, 4), GROUPS)
    rank_heads(scores, plan)
    with pytest.raises(UserError, match="other head scores than these"):
        rank_heads(others, plan)


def pareto_row(kept: float, cache_bytes: float, num_fa_heads: int, **more: Any) -> ParetoRow:
    costs = Costs(1024, "h100", num_fa_heads, 1, cache_bytes, 0.0, 1.0, 1.0, 1.0)
    return ParetoRow(
        f"{num_fa_heads} FA heads", kept, **{"kept_interval": None, **more}, costs=costs
    )


def test_the_pareto_chart_shows_rows_front_plan_and_teacher() -> None:
    scores = make_scores(np.arange(12.0).reshape(3, 4), GROUPS)
    teacher = costs_of(scores.shape, None, 1024, "h100")
    full = teacher.kv_cache_bytes
    rows = (
        pareto_row(0.5, 0.2 * full, 2, kept_interval=(0.4, 0.6)),
        pareto_row(0.9, 0.6 * full, 7),
        pareto_row(0.7, 0.7 * full, 5, is_dominated=True),
    )
    plan = HeadPlan.from_fa_heads({2: [2, 3]}, LAYERS, HEADS, GROUPS)
    ax = Figure().add_subplot()
    draw_pareto(ParetoTable(rows, teacher), scores, plan, ax)
    drawn = {str(line.get_label()): line for line in ax.lines}
    unit = 1024.0  # the axis tells KiB
    assert "(KiB, cache in bf16)" in ax.get_xlabel() and "1,024 tokens" in ax.get_xlabel()

    def places(label: str) -> list[tuple[float, float]]:
        (found,) = (line for name, line in drawn.items() if label in name)
        return [(x * unit / full, y) for x, y in found.get_xydata()]

    assert places("budget's plan") == [pytest.approx((0.2, 50)), pytest.approx((0.6, 90))]
    (front,) = (line for line in ax.lines if len(line.get_xydata()) == 2 and line.get_zorder() == 1)
    assert [y for _, y in front.get_xydata()] == pytest.approx([50, 90])
    assert places("dominated") == [pytest.approx((0.7, 70))]
    assert places("teacher") == [pytest.approx((1, 100))]
    own = costs_of(scores.shape, plan, 1024, "h100")
    share = own.cache_gib / teacher.cache_gib
    assert places("this plan, 2 FA heads") == [pytest.approx((share, 100 * (10 + 11) / 66))]
    pale = next(line for name, line in drawn.items() if "dominated" in name)
    assert pale.get_alpha() < 0.5
    assert [text.get_text() for text in ax.texts] == ["2", "7"]
    lines = [[tuple(point) for point in line.get_xydata()] for line in ax.lines]
    x = 0.2 * full / unit
    assert [(x, 40.0), (x, 60.0)] in [[pytest.approx(p) for p in line] for line in lines]
    bottom, top = ax.get_ylim()
    assert bottom < 30 and top > 100


def test_a_pareto_table_of_another_teacher_is_refused() -> None:
    wider = make_scores(np.ones((3, 8)), GROUPS)
    table = ParetoTable((), costs_of(wider.shape, None, 1024, "h100"))
    with pytest.raises(UserError, match="another teacher"):
        draw_pareto(table, noisy_scores(), make_plan(), Figure().add_subplot())


def test_all_pictures_are_written_or_none(tmp_path: Path) -> None:
    scores = noisy_scores()
    plan = plan_from_scores(scores, Budget("fa_heads", 3), num_resamples=20).plan
    table = pareto_table(
        scores, [Budget("fa_heads", 2)], Constraints(), 1024, "h100", num_resamples=20
    )
    names = ["head_map.png", "ranking.png", "capabilities.png"]
    paths = save_selection_pictures(tmp_path / "a", scores, plan)
    assert paths == [tmp_path / "a" / name for name in names]
    for path in paths:
        image = matplotlib.image.imread(path)
        assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 10
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "pareto.png").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        save_selection_pictures(tmp_path / "b", scores, plan, pareto=table)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["pareto.png"]
    paths = save_selection_pictures(tmp_path / "b", scores, plan, overwrite=True, pareto=table)
    assert [path.name for path in paths] == [*names, "pareto.png"]
    assert paths[-1].read_bytes().startswith(b"\x89PNG")
