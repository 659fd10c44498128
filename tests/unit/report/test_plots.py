from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from coinfer.errors import DataError
from coinfer.report import plots
from coinfer.report.plots import ROLE_COLOURS, Curve, plot_accuracy, plot_latency, plot_regimes
from coinfer.search import Goal, regime_map

RATES = (1e5, 1e6, 1e7)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)


def share_of(path: Path, colour: str) -> float:
    wanted = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)])
    return float((abs(pixels(path).astype(int) - wanted).max(axis=1) <= 2).mean())


def test_each_line_is_drawn_in_its_own_colour(tmp_path):
    for roles in (("device",), ("upload", "split"), ("device", "upload", "split", "chosen")):
        curves = [Curve(role=role, rates_bps=RATES, latencies_s=(k, 0.5, 0.2)) for k, role in enumerate(roles, 1)]
        plot_latency(tmp_path / "a.png", curves, title="T", note="N")
        for role in ("device", "upload", "split"):
            assert (share_of(tmp_path / "a.png", ROLE_COLOURS[role]) > 1e-4) == (role in roles)


def test_equal_input_gives_an_equal_file(tmp_path, trio):
    curve = Curve(
        role="split", rates_bps=RATES, latencies_s=(3.0, 2.0, 1.0), low_s=(2.9, 1.9, 0.9), high_s=(3.1, 2.1, 1.1)
    )
    for name in ("a.png", "b.png"):
        plot_latency(tmp_path / name, [curve], title="T")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert b"matplotlib" not in (tmp_path / "a.png").read_bytes().lower()


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ([], "at least one curve"),
        ([Curve(role="cloud", rates_bps=RATES, latencies_s=(1.0, 1.0, 1.0))], 'got "cloud"'),
        ([Curve(role="split", rates_bps=RATES, latencies_s=(1.0,))], 'curve "split"'),
        ([Curve(role="split", rates_bps=RATES, latencies_s=(1.0, 1.0, 1.0), low_s=(1.0, 1.0, 1.0))], "percentiles"),
    ],
)
def test_curves_that_make_no_sense_are_refused(tmp_path, curves, message):
    with pytest.raises(DataError, match=message):
        plot_latency(tmp_path / "a.png", curves, title="T")
    assert list(tmp_path.iterdir()) == []


def test_the_regime_map_fills_the_axes_with_the_winners(tmp_path, make_candidate):
    only_device = regime_map([make_candidate(0, "device")], RATES, [1.0, 10.0], Goal())
    plot_regimes(tmp_path / "device.png", only_device, title="T")
    assert share_of(tmp_path / "device.png", ROLE_COLOURS["device"]) > 0.3
    assert share_of(tmp_path / "device.png", ROLE_COLOURS["upload"]) == 0
    nothing = regime_map([make_candidate(0, "device")], RATES, [1.0], Goal(max_latency_s=0.0))
    plot_regimes(tmp_path / "nothing.png", nothing, title="T")
    assert share_of(tmp_path / "nothing.png", "#eeeeee") > 0.3


def test_measured_cells_are_marked(tmp_path, make_candidate):
    regimes = regime_map([make_candidate(0, "device")], RATES, [1.0, 10.0], Goal())
    plot_regimes(tmp_path / "none.png", regimes, title="T")
    plot_regimes(tmp_path / "dots.png", regimes, title="T", measured=[(1e5, 1.0), (1e6, 10.0)])
    assert share_of(tmp_path / "dots.png", "#000000") > share_of(tmp_path / "none.png", "#000000")


def test_a_fine_map_is_annotated_without_overlaps(tmp_path, trio, monkeypatch):
    texts = []
    monkeypatch.setattr(plots, "_write_ratio", lambda axes, cell, x, y, *, raised_pt: texts.append((x, y, raised_pt)))
    regimes = regime_map(trio, np.geomspace(1e4, 1e9, 41).tolist(), np.geomspace(1, 300, 26).tolist(), Goal())
    plot_regimes(tmp_path / "a.png", regimes, title="T", measured=[(1e6, 30.0)])
    assert sum(raised > 0 for _, _, raised in texts) == 1
    assert len(texts) > 30
    for k, (x, y, _) in enumerate(texts):
        assert 0 < x < 1 and 0 < y < 1
        assert not any(abs(x - a) < 0.06 and abs(y - b) < 0.045 for a, b, _ in texts[:k])


def test_the_accuracy_plot_needs_a_measured_accuracy(tmp_path, make_candidate, trio):
    plot_accuracy(tmp_path / "a.png", trio, title="T", reference=90.0)
    assert share_of(tmp_path / "a.png", ROLE_COLOURS["split"]) > 0
    with pytest.raises(DataError, match="got none"):
        plot_accuracy(tmp_path / "b.png", [make_candidate(0, "split", loss_points=None)], title="T")


def test_the_frontier_keeps_what_nothing_beats(monkeypatch):
    class Axes:
        drawn: list[tuple[list[float], list[float]]] = []

        def plot(self, *args, **kwargs):
            pass

        def step(self, x, y, **kwargs):
            self.drawn.append((list(x), list(y)))

    plots._draw_frontier(Axes(), [(30.0, 80.0), (10.0, 70.0), (20.0, 60.0), (10.0, 50.0), (40.0, 80.0)], "split")
    assert Axes.drawn == [([10.0, 30.0], [70.0, 80.0])]
