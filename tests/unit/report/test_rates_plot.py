"""The picture of bytes and accuracy: what it draws, and what it refuses."""

from pathlib import Path

import pytest

from coinfer.errors import DataError
from coinfer.report.rates_plot import RateCurve, plot_rates

CURVES = [
    RateCurve(name="WebP", points=((500.0, 90.0), (800.0, 92.0))),
    RateCurve(name="unit", points=((20.0, 91.0), (60.0, 92.5))),
    RateCurve(name="nothing", points=()),
]


def test_equal_curves_give_an_equal_picture(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plot_rates(tmp_path / name, CURVES, title="Rates", reference=93.0, note="a note")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    moved = [RateCurve(name="WebP", points=((500.0, 89.0),)), *CURVES[1:]]
    plot_rates(tmp_path / "c.png", moved, title="Rates", reference=93.0, note="a note")
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "a.png").read_bytes()


def test_a_picture_needs_a_point(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs a curve with a point, got none"):
        plot_rates(tmp_path / "a.png", CURVES[2:], title="Rates")
