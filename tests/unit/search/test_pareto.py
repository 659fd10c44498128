"""The front against a comparison of every plan with every other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coinfer.profile import RADIOS, Conditions, Link
from coinfer.report.front_plot import plot_front
from coinfer.report.table import front_table
from coinfer.search import Goal, search
from coinfer.search.pareto import pareto_front


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("has_energy", [False, True])
def test_nobody_on_the_front_is_beaten_and_everybody_else_is(make_candidate, seed: int, has_energy: bool) -> None:
    chance = np.random.default_rng(seed)
    candidates = [
        make_candidate(
            number, ("device", "upload", "split")[number % 3],
            payload_bytes=float(chance.choice([30, 300, 3000])), loss_points=float(chance.choice([0.0, 0.2, 0.8, 3.0])),
            head_s=float(chance.choice([1e-3, 5e-3, 2e-2])), tail_s=float(chance.choice([1e-3, 4e-3])),
        )
        for number in range(60)
    ]  # fmt: skip
    powers = {"device_power_w": 2.0, "radio": RADIOS["wifi"]} if has_energy else {}
    ranking = search(candidates, Conditions(link=Link(rate_bps=1e6), **powers), Goal())
    front = pareto_front(ranking)
    rows = {row.index: row for row in ranking.rows if row.rejected is None}

    def figures(index: int) -> tuple[float, ...]:
        row = rows[index]
        return (row.latency_s, 1 / row.throughput_hz, row.wire_bytes, row.loss_points, row.energy_j or 0.0)

    for index in rows:
        beaten = any(
            all(a <= b for a, b in zip(figures(other), figures(index), strict=True))
            and figures(other) != figures(index)
            for other in rows
        )
        assert beaten <= (index not in front)
        assert index in front or any(figures(other) == figures(index) for other in front) or beaten
    assert [rows[index].latency_s for index in front] == sorted(rows[index].latency_s for index in front)
    assert len({figures(index) for index in front}) == len(front)


def test_the_front_as_a_table_and_a_picture(trio: list, tmp_path: Path) -> None:
    ranking = search(trio, Conditions(link=Link(rate_bps=1e6)), Goal())
    front = pareto_front(ranking)
    table = front_table(ranking, front)
    assert [row[1] for row in table.rows] == [str(trio[index].plan.number) for index in front]
    assert sum(row[-1] == "chosen" for row in table.rows) == 1
    plot_front(tmp_path / "front.png", ranking, front, title="three plans")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
