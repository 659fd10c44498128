"""Which plan is best: the space of codecs, the price of every candidate, the menu of a bundle.

    space      which codecs are worth trying at a cut and on the input
    estimate   one candidate under given conditions, stage by stage
    solve      Goal, search -> Ranking, the best of each way
    menu       the winners over a grid of conditions; the regime map

Nothing here measures, and nothing here knows how a plan runs: the only price list is `stages`.
"""

from .estimate import Estimate, Table, estimate
from .menu import Cell, RegimeMap, menu, regime_map
from .solve import ConstraintCost, Goal, Ranking, RankingRow, baselines, search
from .space import feature_codecs, input_codecs

__all__ = [
    "Cell",
    "ConstraintCost",
    "Estimate",
    "Goal",
    "Ranking",
    "RankingRow",
    "RegimeMap",
    "Table",
    "baselines",
    "estimate",
    "feature_codecs",
    "input_codecs",
    "menu",
    "regime_map",
    "search",
]
