from __future__ import annotations

import msgspec
import pytest

from coinfer.errors import Infeasible, PlanError
from coinfer.profile import Conditions, Link, Slowdown
from coinfer.search import Goal, RegimeMap, baselines, menu, regime_map, search
from coinfer.search.menu import BASE, LOADS, RATES_BPS, SLOWDOWNS, at


def test_the_grid_covers_what_the_product_promises():
    assert (RATES_BPS[0], RATES_BPS[-1], len(RATES_BPS)) == (1e4, 1e9, 21)
    assert (SLOWDOWNS[0], SLOWDOWNS[-1]) == (1, 300)
    assert (LOADS[0], LOADS[-1]) == (1, 8)


def test_the_menu_holds_every_winner_of_the_grid_and_nothing_that_never_leads(make_candidate, trio):
    never = make_candidate(3, "split", payload_bytes=5000.0, head_s=0.02, tail_s=0.02)
    lossy = make_candidate(4, "split", payload_bytes=1.0, head_s=0.0, tail_s=0.0, loss_points=9.0)
    candidates = [never, *trio, lossy]
    chosen = menu(candidates, Goal())
    assert chosen == (1, 2, 3)
    for rate_bps in RATES_BPS[::4]:
        for slowdown in SLOWDOWNS[::3]:
            for load in LOADS:
                conditions = at(BASE, rate_bps, slowdown, load, int8_ratio=2.0)
                assert search(candidates, conditions, Goal()).best in chosen


def test_a_kind_that_wins_nowhere_is_still_on_the_menu(make_candidate):
    device = make_candidate(0, "device", head_s=0.0001)
    upload = make_candidate(1, "upload", payload_bytes=9e6, tail_s=0.5)
    assert menu([device, upload], Goal()) == (0, 1)


def test_named_conditions_add_their_best_of_each_kind(make_candidate, trio):
    # Wins only where the edge is 1000 times faster than the grid knows it.
    special = make_candidate(3, "split", payload_bytes=300.0, head_s=0.0029, tail_s=0.07)
    assert 3 not in menu([*trio, special], Goal())
    named = Conditions(link=Link(rate_bps=1e6), edge_load=0.001, device=Slowdown(fp32=10, int8=20))
    assert 3 in menu([*trio, special], Goal(), also=[named])
    assert set(baselines([*trio, special], named, Goal()).values()) <= set(menu([*trio, special], Goal(), also=[named]))


def test_the_int8_ratio_decides_for_or_against_int8(make_candidate):
    candidates = [
        make_candidate(0, "device", head_s=0.010),
        make_candidate(1, "device", head_s=0.004, precision="int8"),
    ]
    assert menu(candidates, Goal(), int8_ratio=2.0) == (1,)
    assert menu(candidates, Goal(), int8_ratio=3.0) == (0,)


def test_a_menu_of_nothing_feasible_says_so(trio):
    with pytest.raises(Infeasible, match="max_loss_points"):
        menu(trio, Goal(max_loss_points=-1.0))


@pytest.mark.parametrize("empty", ["rates_bps", "slowdowns", "loads"])
def test_an_empty_grid_is_refused(trio, empty):
    with pytest.raises(PlanError, match="empty grid"):
        menu(trio, Goal(), **{empty: ()})


def test_a_regime_map_agrees_with_search_and_baselines(trio):
    rates, slowdowns = [1e4, 1e6, 1e9], [1.0, 30.0]
    regimes = regime_map(trio, rates, slowdowns, Goal(), int8_ratio=3.0)
    assert (regimes.rates_bps, regimes.slowdowns) == (tuple(rates), tuple(slowdowns))
    for slowdown, row in zip(slowdowns, regimes.cells, strict=True):
        for rate_bps, cell in zip(rates, row, strict=True):
            conditions = at(BASE, rate_bps, slowdown, 1.0, int8_ratio=3.0)
            ranking = search(trio, conditions, Goal())
            assert (cell.rate_bps, cell.slowdown) == (rate_bps, slowdown)
            assert cell.index == ranking.best
            assert cell.kind == trio[ranking.best].plan.kind
            assert cell.latency_s == ranking.rows[0].latency_s
            assert cell.best == baselines(trio, conditions, Goal())
            runner_up = next(row for row in ranking.rows if trio[row.index].plan.kind != cell.kind)
            assert cell.runner_up == trio[runner_up.index].plan.kind
            assert cell.ratio == pytest.approx(runner_up.latency_s / cell.latency_s, rel=1e-12)


def test_each_kind_wins_where_it_should(trio):
    regimes = regime_map(trio, [1e4, 2e5, 1e9], [1.0, 20.0, 300.0], Goal())
    kinds = [[cell.kind for cell in row] for row in regimes.cells]
    assert kinds[0] == ["device", "device", "device"]
    assert kinds[1][1] == "split"
    assert kinds[2][2] == "upload"


def test_a_cell_without_rivals_or_without_a_winner(make_candidate):
    lone = regime_map([make_candidate(0, "device")], [1e6], [1.0], Goal()).cells[0][0]
    assert (lone.kind, lone.ratio, lone.runner_up) == ("device", None, None)
    none = regime_map([make_candidate(0, "device")], [1e6], [1.0], Goal(max_latency_s=0.0)).cells[0][0]
    assert (none.kind, none.index, none.latency_s, none.ratio) == (None, None, None, None)


def test_a_free_winner_has_no_ratio(trio):
    cell = regime_map(trio, [1e6], [1.0], Goal(minimise="bytes")).cells[0][0]
    assert (cell.kind, cell.ratio) == ("device", None)


def test_a_regime_map_survives_json(trio):
    regimes = regime_map(trio, [1e4, 1e6], [1.0, 30.0], Goal())
    assert msgspec.json.decode(msgspec.json.encode(regimes), type=RegimeMap) == regimes


def test_an_empty_map_is_refused(trio):
    with pytest.raises(PlanError, match="at least one rate"):
        regime_map(trio, [], [1.0], Goal())
