from __future__ import annotations

import io

from rich.console import Console

from coinfer.profile import Conditions, Link, Radio, Slowdown
from coinfer.report import (
    BenchCell,
    TextTable,
    bench_table,
    markdown,
    plain_text,
    ranking_table,
    regime_table,
    rich_table,
)
from coinfer.search import Goal, regime_map, search

CONDITIONS = Conditions(link=Link(rate_bps=1e6, delay_s=0.005), device=Slowdown(fp32=10, int8=20))
SMALL = TextTable(title="Times", columns=("kind", "ms"), right=("ms",), rows=(("split", "7"), ("a|b", "12")), note="n")


def test_plain_text_aligns():
    assert plain_text(SMALL) == "Times\nkind   ms\n-----  --\nsplit   7\na|b    12\nn"


def test_markdown_aligns_and_escapes():
    assert markdown(SMALL) == "**Times**\n\n| kind | ms |\n| --- | ---: |\n| split | 7 |\n| a\\|b | 12 |\n\nn\n"


def test_the_terminal_shows_every_cell():
    console = Console(file=io.StringIO(), width=60, color_system=None)
    console.print(rich_table(SMALL))
    shown = console.file.getvalue()
    for text in ("Times", "kind", "ms", "split", "7", "a|b", "12"):
        assert text in shown


def test_square_brackets_are_text_and_no_markup():
    console = Console(file=io.StringIO(), width=60, color_system=None)
    console.print(rich_table(TextTable(title="", columns=("cut",), rows=(("layer[bold]#0",),))))
    assert "layer[bold]#0" in console.file.getvalue()


def test_a_ranking_shows_the_chosen_the_best_of_each_kind_and_the_rejected(make_candidate, trio):
    lossy = make_candidate(3, "split", loss_points=2.5)
    uploads = [make_candidate(10 + k, "upload", payload_bytes=2000.0 + k) for k in range(5)]
    table = ranking_table(search([*trio, lossy, *uploads], CONDITIONS, Goal()), limit=2, rejected=3)
    assert table.title == "least latency at 1 Mbit/s, 5 ms one way, device slowed 10x (int8 20x), edge load 1"
    assert [row[:3] for row in table.rows] == [
        ("1", "10", "upload"),
        ("2", "11", "upload"),
        ("8", "0", "device"),
        ("7", "2", "split"),
        ("-", "3", "split"),
    ]
    assert table.rows[0][-1] == "chosen"
    assert table.rows[-1][-1] == "loss 2.5 > 1 points"
    assert table.note.startswith("4 of 8 plans that meet the constraints, 1 of 1 rejected.")


def test_energy_has_a_column_only_where_it_is_known(trio):
    assert "energy" not in ranking_table(search(trio, CONDITIONS, Goal())).columns
    radio = Radio(name="r", alpha_w_per_bps=0.0, beta_w=1.0)
    powered = Conditions(link=Link(rate_bps=1e6), device_power_w=2.0, radio=radio)
    table = ranking_table(search(trio, powered, Goal()))
    assert "energy" in table.columns
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert table.rows[0][table.columns.index("energy")] == "0.02 J"


def test_bench_cells_show_ratios_over_every_baseline():
    cell = BenchCell(
        rate_bps=1e6,
        slowdown=30,
        kind="split",
        label="split net layer2#0",
        latency_p50_s=0.0212,
        latency_p95_s=0.03,
        estimated_s=0.0205,
        payload_bytes=365,
        wire_bytes=427,
        num_requests=30,
        accuracy=93.12,
        throughput_hz=58.3,
        ratios={"device": 2.5, "upload": 1.25},
    )
    table = bench_table([cell])
    shown = dict(zip(table.columns, table.rows[0], strict=True))
    assert shown["rate"] == "1 Mbit/s" and shown["p50"] == "21.2 ms" and shown["estimated"] == "20.5 ms"
    assert (shown["over device"], shown["over upload"], shown["over split"]) == ("2.50x", "1.25x", "-")
    assert (shown["wire"], shown["accuracy"], shown["stream"], shown["n"]) == ("427 B", "93.12 %", "58.3/s", "30")


def test_a_regime_map_is_a_table_of_winners(trio):
    table = regime_table(regime_map(trio, [1e4, 1e9], [1.0, 300.0], Goal()))
    assert table.columns == ("device", "10 kbit/s", "1 Gbit/s")
    assert [row[0] for row in table.rows] == ["1x", "300x"]
    assert table.rows[0][1].startswith("device ") and table.rows[0][1].endswith("x")
    assert table.rows[1][2].startswith("upload ")
    nothing = regime_table(regime_map(trio, [1e4], [1.0], Goal(max_latency_s=0.0)))
    assert nothing.rows == (("1x", "-"),)
