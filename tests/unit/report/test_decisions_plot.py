"""The picture of a run that adapts."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from coinfer.errors import DataError
from coinfer.profile import Trace
from coinfer.report.decisions_plot import plot_decisions
from coinfer.timeline import Decision, Outcome

TRACE = Trace(name="t", start_s=(0.0, 1.0, 2.0), rate_bps=(1e6, 0.0, 4e6), duration_s=3.0)


def test_a_run_is_drawn_with_its_link_and_its_changes_of_plan(tmp_path: Path) -> None:
    answered = ["edge", "device", "fallback", "late", "dropped", "exit"]
    outcomes = [
        Outcome(request=k, plan=k % 3, answered=answered[k % 6], start_s=0.1 * k, end_s=0.1 * k + 0.05)  # type: ignore[arg-type]
        for k in range(30)
    ]
    changes = [Decision(at_s=k * 1.0, plan=k, before=k - 1, reason="r", rate_bps=1e6, edge_load=1.0) for k in range(3)]
    plot_decisions(tmp_path / "a.png", outcomes, changes, {0: "device a"}, title="run", trace=TRACE)
    plot_decisions(tmp_path / "b.png", outcomes, [], {}, title="run")
    with Image.open(tmp_path / "a.png") as drawn, Image.open(tmp_path / "b.png") as bare:
        assert drawn.size == bare.size and min(drawn.size) > 300
    # What the trace and the changes add is seen.
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    with pytest.raises(DataError, match="needs a request, got none"):
        plot_decisions(tmp_path / "c.png", [], [], {}, title="run")
