"""Pictures of a head selection: which heads, how sure, for which capability, at which cost."""

from megatron_hydra.selection_charts.capabilities import capability_figure
from megatron_hydra.selection_charts.pareto import pareto_figure, plan_row
from megatron_hydra.selection_charts.pictures import PICTURES, save_selection_pictures
from megatron_hydra.selection_charts.ranking import Ranking, draw_ranking, rank_figure, rank_heads

__all__ = [
    "PICTURES",
    "Ranking",
    "capability_figure",
    "draw_ranking",
    "pareto_figure",
    "plan_row",
    "rank_figure",
    "rank_heads",
    "save_selection_pictures",
]
