"""The plans that no other plan beats in everything at once: latency, rate, bytes on the wire, loss, energy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .solve import Ranking


def pareto_front(ranking: Ranking) -> tuple[int, ...]:
    """Indexes of the feasible candidates of which none is worse or equal in all objectives, the fastest first.

    Objectives are latency, period, bytes on the wire, loss, and energy where the conditions name powers.  Of candidates
    that are equal in all of them the one that ranks first stays.
    """
    rows = ranking.order[: ranking.num_feasible]
    priced = ranking.priced
    columns = [priced.latency_s, 1.0 / priced.throughput_hz, ranking.table.wire_bytes, ranking.table.loss_points]
    if not np.isnan(priced.energy_j).any():
        columns.append(priced.energy_j)
    points: NDArray[np.float64] = np.column_stack([column[rows] for column in columns])
    kept: list[int] = []
    # Whoever beats a candidate comes before it in this order, or ties with it.
    for place in np.lexsort(points.T[::-1]):
        others = points[kept]
        if not (others <= points[place]).all(axis=1).any():
            kept.append(int(place))
    return tuple(int(rows[place]) for place in kept)
